"""``python -m raylora.rank``: which datasets to train first."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest

from raylora.commands.rank import batch_options
from tests.helpers.feature_rows import make_records


def test_the_next_command_has_the_users_own_options():
    given = [
        "--chunk",
        "c",
        "--predictor",
        "p",
        "--model=m x",
        "--budget=3",
        "--coverage",
        "0.8",
        "--fresh",
        "--seed",
        "1",
    ]
    assert batch_options(given) == ["--chunk", "c", "--model=m x", "--seed", "1"]


@pytest.mark.slow
@pytest.mark.ci
def test_the_command_ranks_a_chunk_without_training(predictor, tiny_model_folder, tmp_path):
    folder = tmp_path / "chunk_002"
    folder.mkdir()
    for i in range(3):
        (folder / f"set_{i}.json").write_text(json.dumps(make_records(8, seed=i)))
    (folder / "broken.json").write_text("[{")
    predictor.save(tmp_path / "predictor")
    arguments = [
        "--chunk", "chunk_002", "--data-root", str(tmp_path), "--model", str(tiny_model_folder),
        "--quantization", "none", "--sample-size", "6", "--output", str(tmp_path / "out"),
        "--predictor", str(tmp_path / "predictor"), "--budget", "2",
    ]  # fmt: skip
    command = [sys.executable, "-m", "raylora.rank", *arguments]
    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "no probe is run" in first.stdout
    assert "FAILED broken" in first.stdout
    following = next(line for line in first.stdout.splitlines() if line.startswith("Next: "))
    assert f"--model {tiny_model_folder}" in following
    assert following.endswith("--max-experiments 2")
    results = tmp_path / "out" / "chunk_002"
    ranking = pd.read_csv(results / "ranking.csv")
    assert set(ranking["dataset"]) == {"set_0", "set_1", "set_2", "broken"}
    assert ranking["train"].tolist() == [True, True, False, False]
    assert not list(results.glob("experiments/*/adapter")), "a ranking trained something"
    assert not (results / "results.csv").exists(), "a ranking wrote over the table of a run"
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "worker" not in again.stdout, "what was measured was measured again"
    pd.testing.assert_frame_equal(pd.read_csv(results / "ranking.csv"), ranking)
    without = subprocess.run(
        [*command[:-4], "--predictor", "nowhere"], capture_output=True, text=True, check=False, timeout=300
    )
    assert without.returncode == 2
    assert without.stderr.strip() == (
        "raylora: nowhere: no such predictor; make one: python -m raylora.predict fit TABLE"
    )
