"""The GPU's benchmarks without a GPU: models made on the spot, the table, and the script in all its parts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import common, end_to_end, gpu, mmlu
from raylora.config.method import Method
from raylora.config.options import ModelOptions
from raylora.data.encoding import encode_example
from raylora.errors import UserError
from raylora.mmlu.prompts import encode_questions
from raylora.mmlu.scoring import save_score
from raylora.model.loading import load_model, wrap_model
from raylora.training.loop import train_adapter
from tests.helpers import ROOT
from tests.helpers.questions import make_questions
from tests.helpers.tiny import make_loaded, make_tokenizer
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


def test_a_flip_is_told_with_how_near_its_best_two_answers_were():
    expected = np.array([[0.0, -1.0, -9, -9], [-9, 0.0, -3.0, -9], [-1.0, -9, -9, -1.5], [0.0, -5, -5, -5]])
    found = np.array([[-1.0, 0.0, -9, -9], [-9, -3.0, 0.0, -9], [-1.5, -9, -9, -1.0], [0.0, -5, -5, -5]])
    assert mmlu.margins_of_flips(expected, found) == (3, 1.0, 3.0)
    assert mmlu.margins_of_flips(expected, expected) == (0, 0.0, 0.0)


def test_random_adapters_change_the_answers_each_in_its_own_way_and_are_gone_behind_it():
    loaded = make_loaded()
    encoded = encode_questions(loaded.tokenizer, make_questions(2), {}, "harness", 2048)
    before = mmlu.logprobs_of(common.score(loaded, encoded))
    with common.random_adapters(loaded, 2) as names:
        of_adapters = common.score_adapters(loaded, encoded, names)
    everything = [before, *of_adapters]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(everything) for b in everything[:i])
    np.testing.assert_array_equal(mmlu.logprobs_of(common.score(loaded, encoded)), before)


def test_lm_eval_asked_in_two_steps_says_what_raylora_says():
    pytest.importorskip("lm_eval")
    loaded, questions = make_loaded(), make_questions(2)
    ours, theirs = mmlu.raylora_way(loaded, {}), mmlu.best_harness(loaded, questions, {}, (2, 3))
    score, found = (way.ask(way.encode(questions)) for way in (ours, theirs))
    np.testing.assert_allclose(mmlu.logprobs_of(score), found, atol=1e-3)


@pytest.mark.slow
def test_questions_of_the_whole_test_and_of_whole_subjects(shared_data):
    folder = shared_data / "mmlu"
    everything, shots = mmlu.choose(folder, 10**6, 0)
    assert (len(everything), shots) == (14042, {})
    assert len(mmlu.choose(folder, 228, 0)[0]) == 228
    sampled, shots = mmlu.choose(folder, 120, 5)
    assert (len(sampled), len(shots)) == (120, 6)
    whole, shots = mmlu.choose(folder, 10**6, 5, whole_subjects=10)
    assert len(shots) == 10
    assert all(len(group) == 5 for group in shots.values())
    assert whole == [q for subject in shots for q in everything if q.subject == subject]


@pytest.mark.parametrize("number", [1, 4, 6, 8])
def test_a_chunk_has_as_many_datasets_as_are_wanted(shared_data, monkeypatch, tmp_path, number):
    monkeypatch.setattr(common, "SHARED", shared_data)
    made = end_to_end.make_chunk(tmp_path / "chunk_001", number)
    assert sorted(made) == sorted((tmp_path / "chunk_001").iterdir())
    assert len(made) == number
    assert len({file.read_bytes() for file in made}) == number
    if number == 8:  # each of four files is cut in two
        sizes, parts = (
            [len(json.loads(f.read_text())) for f in fs] for fs in ((shared_data / "chunk_001").iterdir(), made)
        )
        assert sum(sizes) == sum(parts)


def test_seconds_of_stages_add_up_to_those_of_the_command(tmp_path):
    loaded = make_loaded()
    score = common.score(loaded, encode_questions(loaded.tokenizer, make_questions(1), {}, "harness", 2048))
    for path, seconds in (("base/key", 7.0), ("experiments/a", 20.0), ("experiments/b", 22.0)):
        score.info["mmlu_seconds"] = seconds
        (tmp_path / path).mkdir(parents=True)
        save_score(score, tmp_path / path / "scores.parquet")
    rows = pd.DataFrame(
        {
            "features_seconds": [10.0, 6.0], "static_seconds": [2.0, 2.0], "probe_seconds": [3.0, 3.5],
            "train_seconds": [5.0, 6.0],
        }
    )  # fmt: skip
    found = end_to_end.seconds_by_stage(tmp_path, rows, total=90.0)
    assert tuple(found) == end_to_end.STAGES
    assert (found["load"], found["mmlu base"], found["mmlu adapter"]) == (5.5, 7.0, 42.0)
    assert sum(found.values()) == pytest.approx(90)


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
