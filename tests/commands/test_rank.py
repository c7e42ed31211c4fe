"""``python -m raylora.rank``: which datasets to train first."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from raylora.commands.options import RankConfig
from raylora.commands.rank import next_command, print_ranking
from raylora.config.run import Config, load_config
from raylora.config.sources import load_settings
from raylora.console import make_console
from raylora.predict.ranking import rank
from tests.helpers.feature_rows import make_records
from tests.helpers.predictors import fitted, fitted_to_noise, make_table


def test_the_next_command_has_all_options_of_the_batch_command_wherever_they_came_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYLORA_NUM_EPOCHS", "2")
    Path("a.yaml").write_text("grid: {lora_r: [2, 4]}\nmax_memory: {cpu: 60GiB}\n")
    given = [
        "--config",
        "a.yaml",
        "--chunk",
        "c d",
        "--predictor",
        "p",
        "--model=m x",
        "--budget=3",
        "--coverage",
        "0.8",
    ]
    given += ["--dataset", "hf://datasets/org/name@v1:test", "--dataset", "some/file.json"]
    given += ["--fresh", "--seed", "1", "--target-modules", "q_proj,v_proj", "--salvage", "--trackers", "mlflow"]
    config = load_settings(RankConfig, given, "rank")
    words = shlex.split(next_command(config, Path("o.csv")))
    assert words[:3] == ["python", "-m", "raylora.batch"]
    monkeypatch.delenv("RAYLORA_NUM_EPOCHS")
    batch = load_config(words[3:])
    changed = {"order": Path("o.csv"), "max_experiments": 3, "fresh": False}
    assert batch.model_dump() == {name: getattr(config, name) for name in Config.model_fields} | changed
    assert len(words) == 3 + 2 * 11 + 1, "an option that nobody set, or none"


def test_an_order_that_rests_on_nothing_says_so(capsys):
    table = make_table(6).assign(experiment_id="e", error="", cost=1.0)
    for predictor, told in (
        (fitted()[0], "raises most"),
        (fitted_to_noise()[0], "cheapest first (tokens of all epochs)"),
    ):
        print_ranking(rank(predictor, table, 2, None, 0), predictor, make_console())
        assert told in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("informed", [pytest.param(True, marks=pytest.mark.ci), False])
def test_the_command_ranks_a_chunk_without_training(informed, predictor, tiny_model_folder, tmp_path):
    predictor = predictor if informed else fitted_to_noise()[0]  # the latter was fitted on dynamic features, too
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
    sentence, verdict, *_ = first.stdout.splitlines()
    assert ("Features do not predict" in sentence) != informed
    assert verdict.startswith("Better than" if informed else "No better than")
    assert verdict.endswith("datasets are ordered by cost alone") != informed
    assert "no probe is run" in first.stdout
    assert "FAILED broken" in first.stdout
    following = next(line for line in first.stdout.splitlines() if line.startswith("Next: "))
    assert f"--model {tiny_model_folder}" in following
    assert "--max-experiments 2" in following
    assert following.endswith("ranking.csv")
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
