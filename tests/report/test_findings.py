"""What the report's figures say, as numbers."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test, spearmanr

from raylora.errors import ErrorKind
from raylora.mmlu.power import power_line
from raylora.mmlu.statistics import compare, compare_subjects
from raylora.records import Score
from raylora.report import findings
from raylora.report.page import page_data
from raylora.report.power import power_of_run
from raylora.report.read_run import load_run
from tests.helpers import ROOT
from tests.helpers.runs import make_score, write_run


def test_a_subjects_p_values_are_those_of_mmlu():
    sizes = {"anatomy": 40, "virology": 25, "philosophy": 60, "sociology": 1}
    base = make_score(1, sizes, None, 0.0)
    score = make_score(2, sizes, base, 0.4)
    expected = compare_subjects(score, base).set_index("subject")
    names, codes = np.unique(base.questions["subject"], return_inverse=True)
    letters = np.unique(base.questions["answer"], return_inverse=True)[1]
    ours, theirs = (s.questions["correct"].to_numpy() for s in (score, base))
    found = findings.correct_by_subject(ours, theirs, codes, letters)
    for k, name in enumerate(names):
        assert found["gained"][k] == expected.loc[name, "num_gained"]
        assert found["lost"][k] == expected.loc[name, "num_lost"]
        assert found["holm"][k] == pytest.approx(expected.loc[name, "holm_p_value"], rel=1e-9)
        assert found["verdicts"][k] == expected.loc[name, "verdict"]
    assert expected["num_gained"].sum() > expected["num_lost"].sum()


def test_changes_are_marked_over_all_datasets_together(forty):
    run = load_run(forty)
    found = findings.ranking(run)
    raw = run.table["mcnemar_p_value"].dropna().sort_values()
    assert len(found["rows"]) == 37
    first = raw.index[0]
    assert found["holm"][first] == pytest.approx(min(1.0, 37 * raw.iloc[0]))
    marked = [i for i in found["rows"] if found["holm"][i] < 0.05]
    decided = {i: v for i, v in enumerate(found["verdicts"]) if v != "undecided"}
    assert set(decided) <= set(marked)
    assert len(decided) == found["num_gains"] + found["num_losses"] + found["num_letters"]
    assert len(marked) <= found["num_raw"]
    assert all(v != "gain" or run.table["balanced_accuracy_change_low"][i] > 0 for i, v in decided.items())


def test_false_discovery_and_shrunk_changes_stand_beside_holm(forty):
    run = load_run(forty)
    found = findings.ranking(run)
    good, holm_p_values = found["rows"], np.array(found["holm"])
    fdr, estimates = np.array(found["fdr"]), np.array(found["accuracy_change_shrunk"])
    assert (fdr[good] <= holm_p_values[good] + 1e-12).all()
    assert found["num_fdr"] >= found["num_gains"] + found["num_losses"]
    changes = run.numbers("accuracy_change").to_numpy()
    assert np.isnan(np.delete(estimates, good)).all()
    assert estimates[good].max() < changes[good].max()
    assert estimates[good].min() > changes[good].min()


def test_the_page_says_what_its_questions_can_show(forty, tmp_path):
    run = load_run(forty)
    ranked = findings.ranking(run)
    differing = (run.numbers("num_gained") + run.numbers("num_lost")) / run.numbers("total_questions")
    line = power_of_run(run, ranked)
    assert line == power_line(int(run.numbers("total_questions")[ranked["rows"][0]]), 37, differing.median())
    assert "as measured" in line
    for name in ("num_gained", "num_lost", "overall_stderr_clustered", "base_overall_stderr_clustered"):
        del run.table[name]  # as rows of an older raylora are
    assert "an assumed 15%" in power_of_run(run, ranked)
    write_run(tmp_path / "chunk", ["a"], stages=("features", "train"))
    without = load_run(tmp_path / "chunk")
    assert power_of_run(without, findings.ranking(without)) is None


def test_a_row_of_an_older_raylora_is_judged_by_its_p_value(forty):
    run = load_run(forty)
    found = findings.ranking(run)
    for name in ("", "_low", "_high"):
        del run.table[f"balanced_accuracy_change{name}"]
    older = findings.ranking(run)
    assert older["num_letters"] == 0
    assert older["num_gains"] + older["num_losses"] == np.sum(np.array(found["holm"]) < 0.05)
    assert findings.favourite_letters(run, older) == {}


def test_a_favourite_letter_that_moved_is_said_with_its_shares(letters_run):
    run = load_run(letters_run)
    found = findings.ranking(run)
    assert [found["verdicts"][i] for i in (0, 1)] == ["letter", "gain"]
    texts = findings.favourite_letters(run, found)
    assert list(texts) == [0]
    wanted = "its favourite letter moved: A 100% to 0%, B 0% to 0%, C 0% to 0%, D 0% to 100% of its answers; "
    assert re.fullmatch(re.escape(wanted) + r"balanced accuracy [+-]0\.0 points, -\d\.\d to \+\d\.\d", texts[0])
    assert findings.oddities(run, found)[0] == {"row": 0, "what": texts[0]}
    by_subject = findings.subjects(run)["rows"]
    assert set(by_subject[0]["verdicts"]) == {"letter"}
    assert set(by_subject[1]["verdicts"]) == {"gain"}
    assert all(np.isnan(found["holm"][i]) for i in np.flatnonzero(~run.ok))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=4, max_size=6))
def test_few_datasets_have_an_exact_p_value(pairs):
    x, y = np.array(pairs, dtype=float).T
    rho, p_value = findings.spearman(x, y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert rho is None
        assert p_value is None
        return
    exact = permutation_test(
        (x,), lambda a: spearmanr(a, y).statistic, permutation_type="pairings", n_resamples=10_000, vectorized=False
    )
    # Two-sided there: twice the smaller tail. Here: all orders as far from zero; the same where the null is symmetric.
    orders = exact.null_distribution
    assert p_value == pytest.approx((np.abs(orders) >= abs(rho) - 1e-9).mean())
    assert rho == pytest.approx(spearmanr(x, y).statistic)


def test_features_that_have_to_do_with_the_change_are_found(forty):
    found = findings.features(load_run(forty))
    by_name = {f["name"]: f for f in found["columns"]}
    assert by_name["approximate_duplicates"]["rho"] < -0.4
    assert by_name["approximate_duplicates"]["q_value"] < 0.05
    assert found["num_datasets"] == 37
    assert found["num_expected"] == pytest.approx(0.05 * found["num_tested"])
    assert found["num_adjusted"] <= found["num_raw"] < found["num_tested"]
    assert all(f["q_value"] >= f["p_value"] for f in found["columns"] if f["p_value"] is not None)


def test_experiments_of_one_dataset_are_named_by_what_varies_and_count_once(tmp_path):
    write_run(tmp_path / "grid", ["one", "two", "three", "four", "five"], grid={"lora_r": [8, 16], "num_epochs": [1]})
    run = load_run(tmp_path / "grid")
    assert sorted(run.labels)[:2] == ["five · lora_r 16", "five · lora_r 8"]
    assert len(set(run.labels)) == 10
    found = findings.features(run)
    assert found["grouped"]
    assert {f["num"] for f in found["columns"]} == {5}


def test_scores_of_another_run_are_left_out(forty, tmp_path):
    root = shutil.copytree(forty, tmp_path / "chunk_042")
    run = load_run(root)
    assert findings.subjects(run)["num_left_out"] == 0
    folder = run.folder(0)
    shutil.copy(run.folder(1) / "scores.parquet", folder / "scores.parquet")
    (run.folder(2) / "scores.parquet").write_bytes(b"no parquet")
    (run.folder(3) / "scores.parquet").unlink()
    found = findings.subjects(run)
    assert found["num_left_out"] == 3
    assert not {0, 2, 3} & set(found["rows"])
    row = found["rows"][5]
    sizes = np.array(found["sizes"])
    change = (np.array(row["gained"]) - np.array(row["lost"])).sum() / sizes.sum()
    assert change == pytest.approx(run.table["accuracy_change"][5])


def test_of_several_bases_the_runs_own_is_taken(tmp_path):
    root = tmp_path / "run"
    write_run(root, ["one"])
    run = load_run(root)
    (key,) = [p.name for p in (root / "base").iterdir()]
    shutil.copytree(root / "base" / key, root / "base" / ("0" * 64))
    assert findings.subjects(run)["rows"]
    (root / "run.json").unlink()
    assert findings.subjects(load_run(root)) is None, "two bases fit, and nothing says which one it was"


def test_every_failure_has_a_cause_and_the_fix_of_its_kind(forty):
    run = load_run(forty)
    found = findings.failures(run)
    assert len(found) == 3
    kinds = run.table["error_kind"].dropna()
    assert {f["row"]: f["fix"] for f in found} == {row: findings.FIXES[kind] for row, kind in kinds.items()}
    assert len(set(kinds)) == 3
    run.table["error"] = "the loss became nan, out of memory, not UTF-8"
    assert findings.failures(run)[0]["fix"] == found[0]["fix"], "a text decides nothing"


def test_a_row_of_an_older_raylora_has_the_fix_of_what_is_not_known(forty):
    run = load_run(forty)
    del run.table["error_kind"]
    assert {f["fix"] for f in findings.failures(run)} == {findings.FIXES[ErrorKind.UNKNOWN]}
    assert all(f["cause"] for f in findings.failures(run))


def test_costs_name_the_gpus_that_were_used_and_the_runs_own_price(forty, tmp_path):
    run = load_run(forty)
    assert page_data(run, None)["price"] is None
    here = findings.costs(run)["gpus"]
    run.table["device"] = ["NVIDIA A100"] * 3 + ["cpu"] * (len(run.table) - 3)
    assert findings.costs(run)["gpus"] == ["NVIDIA A100"] != here
    run.manifest["configuration"]["price"] = 2.5
    assert page_data(run, None)["price"] == 2.5
    assert page_data(run, 4.0)["price"] == 4.0


def test_the_fixes_of_the_page_are_those_of_the_documentation():
    """Kind by kind: every option that the documentation tells to use, the page tells too."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = text.partition("## In the row of a dataset")[2].partition("\n## ")[0].partition("| --- |")[2]
    wanted: dict[str, set[str]] = {}
    for row in table.strip().splitlines()[1:]:
        _, kind, _, fix = (cell.strip() for cell in row.strip("|").split(" | "))
        words = {word for word in re.findall(r"`([^`]+)`", fix) if "train,mmlu" not in word}
        wanted.setdefault(kind.strip("`"), set()).update(words)
    assert set(wanted) == set(findings.FIXES)
    for kind, words in wanted.items():
        assert [word for word in words if word not in findings.FIXES[ErrorKind(kind)]] == [], kind


