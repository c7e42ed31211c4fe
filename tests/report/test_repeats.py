"""Several seeds of a dataset are one line of the ranking, and A/A pairs of each other."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from raylora.mmlu.seeds import change_over_seeds
from raylora.report.findings import ranking
from raylora.report.page import page_data
from raylora.report.read_run import answers_of, load_run, read_base
from raylora.report.repeats import a_a_pairs, seed_lines
from raylora.report.terminal import seed_notes
from tests.helpers.runs import write_run

SIZES = {"anatomy": 60, "virology": 50, "sociology": 40}


@pytest.fixture
def repeated(tmp_path):
    root = tmp_path / "repeated"
    write_run(root, ["one", "two", "three"], sizes=SIZES, grid={"seed": [0, 1, 2, 3]})
    return root


def test_the_trainings_of_a_dataset_are_one_line_with_an_interval_over_seeds(repeated):
    run = load_run(repeated)
    found = ranking(run)
    lines = found["seeds"]["lines"]
    assert [line["label"] for line in lines.values()] == ["one", "two", "three"]
    assert sorted(row for line in lines.values() for row in line["rows"]) == list(range(12))
    bases = read_base(run)
    for first, line in lines.items():
        assert line["change"] == pytest.approx(run.table["accuracy_change"][line["rows"]].mean())
        pairs = [answers_of(run, row, bases) for row in line["rows"]]
        expected = change_over_seeds(np.stack([a.correct.astype(int) - b.correct for a, b in pairs]))
        assert (line["low"], line["high"], line["p_value"]) == (expected.low, expected.high, expected.p_value)
        balanced = run.table["balanced_accuracy_change"][line["rows"]].mean()
        assert line["balanced"] == pytest.approx(balanced), "the weights are those of balanced accuracy"
        assert line["balanced_low"] < balanced < line["balanced_high"]
        assert len({found["holm"][row] for row in line["rows"]}) == 1
        assert found["verdicts"][first] in {"undecided", "gain", "loss", "letter"}
    smallest = min(line["p_value"] for line in lines.values())
    assert min(found["holm"]) == pytest.approx(min(1, 3 * smallest)), "adjusted over lines, not over rows"


def test_pairs_of_one_dataset_are_counted_by_both_tests(repeated):
    counts = a_a_pairs(seed_lines(load_run(repeated)))
    assert counts["num_pairs"] == 3 * 6
    assert counts["num_held_out"] == 3 * 4
    assert counts["num_held_out_real"] <= counts["num_held_out"] / 4
    assert page_data(load_run(repeated), None)["ranking"]["seeds"]["num_pairs"] == 18


def test_lines_of_a_grid_say_what_differs_and_a_lost_seed_leaves_the_others(tmp_path):
    root = tmp_path / "grid"
    write_run(root, ["one", "two"], sizes=SIZES, grid={"seed": [0, 1], "lora_r": [8, 16]})
    run = load_run(root)
    run.table.loc[0, "status"] = "error"
    labels = [line.label for line in seed_lines(run)]
    assert sorted(labels) == ["one · lora_r 16", "one · lora_r 8", "two · lora_r 16", "two · lora_r 8"]
    lost = next(line for line in seed_lines(run) if len(line.rows) == 1)
    values = ranking(run)["seeds"]["lines"][lost.rows[0]]
    assert values["low"] == run.table["accuracy_change_low"][lost.rows[0]], "one seed has its row's own interval"


def test_where_answers_are_missing_there_is_a_mean_and_nothing_is_called_real(repeated):
    shutil.rmtree(repeated / "base")
    found = ranking(load_run(repeated))
    line = found["seeds"]["lines"][found["rows"][0]]
    assert (line["low"], line["p_value"]) == (None, None)
    assert set(found["verdicts"]) == {"undecided"}


def test_one_question_gives_no_interval_and_no_error(tmp_path):
    write_run(tmp_path / "tiny", ["one"], sizes={"anatomy": 1}, grid={"seed": [0, 1, 2]})
    found = ranking(load_run(tmp_path / "tiny"))
    assert found["seeds"]["lines"][0]["low"] is None
    (note,) = seed_notes(found)
    assert note.endswith("over 3 seeds, a fresh one unknown: undecided")


def test_the_terminal_has_a_line_a_dataset_or_says_what_one_seed_cannot(repeated, tmp_path):
    notes = seed_notes(ranking(load_run(repeated)))
    assert len(notes) == 3
    assert all("over 4 seeds, a fresh one" in note for note in notes)
    write_run(tmp_path / "single", ["one"], sizes=SIZES)
    assert ranking(load_run(tmp_path / "single"))["seeds"] is None
    (note,) = seed_notes(ranking(load_run(tmp_path / "single")))
    assert "--repeats 5" in note
