"""A finished run, read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from raylora.report.read_run import Answers, FinishedRun, loss_curve


@given(st.lists(st.text(max_size=4), min_size=1, max_size=12))
def test_every_experiment_has_a_name_of_its_own(names):
    table = pd.DataFrame({"dataset": names, "experiment_id": [f"x-{i:08d}" for i in range(len(names))]})
    assert len(set(FinishedRun(Path("nowhere"), table, {}).labels)) == len(names)


def test_an_experiment_id_never_leads_out_of_the_folder(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "run" / "experiments").mkdir(parents=True)
    ids = ["../../secret", "..", ".", "", "/etc"]
    run = FinishedRun(tmp_path / "run", pd.DataFrame({"experiment_id": ids}), {})
    assert [run.folder(i) for i in range(len(ids))] == [None] * len(ids)


def test_answers_of_the_same_questions_only():
    subjects, letters = pa.chunked_array([["a", "a"]]), pa.chunked_array([["A", "B"]])
    first = Answers(pa.chunked_array([["a/0", "a/1"]]), subjects, letters, np.array([True, False]))
    fewer = Answers(pa.chunked_array([["a/0"]]), subjects[:1], letters[:1], np.array([True]))
    assert not first.same_questions(fewer)
    assert first.same_questions(Answers(pa.chunked_array([["a/0"], ["a/1"]]), subjects, letters, ~first.correct))


def test_a_long_loss_curve_becomes_means(tmp_path):
    folder = tmp_path / "experiments" / "one"
    folder.mkdir(parents=True)
    run = FinishedRun(tmp_path, pd.DataFrame({"experiment_id": ["one"]}), {})
    pd.DataFrame({"step": range(1, 801), "loss": [3.0, 1.0] * 400}).to_csv(folder / "loss_curve.csv")
    steps, losses = loss_curve(run, 0)
    assert len(steps) == 80
    assert steps[0] == 5.5
    assert losses == [2.0] * 80
    pd.DataFrame({"step": [1, 2, 3], "loss": [2.0, float("nan"), 1.0]}).to_csv(folder / "loss_curve.csv")
    assert loss_curve(run, 0) == ([1.0, 3.0], [2.0, 1.0])
    (folder / "loss_curve.csv").write_text("step,loss\n")
    assert loss_curve(run, 0) is None
