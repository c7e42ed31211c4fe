"""What a predictor may know, and tables that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest

from raylora.errors import UserError
from raylora.predict.tables import FEATURE_GROUPS, KNOWN_COLUMNS, columns_left_out, known_from_table, needs_probe
from raylora.rows import read_table
from tests.helpers.predictors import TARGET, fitted, make_table


@pytest.mark.slow
def test_only_what_is_known_before_training_is_used():
    """Losses, seconds and scores come out of a training: a predictor that reads them predicts nothing."""
    used = set(fitted()[0].columns)
    assert used <= set(KNOWN_COLUMNS)
    assert not used & {"train_loss", "static_seconds", "overall_accuracy"}
    assert fitted()[0].card["needs_probe"]
    cheap = fitted(("dynamic",))[0]
    assert "loss_stability" not in cheap.columns
    assert not cheap.card["needs_probe"]
    assert needs_probe(FEATURE_GROUPS["dynamic"])


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda t: t.assign(overall_accuracy=100 * t["overall_accuracy"]), "row 1: .* give shares"),
        (lambda t: t.assign(base_model_perplexity=[*[5.0] * 29, 1e40]), "row 30: 1e\\+40 is too large"),
        (
            lambda t: t.assign(status=["error", *["ok"] * 29], base_model_perplexity=[*["5"] * 20, "x", *["6"] * 9]),
            "row 21: 'x' is no number",
        ),
    ],
)
def test_a_number_that_cannot_be_is_named_by_its_row(harm, told):
    with pytest.raises(UserError, match=told):
        known_from_table(harm(make_table(30, seed=6)), "overall_accuracy")


def test_the_outcome_may_be_that_of_a_further_set():
    table = make_table(30, seed=6)
    table["accuracy_change[arc]"] = table["overall_accuracy"] - 0.5
    assert (known_from_table(table, "accuracy_change[arc]").target < 0).any()
    table["overall_accuracy[arc]"] = 100 * table["overall_accuracy"]
    with pytest.raises(UserError, match=r"column overall_accuracy\[arc\], row 1: .* is not between 0 and 1"):
        known_from_table(table, "overall_accuracy[arc]")


def test_rows_without_a_hash_are_not_taken_for_one_dataset():
    table = make_table(30, seed=6).assign(data_hash=None)
    assert known_from_table(table, "overall_accuracy").groups is None
    table["data_hash"] = ["a"] * 5 + ["b"] * 5 + [None] * 20
    assert len(np.unique(known_from_table(table, "overall_accuracy").groups)) == 22


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (lambda t: t.drop(columns=TARGET), {}, "no column overall_accuracy"),
        (lambda t: t.rename(columns={TARGET: "accuracy_change"}), {}, "--target accuracy_change"),
        (lambda t: t.head(4), {}, "4 good rows with overall_accuracy; a predictor needs 10"),
        (lambda t: t.assign(status="error"), {}, "0 good rows"),
        (lambda t: t.assign(loss_stability="high"), {}, "column loss_stability, row 1: 'high' is no number"),
        (lambda t: t[["dataset", TARGET]], {}, "no feature column"),
        (lambda t: t, {"leave_out": ["dynamics"]}, "did you mean dynamic?"),
        (lambda t: t, {"group": "datset"}, "did you mean dataset?"),
        (lambda t: t.assign(group="one"), {"group": "group"}, "1 groups"),
        (lambda t: t.assign(overall_accuracy=0.4), {}, "column overall_accuracy is 0.4 in all 60 good rows"),
        (lambda t: t.assign(overall_accuracy=[0.1 + 0.2, 0.3] * 30), {}, "is 0.3 in all 60 good rows"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(change, options, expected):
    with pytest.raises(UserError) as caught:
        known_from_table(change(make_table()), TARGET, place="t.csv", **options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_used_is_said():
    table = make_table().assign(io_similarity=None, input_ttr=0.5, train_on=["all", "answer"] * 30)
    table.loc[:4, "status"] = "error"
    notes = " | ".join(known_from_table(table, TARGET).notes)
    assert "5 of 60 rows are left out" in notes
    assert "null in every row, and not used: io_similarity" in notes
    assert "the same in every row, and not used: input_ttr" in notes
    assert "rows differ in train_on" in notes


def test_small_tables_are_told_that_they_are_small():
    few = make_table(20)
    assert "20 rows are few" in " ".join(known_from_table(few, TARGET).notes)
    assert "are few" not in " ".join(known_from_table(make_table(60), TARGET).notes)
    grouped = known_from_table(make_table(60, repeats=6), TARGET)
    assert "10 groups are few" in " ".join(grouped.notes)


def test_every_column_has_one_group():
    columns = [column for group in FEATURE_GROUPS.values() for column in group]
    assert sorted(columns) == sorted(KNOWN_COLUMNS)
    assert set(columns_left_out(["static", "dynamic", "hyperparameters"])) == set(KNOWN_COLUMNS)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"PAR1 and no more", b"a,b\n", b'a,b\n"1,2\n3,4,5\n'])
def test_a_broken_table_is_one_line(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        known_from_table(read_table(path), TARGET, place=str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
