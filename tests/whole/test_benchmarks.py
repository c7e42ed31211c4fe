"""The GPU's benchmarks without a GPU: models made on the spot, the table, and the script in all its parts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import common, gpu
from raylora.config import Method, ModelOptions
from raylora.data.encoding import encode_example
from raylora.errors import UserError
from raylora.model.loading import load_model, wrap_model
from raylora.training.loop import train_adapter
from tests.helpers import ROOT
from tests.helpers.tiny import make_tokenizer
from tests.helpers.training import make_examples


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The folder of the smallest shape's model."""
    folder = tmp_path_factory.mktemp("smallest")
    common.build("smallest", "none").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_a_model_that_is_made_on_the_spot_is_the_one_that_is_loaded(written, quantization):
    options = ModelOptions(model=str(written), quantization=quantization)
    made = wrap_model(common.build("smallest", quantization), make_tokenizer(), "smallest", options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(options, device)
    assert made.logits_hash() == loaded.logits_hash()
    assert made.quantization == loaded.quantization
    assert type(made.model.model.layers[0].mlp.up_proj) is type(loaded.model.model.layers[0].mlp.up_proj)
    assert not any(p.requires_grad for p in made.model.parameters())
    method = Method(num_epochs=1, batch_size=2, gradient_accumulation=1, learning_rate=1e-2)
    encoded = [encode_example(made.tokenizer, e, 64) for e in make_examples(8)]
    ours, theirs = (
        [step.loss for step in train_adapter(one, one.attach(method, 0), encoded, method, 0).steps]
        for one in (made, loaded)
    )
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[-1] < ours[0]


def test_what_a_machine_does_not_have_is_a_row_that_says_so(tmp_path, capsys):
    results = gpu.Results(tmp_path / "training.json", seconds=60)
    assert not results.is_over
    with results.refusals("raylora, 1 adapter", "fp8"):
        raise UserError("--quantization fp8: this GPU has none")
    results.add("raylora, 1 adapter", "none", share=0.5, **{"tokens/s": 14000.0, "kernels a pass": 12})
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert [row["weights"] for row in rows] == ["fp8", "none"]
    assert "refused" in rows[0]["note"]
    assert "tokens/s" in capsys.readouterr().out
    assert gpu.Results(tmp_path / "scoring.json", seconds=-1).is_over


def test_the_table_has_what_was_measured_and_why_the_rest_was_not(tmp_path):
    gpu.Results(tmp_path / "training.json", 60).add("raylora", "8bit", share=0.561, **{"tokens/s": 12345.6})
    (tmp_path / "parts").write_text("training|ok|99\nscoring|failed (124)|140\n")
    (tmp_path / "scoring.log").write_text("begun\nKilled here\n")
    found = gpu.table(tmp_path)
    assert "| raylora | 8bit | 12,346 | 0.561 |" in found
    assert "| scoring | failed (124) | 140 |" in found
    assert "Killed here" in found


def test_launches_are_counted_on_a_gpu_alone():
    assert gpu.count_launches(lambda num_steps: None, torch.device("cpu")) is None


def test_a_part_that_there_is_not_is_one_line(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "ANYWHERE": "1"}
    done = subprocess.run(
        [ROOT / "benchmarks/gpu.sh", "everything"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == "everything: no part; they are tests, training, scoring, whole\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("tests", "| tests | ok |"),
        ("training", "TRL, "),
        ("scoring", "lm-eval, batch 4, 5-shot"),
        ("whole", "mmlu adapter "),
    ],
)
def test_a_look_at_each_part_of_the_script(smollm2, shared_data, tmp_path, part, expected):
    environment = {**os.environ, "OUT": str(tmp_path), "SHAPE": "smallest", "ANYWHERE": "1"}
    environment["RAYLORA_SHARED_DATA"] = str(shared_data.resolve())
    done = subprocess.run(
        [ROOT / "benchmarks/gpu.sh", part], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in (tmp_path / "gpu_results.md").read_text()
