"""``results.jsonl`` has the form of lm-evaluation-harness' own results, and its numbers are the run's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from raylora.mmlu.questions import SUBJECT_GROUPS
from raylora.records import ResultRow, digest
from raylora.report.harness_results import HarnessResults
from raylora.storage.store import Store
from tests.helpers import DATA
from tests.helpers.runs import write_run

RECORDED = DATA / "lm_eval_results.json"
"""What lm-eval 0.4.13's ``simple_evaluate`` gave for MMLU and a random model, cut to four subjects and to the keys that
say something of a score; with those that its ``EvaluationTracker`` adds when it writes the file."""
SETS = {"": "mmlu_dataset/test_all_subjects.json", "arc": "ai2_arc.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[ResultRow]]:
    root = tmp_path_factory.mktemp("runs") / "chunk_042"
    rows = write_run(root, ["dolly", "käse [x]", "broken"], sizes=dict.fromkeys(SUBJECT_GROUPS, 6), num_failed=1)
    for row in rows:
        row.values.update(prompt_style="harness", scoring="letters", num_fewshot=0, mmlu_seconds=3.5)
    return root, rows


def lines_of(root: Path, rows: list[ResultRow], sets: dict = SETS) -> list[dict]:
    HarnessResults(Store(root), digest("base"), sets).write(rows)
    text = (root / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def with_values(rows: list[ResultRow], **values) -> list[ResultRow]:
    return [ResultRow({**row.values, **values}) for row in rows]


def test_a_line_is_of_the_base_and_each_good_row(run):
    lines = lines_of(*run)
    assert [line["raylora"].get("dataset") for line in lines] == [None, "dolly", "käse [x]"]
    assert [line["raylora"]["is_base"] for line in lines] == [True, False, False]
    assert "peft" not in lines[0]["config"]["model_args"]
    assert Path(lines[1]["config"]["model_args"]["peft"]).name == "adapter"


def test_the_numbers_are_those_of_the_row(run):
    _, rows = run
    for line, values in zip(lines_of(*run), [rows[0].values, rows[0].values, rows[1].values], strict=True):
        prefix = "base_" if line["raylora"]["is_base"] else ""
        found = line["results"]
        assert found["mmlu"]["acc,none"] == values[f"{prefix}overall_accuracy"]
        assert found["mmlu"]["acc_stderr,none"] == values[f"{prefix}overall_stderr"]
        if not prefix:
            for group in ("stem", "humanities", "social_sciences", "other"):
                assert found[f"mmlu_{group}"]["acc,none"] == values[f"accuracy_{group}"]
        tasks = [name for name in found if name not in line["groups"]]
        assert len(tasks) == 57
        correct = sum(found[task]["acc,none"] * line["n-samples"][task]["effective"] for task in tasks)
        assert math.isclose(correct, values[f"{prefix}correct_questions"])


def assert_has_the_form_of(ours, theirs, place: str = "line") -> None:
    """Each key of ``ours`` is there in ``theirs`` with a value of the same type, and the other way round."""
    if isinstance(theirs, dict):
        assert ours.keys() >= theirs.keys(), place
        for key in theirs:
            assert_has_the_form_of(ours[key], theirs[key], f"{place}.{key}")
    elif theirs is not None and ours is not None and ours != "N/A":
        assert isinstance(ours, type(theirs)) or {type(ours), type(theirs)} == {int, float}, place


def test_the_form_is_the_harness_own(run):
    recorded = json.loads(RECORDED.read_text())
    recorded["config"]["model_args"] = {}  # of a model in memory there are none
    for line in lines_of(*run):
        assert_has_the_form_of(line, recorded)
        assert {*line["results"]} == {*line["groups"], *line["configs"]} == {*line["versions"]}
        names = {*line["results"]}
        assert {name for group in line["group_subtasks"].values() for name in group} == names - {"mmlu"}


@pytest.mark.parametrize("column", ["results", "groups"])
def test_the_harness_prints_it(run, column):
    utils = pytest.importorskip("lm_eval.utils", reason="no lm-eval: pip install lm-eval==0.4.13")
    line = lines_of(*run)[1]
    shown = utils.make_table(line, column)
    assert f"{line['results']['mmlu']['acc,none']:.4f}"[:5] in shown
    assert "social sciences" in shown
    assert ("high_school_physics" in shown) == (column == "results")
    everything_right = {**line, "results": {"mmlu_x": {**line["results"]["mmlu"], "acc_stderr,none": "N/A"}}}
    assert "N/A" in utils.make_table(everything_right)


def test_the_harness_reads_its_recorded_form_as_ours(run):
    utils = pytest.importorskip("lm_eval.utils", reason="no lm-eval: pip install lm-eval==0.4.13")
    theirs = utils.make_table(json.loads(RECORDED.read_text())).splitlines()
    ours = utils.make_table(lines_of(*run)[1]).splitlines()
    assert [row.count("|") for row in ours[:2]] == [row.count("|") for row in theirs[:2]]
    names = {row.split("|")[1].strip() for row in ours}
    assert names >= {row.split("|")[1].strip() for row in theirs[2:] if row}


def test_further_sets_are_tasks_of_their_own(run):
    root, rows = run
    more = {"overall_accuracy[arc]": 0.75, "overall_stderr[arc]": None, "total_questions[arc]": 8}
    more |= {"base_overall_accuracy[arc]": 0.5, "base_overall_stderr[arc]": 0.2, "num_fewshot[arc]": 5}
    base, first, _ = lines_of(root, with_values(rows, **more))
    assert first["results"]["arc"] == {
        "name": "arc", "alias": "arc", "sample_len": 8, "acc,none": 0.75, "acc_stderr,none": "N/A",
    }  # fmt: skip
    assert base["results"]["arc"]["acc_stderr,none"] == 0.2
    assert (first["n-shot"]["arc"], first["n-shot"]["mmlu_anatomy"]) == (5, 0)
    assert first["configs"]["arc"]["dataset_path"] == "ai2_arc.json"
    assert "arc" not in {name for names in first["group_subtasks"].values() for name in names}


@pytest.mark.parametrize(
    ("scoring", "per", "task", "metric"),
    [
        ("cloze", "character", "mmlu_anatomy_continuation", "acc_norm,none"),
        ("cloze", "choice", "mmlu_anatomy_continuation", "acc,none"),
        ("generate", "character", "mmlu_anatomy_generative", "exact_match,get_response"),
    ],
)
def test_other_scorings_have_the_names_of_the_harness_own_tasks(run, scoring, per, task, metric):
    root, rows = run
    line = lines_of(root, with_values(rows, scoring=scoring, cloze_per=per))[1]
    assert metric in line["results"][task]
    assert line["group_subtasks"][f"mmlu_{task.rpartition('_')[2]}"] == [
        "stem", "other", "social sciences", "humanities",
    ]  # fmt: skip
    assert line["results"]["social sciences"][metric] == rows[0].values["accuracy_social_sciences"]


def test_a_chat_is_not_the_harness_own_version_and_a_sample_says_so(run):
    root, rows = run
    line = lines_of(root, with_values(rows, prompt_style="chat", max_samples=50))[1]
    assert line["versions"] == {}
    assert line["n-samples"]["mmlu_anatomy"] == {"original": None, "effective": 6}


def test_questions_that_are_not_mmlu_s_are_one_task(run, tmp_path):
    root, rows = run
    path = Store(root).scores_of(rows[0].values["experiment_id"])
    before = path.read_bytes()
    table = pd.read_parquet(path)
    try:
        table.assign(subject=table["subject"].replace("anatomy", "orvenia")).to_parquet(path)
        line = lines_of(root, rows[:1], {"": "/data/own test.json"})[1]
    finally:
        path.write_bytes(before)
    assert [*line["results"]] == ["own_test"]
    assert line["results"]["own_test"]["acc,none"] == rows[0].values["overall_accuracy"]


def test_scores_that_are_missing_or_broken_cost_a_line_and_nothing_else(run):
    root, rows = run
    path = Store(root).scores_of(rows[0].values["experiment_id"])
    before = path.read_bytes()
    try:
        path.write_bytes(b"PAR1")
        assert [line["raylora"].get("dataset") for line in lines_of(*run)] == [None, "käse [x]"]
        path.unlink()
        assert len(lines_of(*run)) == 2
    finally:
        path.write_bytes(before)
    assert lines_of(root, rows[2:]) == []
