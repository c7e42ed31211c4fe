"""Which datasets to train first: the rule, the command, and the order that the batch command takes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from raylora.commands.options import RankConfig
from raylora.commands.rank import next_command
from raylora.config import Config, load_config
from raylora.config_sources import load_settings
from raylora.errors import UserError
from raylora.planning.plan import find_files, make_plan, read_order
from raylora.predict.ranking import order_by_expected_best, rank
from raylora.predict.tables import known_from_table
from raylora.predict.validation import fit_predictor
from tests.helpers.feature_rows import make_records
from tests.predict.test_predict import TARGET, make_table

CHEAP = ("dynamic",)


@pytest.fixture(scope="module")
def predictor():
    table = make_table()
    return fit_predictor(known_from_table(table, TARGET, leave_out=CHEAP), TARGET, threads=1, explain=False)[0]


def test_a_budget_is_not_spent_on_the_same_bet_twice():
    """Two that are good or bad together, and a third that is a little worse by itself, and different."""
    luck = np.random.default_rng(0).normal(size=(5000, 2))
    draws = np.stack([luck[:, 0], luck[:, 0] - 0.01, luck[:, 1] - 0.05], axis=1)
    order, expected = order_by_expected_best(draws, draws.mean(axis=0))
    assert order == [0, 2, 1]
    assert expected == sorted(expected)
    assert expected[-1] == pytest.approx(draws.max(axis=1).mean())


def test_where_nothing_is_uncertain_the_higher_prediction_comes_first():
    predictions = np.array([0.2, 0.5, 0.1, 0.4])
    order, expected = order_by_expected_best(np.tile(predictions, (10, 1)), predictions)
    assert order == [1, 3, 0, 2]
    assert expected == pytest.approx([0.5] * 4)


def test_a_ranking_has_every_dataset_and_marks_the_budget(predictor):
    table = make_table(12, seed=4).assign(experiment_id=[f"e{i}" for i in range(12)], error="")
    table.loc[7, "error"] = "set_7.json: line 1: not JSON"
    ranking = rank(predictor, table, budget=3, coverage=None, seed=0)
    assert len(ranking) == 12
    assert ranking["train"].tolist() == [True] * 3 + [False] * 9
    assert ranking["rank"].tolist()[:11] == list(range(1, 12))
    assert ranking.iloc[11]["dataset"] == "set_7"
    assert ranking.iloc[11]["error"].endswith("not JSON")
    assert ranking["chance_best"].sum() == pytest.approx(1)
    assert ranking["expected_best"].dropna().is_monotonic_increasing
    assert rank(predictor, table, 3, None, 0).equals(ranking), "the same seed should give the same ranking"
    assert rank(predictor, table, None, None, 0)["train"].sum() == 11


def test_a_chunk_of_which_nothing_can_be_measured_is_one_line(predictor):
    table = make_table(10).assign(experiment_id="e", error="broken.json: not JSON")
    with pytest.raises(UserError, match=r"no dataset could be measured; the first: broken.json"):
        rank(predictor, table, 1, None, 0)


def test_the_batch_takes_an_order_and_its_limit(tiny_model_folder, tmp_path):
    folder = tmp_path / "chunk_002"
    folder.mkdir()
    for i in range(4):
        (folder / f"set_{i}.json").write_text(json.dumps(make_records(2 + i, seed=i)))
    order = tmp_path / "ranking.csv"
    order.write_text("rank,dataset\n1,set_2\n2,set_0\n3,not_here\n4,set_1\n")
    options = {"chunk": "chunk_002", "data_root": tmp_path, "model": str(tiny_model_folder), "stages": "train"}
    options |= {"output": tmp_path / "out"}
    config = load_config(**options, order=order)
    name, files = find_files(config)
    assert [e.dataset for e in make_plan(config, files, name).experiments] == ["set_2", "set_0", "set_1", "set_3"]
    assert [f.stem for f in find_files(load_config(**options, order=order, limit=2))[1]] == ["set_2", "set_0"]
    plain = load_config(**options)
    assert make_plan(plain, find_files(plain)[1], name).experiments[0].dataset == "set_3"


def test_a_budget_is_of_experiments_and_not_of_files(tiny_model_folder, tmp_path):
    folder = tmp_path / "chunk_002"
    folder.mkdir()
    for i in range(2):
        (folder / f"set_{i}.json").write_text(json.dumps(make_records(3, seed=i)))
    options = {"chunk": "chunk_002", "data_root": tmp_path, "model": str(tiny_model_folder), "stages": "train"}
    options |= {"output": tmp_path / "out", "grid": {"lora_r": [2, 4, 8]}}
    config = load_config(**options)
    _, files = find_files(config)
    every = [e.experiment_id for e in make_plan(config, files, "chunk_002").experiments]
    assert len(every) == 6
    order = tmp_path / "ranking.csv"
    order.write_text("dataset,experiment_id\n" + "".join(f"x,{name}\n" for name in every[::-1]))
    chosen = make_plan(load_config(**options, order=order, max_experiments=2), files, "chunk_002").experiments
    assert [e.experiment_id for e in chosen] == every[:-3:-1]


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
    given += ["--fresh", "--seed", "1", "--target-modules", "q_proj,v_proj", "--salvage", "--trackers", "mlflow"]
    config = load_settings(RankConfig, given, "rank")
    words = shlex.split(next_command(config, Path("o.csv")))
    assert words[:3] == ["python", "-m", "raylora.batch"]
    monkeypatch.delenv("RAYLORA_NUM_EPOCHS")
    batch = load_config(words[3:])
    changed = {"order": Path("o.csv"), "max_experiments": 3, "fresh": False}
    assert batch.model_dump() == {name: getattr(config, name) for name in Config.model_fields} | changed
    assert len(words) == 3 + 2 * 10 + 1, "an option that nobody set, or none"


def test_an_order_names_experiments_of_a_grid(tmp_path):
    path = tmp_path / "o.csv"
    path.write_text("dataset,experiment_id\na,a-2\na,a-1\nb,b-1\n")
    place = read_order(path)
    assert (place["a-2"], place["a-1"], place["b-1"], place["a"], place["b"]) == (0, 1, 2, 0, 2)


@pytest.mark.parametrize("content", [None, "", "name\nx\n", '"\n'])
def test_an_order_that_cannot_be_read_is_one_line(tmp_path, content):
    path = tmp_path / "o.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_order(path)
    assert str(caught.value).startswith(f"--order {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
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
