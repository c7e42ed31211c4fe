"""What a predictor is worth, in words."""

from __future__ import annotations

import pytest

from raylora.errors import UserError
from raylora.predict.sentences import doubt_of, summary_of
from tests.helpers.predictors import make_table


def card(better: bool = True, target: str = "overall_accuracy", **more):
    baselines = {"mean": {"rmse": 0.1649}}
    return {"target": target, "rmse": 0.0112, "r2": 0.9, "baselines": baselines, "verdict": {"better": better}, **more}


def test_a_sentence_says_how_far_off_predictions_are():
    assert summary_of(card()) == "It predicts a new dataset's accuracy to within 0.011, the mean guess 0.165."
    assert summary_of(card(better=False)).startswith("Features do not predict a new dataset's accuracy: to within 0.01")
    assert "change of accuracy on arc to within" in summary_of(card(target="accuracy_change[arc]"))
    assert "to within 0.00040, the mean guess 0.16490" in summary_of(card(rmse=0.0004))


def test_figures_that_are_too_good_are_doubted():
    assert doubt_of(card(r2=0.98)) == ""
    assert "R2 0.995 on held-out rows: too good to be true?" in doubt_of(card(r2=0.995))
    assert "does train_x hold the outcome" in doubt_of(card(r2=0.995, importance={"train_x": [1, 0]}))


def test_each_row_without_a_prediction_is_named_with_its_own_feature_and_a_fix(predictor):
    table = make_table(4)
    first, second, *_ = predictor.columns
    table.loc[[0, 1], first] = None
    table.loc[[2, 3], second] = None
    with pytest.raises(UserError) as caught:
        predictor.predict(table, place="t.csv")
    told = str(caught.value)
    assert told.startswith(f"t.csv: 4 of 4 rows have no prediction: set_0 lacks {first}; set_1 lacks {first}; set_2 ")
    assert f"set_2 lacks {second} and 1 more rows: measure them (python -m raylora.features)" in told
    assert told.endswith(f"--leave-out {first} {second}")
