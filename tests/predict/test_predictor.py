"""Predictions, their intervals, and files that may be hostile."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skops.io
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.dummy import DummyRegressor

from raylora.errors import UserError
from raylora.predict.conformal import conformal_rank, cv_plus, is_too_few
from raylora.predict.predictor import TRUSTED_TYPES, load_predictor, trees_of
from raylora.predict.ranking import rank
from raylora.predict.tables import known_from_table
from raylora.predict.validation import fit_predictor
from tests.helpers.predictors import fitted, fitted_to_noise, make_noise, make_table


@given(st.integers(1, 400), st.floats(0.05, 0.95))
def test_the_rank_is_the_smallest_with_the_promised_coverage(num_rows, coverage):
    """A new error is among the k smallest of n + 1 exchangeable ones with probability k / (n + 1)."""
    k = conformal_rank(num_rows, coverage)
    assert k / (num_rows + 1) >= coverage - 1e-9
    assert (k - 1) / (num_rows + 1) < coverage


@given(st.integers(0, 2**31), st.sampled_from([0.5, 0.8, 0.9]), st.sampled_from([40, 99]))
@settings(max_examples=15, deadline=None)
def test_intervals_cover_what_they_promise_on_exchangeable_errors(seed, coverage, num_rows):
    """Fold models that agree: split conformal, whose coverage is known exactly, over 400 tables of errors."""
    random = np.random.default_rng(seed)
    fold_of = np.arange(num_rows) % 5
    inside = []
    for _ in range(400):
        errors = np.abs(random.standard_t(3, size=num_rows))
        low, high = cv_plus(np.zeros((5, 20)), fold_of, errors, coverage)
        inside.append(np.mean((low <= (new := random.standard_t(3, size=20))) & (new <= high)))
    exact = conformal_rank(num_rows, coverage) / (num_rows + 1)
    assert abs(np.mean(inside) - exact) < 5 * np.std(inside) / 20 + 1e-9


def test_fold_models_that_disagree_widen_an_interval():
    errors, fold_of = np.full(50, 0.1), np.arange(50) % 5
    low, high = cv_plus(np.array([[0.0, 0.0]] * 4 + [[0.0, 9.0]]), fold_of, errors, 0.9)
    assert (high - low)[1] > (high - low)[0] == pytest.approx(0.2)


def test_too_few_rows_for_a_coverage_are_one_line():
    with pytest.raises(UserError, match=r"--coverage 0.99: needs 99 rows, the predictor has 20"):
        cv_plus(np.zeros((5, 1)), np.arange(20) % 5, np.ones(20), 0.99)


def test_a_saved_predictor_says_the_same(tmp_path):
    predictor, _ = fitted()
    path = predictor.save(tmp_path)
    again = load_predictor(tmp_path)
    table = make_table(30, seed=9)
    table.loc[3, "base_model_perplexity"] = None
    pd.testing.assert_frame_equal(again.predict(table), predictor.predict(table), check_exact=True)
    assert np.array_equal(again.draw(table, 50, 1), predictor.draw(table, 50, 1))
    assert again.card == predictor.card
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".pkl", ".pickle"))]


def test_null_features_and_values_beyond_those_seen():
    predictor, _ = fitted()
    table = make_table(5, seed=3)
    table["base_model_perplexity"] = [1e9, None, np.inf, 5.0, 6.0]
    table["approximate_duplicates"] = 0.5
    table["loss_stability"] = 0.0
    table["semantic_diversity"] = 0.0
    found = predictor.predict(table)
    made_up = [False, True, True, False, False]
    assert (found[["prediction", "low", "high"]].isna().to_numpy() == np.array(made_up)[:, None]).all()
    unmeasured = "not measured: base_model_perplexity"
    assert list(found["outside"]) == ["base_model_perplexity", unmeasured, unmeasured, "", ""]
    assert found["prediction"].dropna().between(0, 1).all()
    with pytest.raises(UserError, match="5 of 5 rows have no prediction: set_0 lacks base_model_perplexity"):
        predictor.predict(table.assign(base_model_perplexity=None))
    ranking = rank(predictor, table.assign(experiment_id=table["dataset"], error=""), None, None, 0)
    assert ranking["error"].str.startswith("not measured").tolist() == [False] * 3 + [True] * 2


@pytest.mark.slow
def test_what_was_null_in_the_fit_may_be_null():
    seen = make_table(60, seed=1)
    seen.loc[::4, "base_model_perplexity"] = None
    predictor, _ = fit_predictor(known_from_table(seen, "overall_accuracy"), "overall_accuracy", explain=False)
    table = make_table(4, seed=3).assign(base_model_perplexity=None)
    assert predictor.predict(table)["prediction"].notna().all()


def test_an_interval_holds_its_prediction_at_any_level():
    predictor, _ = fitted()
    for coverage in (0.05, 0.3, 0.5):
        found = predictor.predict(make_table(50, seed=4), coverage)
        assert (found["low"] <= found["prediction"]).all()
        assert (found["prediction"] <= found["high"]).all()


def test_a_hostile_predictor_is_refused_before_it_runs(tmp_path):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (marker,))

    evil = tmp_path / "evil.skops"
    skops.io.dump({"format": 1, "card": {}, "model": subprocess.Popen, "more": print}, evil)
    with pytest.raises(UserError, match=r"evil.skops: holds types that no predictor needs.*Popen"):
        load_predictor(evil)
    import pickle

    evil.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match="no predictor that scikit-learn"):
        load_predictor(evil)
    assert not marker.exists()


@pytest.mark.slow
def test_trees_that_point_outside_themselves_are_refused(tmp_path):
    """Prediction follows node numbers without a check: a wild one would read memory that is not the tree's."""
    predictor, _ = fitted()
    path = predictor.save(tmp_path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert any(trees_of(model) for model in (predictor.model, *predictor.fold_models))
    spoiled = 0
    for name, data in parts.items():
        if name.endswith(".npy") and b"left_child" in data[:600]:
            nodes = np.lib.format.read_array(__import__("io").BytesIO(data))
            if len(nodes) > 1:
                nodes["left_child"][0] = 10**7
                buffer = __import__("io").BytesIO()
                np.save(buffer, nodes)
                parts[name], spoiled = buffer.getvalue(), spoiled + 1
    assert spoiled
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match="point outside"):
        load_predictor(path)