def test_notes_on_training_and_features_are_worth_a_look(forty, tmp_path):
    run = load_run(shutil.copytree(forty, tmp_path / "run"))
    row = int(np.flatnonzero(run.ok)[0])
    notes = {
        "train_notes": "the adapter is the base",
        "feature_notes": "gradient_consistency: below 100 examples it depends",
    }
    for name, text in notes.items():
        run.table[name] = ["" if i != row else text for i in range(len(run.table))]
    found = [entry["what"] for entry in findings.oddities(run, findings.ranking(run)) if entry["row"] == row]
    assert notes["train_notes"] in found
    assert f"features: {notes['feature_notes']}" in found


def test_every_kind_that_a_row_can_have_has_a_fix():
    assert set(ErrorKind) - set(findings.FIXES) == {ErrorKind.STORAGE, ErrorKind.CLUSTER, ErrorKind.STOPPED}


def test_two_scores_are_compared_as_a_run_compares_them():
    """The helper that writes these runs makes real differences: the paired test sees them."""
    sizes = {"anatomy": 300, "virology": 300}
    base = make_score(1, sizes, None, 0.0)
    up, same = make_score(2, sizes, base, 0.12), Score(base.questions)
    assert compare(up, base)["mcnemar_p_value"] < 0.05
    assert compare(same, base)["difference"] == 0
