"""What a run prints at its end."""

from __future__ import annotations

import io
import re

import pandas as pd
from rich.console import Console

from raylora.report.terminal import print_results
from raylora.storage.store import Store
from tests.helpers.runs import letter_scores, write_run


def printed(rows, root) -> str:
    console = Console(width=100, file=io.StringIO(), record=True)
    print_results(rows, Store(root), console)
    return console.export_text()


def test_favourite_letters_are_said_where_changes_are_shown(tmp_path):
    rows = write_run(tmp_path / "chunk", ["only_letters", "knowledge"], scores=letter_scores())
    text = printed(rows, tmp_path / "chunk")
    assert "The base answers A to 600 of 600 questions: letters cannot show a change; try --scoring cloze." in text
    assert "only_letters: the model answers D to 600 of 600 questions: letters cannot show a change" in text
    assert "knowledge: the model" not in text
    assert "only_letters: its favourite letter moved: A 100% to 0%" in text
    assert "knowledge: its" not in text


def test_a_favourite_letter_that_moved_with_every_seed_is_said_once(tmp_path):
    base, letters, _ = letter_scores()
    seeds = {"seed": [0, 1, 2]}
    rows = write_run(tmp_path / "chunk", ["only_letters"], scores=(base, letters), grid=seeds)
    text = printed(rows, tmp_path / "chunk")
    assert text.count("its favourite letter moved: A 100% to 0%") == 1
    assert "over 3 seeds" in text


def test_a_run_without_mmlu_says_nothing_of_letters(tmp_path):
    rows = write_run(tmp_path / "chunk", ["a", "b"], stages=("features", "train"))
    text = printed(rows, tmp_path / "chunk")
    assert "favourite letter" not in text
    assert "The base answers" not in text


def test_a_change_of_nothing_has_an_interval(tmp_path):
    base, _, knowledge = letter_scores()
    rows = write_run(tmp_path / "chunk", ["same", "knowledge"], scores=(base, base, knowledge))
    assert rows[0].values["accuracy_change"] == 0
    assert "+0.000 -0.009 +0.009" in " ".join(printed(rows, tmp_path / "chunk").split())


def test_a_base_that_adapters_move_away_from_is_shown_by_letters(tmp_path):
    base, _, knowledge = letter_scores()
    rows = write_run(tmp_path / "chunk", ["knowledge"], scores=(base, knowledge))
    text = printed(rows, tmp_path / "chunk")
    assert "The base answers A to 100% of the questions." in text
    assert "cloze" not in text


def test_many_constant_adapters_are_one_line(tmp_path):
    base, letters, knowledge = letter_scores()
    rows = write_run(tmp_path / "chunk", ["a", "b", "c"], scores=(base, letters, knowledge, base))
    text = " ".join(printed(rows, tmp_path / "chunk").split())
    assert "2 of 3 adapters answer one letter to nearly all questions: letters cannot show a change" in text
    assert [row.values["mmlu_note"] for row in rows] == [
        "the model answers D to 600 of 600 questions: letters cannot show a change; try --scoring cloze",
        "",
        "the model answers A to 600 of 600 questions: letters cannot show a change; try --scoring cloze",
    ]


def test_a_further_set_is_one_line(tmp_path):
    rows = write_run(tmp_path / "chunk", ["a", "b", "c"])
    path = tmp_path / "chunk" / "results.parquet"
    table = pd.read_parquet(path)
    further = {"accuracy_change": [0.5, -0.5, 0.01], "mcnemar_p_value": [1e-9, 1e-9, 1.0]}
    names = [f"balanced_accuracy_change{side}" for side in ("", "_low", "_high")]
    further |= dict(zip(names, ([0.5, -0.5, 0], [0.4, -0.6, -0.1], [0.6, -0.4, 0.1]), strict=True))
    table.assign(**{f"{name}[arc]": values for name, values in further.items()}).to_parquet(path)
    best, worst, _ = table["dataset"]
    shown = " ".join(printed(rows, tmp_path / "chunk").split())
    assert f"arc: 1 better, 1 worse, by Holm at 5%, of 3; {best} +0.500 to {worst} -0.500." in shown


def test_of_three_changes_the_best_is_shrunk_and_both_adjustments_count(tmp_path):
    rows = write_run(tmp_path / "chunk", ["a", "b", "c"])
    text = " ".join(printed(rows, tmp_path / "chunk").split())
    assert re.search(r"Significant: \d of 3 by Holm at 5%; \d at a false-discovery rate of 5%\.", text)
    best = max(rows, key=lambda row: row.values["accuracy_change"]).values
    start = f"best of 3 noisy changes is partly luck: {best['dataset']} {best['accuracy_change']:+.3f}, shrunk towards"
    assert start in text
    two = write_run(tmp_path / "two", ["a", "b"])
    assert "partly luck" not in printed(two, tmp_path / "two")
    base, _, _ = letter_scores()
    nothing = write_run(tmp_path / "nothing", ["a", "b", "c"], scores=(base, base, base, base))
    text = printed(nothing, tmp_path / "nothing")
    assert "Significant: 0 of 3" in text
    assert "partly luck" not in text, "no change is the best of none"


def test_lines_over_seeds_are_shrunk_too(tmp_path):
    rows = write_run(tmp_path / "chunk", ["a", "b", "c"], grid={"seed": [0, 1, 2]})
    assert "The best of 3 noisy changes is partly luck: " in printed(rows, tmp_path / "chunk")