def test_a_predictor_whose_parts_do_not_fit_is_refused(tmp_path):
    predictor, _ = fitted()
    novelty = vars(predictor.novelty)
    small = DummyRegressor().fit([[0]], [0.4])  # a forest takes seconds to write and check
    changes = [
        {"format": 99},
        {"residuals": predictor.residuals[:3]},
        {"fold_of": predictor.fold_of + 9},
        {"novelty": None},
        {"novelty": {**novelty, "precision": novelty["precision"][:2]}},
        {"novelty": {**novelty, "threshold": "far"}},
        {"card": {key: value for key, value in predictor.card.items() if key != "verdict"}},
    ]
    for change in changes:  # (without any, the file is good: the last line)
        models = {"model": small, "fold_models": [small] * len(predictor.fold_models)}
        content = {"format": 2, **vars(predictor), "novelty": novelty, **models, **change}
        skops.io.dump(content, tmp_path / "x.skops")
        assert set(skops.io.get_untrusted_types(file=tmp_path / "x.skops")) <= set(TRUSTED_TYPES)
        with pytest.raises(UserError, match=r"x.skops: no predictor that scikit-learn"):
            load_predictor(tmp_path / "x.skops")
    skops.io.dump({"format": 2, **vars(predictor), "novelty": novelty, **models}, tmp_path / "x.skops")
    assert load_predictor(tmp_path / "x.skops").is_better_than_mean


def test_a_predictor_of_an_older_version_is_refused_in_one_line(tmp_path):
    skops.io.dump({"format": 1, "card": {}}, tmp_path / "old.skops")
    with pytest.raises(UserError, match=r"old.skops: fitted by an older raylora, which kept no verdict; fit it again"):
        load_predictor(tmp_path / "old.skops")


def test_where_nothing_is_known_every_prediction_is_the_mean_and_says_so(tmp_path):
    predictor, held_out = fitted_to_noise()
    assert predictor.verdict.startswith("No better than guessing the mean, which every prediction therefore is: RMSE")
    predictor.save(tmp_path)
    again = load_predictor(tmp_path)
    new = pd.concat([make_noise(200, seed) for seed in range(5)], ignore_index=True)
    found = again.predict(new)
    assert found["prediction"].unique() == pytest.approx([held_out["measured"].mean()])
    assert 0.85 < new["overall_accuracy"].between(found["low"], found["high"]).mean() < 0.99
    assert (found["outside"] == "").all()
    pd.testing.assert_frame_equal(again.predict(new[["dataset"]]), found)  # it needs no feature, and no probe
    assert not again.card["needs_probe"]


@pytest.mark.parametrize(("coverage", "needed"), [(0.9, 9), (0.8, 4), (0.5, 1), (0.95, 19), (0.99, 99)])
def test_the_fewest_rows_that_give_an_interval(coverage, needed):
    """1 / (1 - 0.9) - 1 is 9.000000000000002 in floats: nine rows were too few."""
    assert is_too_few(needed - 1, coverage)
    assert not is_too_few(needed, coverage)
