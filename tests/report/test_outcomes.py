"""What the page can rank by beside accuracy."""

from __future__ import annotations

import numpy as np

from raylora.mmlu.paired import holm
from raylora.report.findings import ranking
from raylora.report.outcomes import outcomes
from raylora.report.read_run import load_run


def test_lines_are_the_rows_own_changes_adjusted_together(forty):
    run = load_run(forty)
    ranked = ranking(run)
    balanced, probability = outcomes(run, ranked)
    assert [o["name"] for o in (balanced, probability)] == ["balanced_accuracy", "correct_probability"]
    for outcome in (balanced, probability):
        assert list(outcome["lines"]) == ranked["rows"]
        for row, line in outcome["lines"].items():
            for key, column in (("change", "change"), ("low", "change_low"), ("high", "change_high")):
                assert line[key] == run.table[f"{outcome['name']}_{column}"][row]
        p_values = [line["p_value"] for line in outcome["lines"].values()]
        np.testing.assert_allclose([outcome["holm"][row] for row in ranked["rows"]], holm(p_values))
        for row, line in outcome["lines"].items():
            side = "gain" if line["change"] > 0 else "loss"
            assert outcome["verdicts"][row] == (side if outcome["holm"][row] < 0.05 else "undecided")
    rows = ranked["rows"]
    assert [probability["lines"][r]["p_value"] for r in rows] == run.table["correct_probability_p_value"][rows].tolist()


def test_a_further_set_has_the_outcomes_of_the_first(forty):
    run = load_run(forty)
    run.table["total_questions[arc]"] = 2 * run.table["total_questions"]
    for name in [n for n in run.table if n.startswith(("accuracy_", "balanced_", "correct_p", "mcnemar"))]:
        run.table[f"{name}[arc]"] = run.table[name]
    ranked = ranking(run)
    found = {outcome["name"]: outcome for outcome in outcomes(run, ranked)}
    assert list(found)[2:] == ["accuracy[arc]", "balanced_accuracy[arc]", "correct_probability[arc]"]
    assert found["accuracy[arc]"]["title"] == "accuracy, arc"
    assert found["accuracy[arc]"]["column"] == "accuracy_change[arc]"
    size = int(run.table["total_questions[arc]"][0])
    assert found["accuracy[arc]"]["power"].startswith(f"{size:,} questions can show changes of accuracy from")
    assert found["accuracy[arc]"]["verdicts"] == ranked["verdicts"]
    np.testing.assert_allclose(found["accuracy[arc]"]["holm"], ranked["holm"])
    assert found["balanced_accuracy[arc]"]["lines"] == found["balanced_accuracy"]["lines"]
    assert found["correct_probability[arc]"]["lines"] == found["correct_probability"]["lines"]


def test_an_older_run_has_what_its_table_has(forty):
    run = load_run(forty)
    for name in list(run.table):
        if "probability" in name or "brier" in name or name == "mmlu_note":
            del run.table[name]
    assert [o["name"] for o in outcomes(run, ranking(run))] == ["balanced_accuracy"]
    for name in list(run.table):
        if "balanced" in name:
            del run.table[name]
    assert outcomes(run, ranking(run)) == []
