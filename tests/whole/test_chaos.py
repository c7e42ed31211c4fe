"""benchmarks/chaos.py: a slice of its faults over the real command, and whether it would see what it looks for."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks import chaos
from tests.helpers.fault_runs import DATASETS

NUM_FAULTS = 30


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(2400)
def test_thirty_faults_lose_double_and_change_no_row(tmp_path, capsys):
    code = chaos.main(["--faults", str(NUM_FAULTS), "--seed", "21", "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert "0 lost, 0 doubled, 0 changed, 0 reads of a torn table, 0 wrong ends, 0 times something left behind" in shown
    rounds = chaos.Campaign(tmp_path, 21).rounds()
    assert sum(len(r.faults) for r in rounds) >= NUM_FAULTS
    assert all(r.num_rows == len(DATASETS) for r in rounds)
    assert chaos.main(["--faults", str(NUM_FAULTS), "--seed", "21", "--folder", str(tmp_path)]) == 0
    assert len(chaos.Campaign(tmp_path, 21).rounds()) == len(rounds), "what is done is not done again"


def table_of(**changes) -> pd.DataFrame:
    row = {"dataset": "data_00", "status": "ok", "error": None, "error_kind": None, "overall_accuracy": 0.25}
    return pd.DataFrame([{**row, **changes}])


def test_a_doubled_a_changed_and_a_wrongly_failed_row_are_seen():
    reference = chaos.rows_of(table_of())
    assert chaos.check_table("results.parquet", table_of(), reference) == []
    (found,) = chaos.check_table("results.parquet", table_of(overall_accuracy=0.26), reference)
    assert found.startswith("changed: results.parquet: data_00: ")
    doubled = pd.concat([table_of(), table_of()])
    assert chaos.check_table("results.csv", doubled, reference) == ["doubled: results.csv: data_00"]
    (found,) = chaos.check_table("results.parquet", table_of(status="error", error="x", error_kind="data"), reference)
    assert found == "error row: data_00: data: x"
    killed = table_of(status="error", error="x", error_kind="worker_died")
    assert chaos.check_table("results.parquet", killed, reference) == []


def test_a_round_counts_by_what_was_struck_and_what_did_not_hold():
    bad = chaos.Round(1, 0, "disk", [{"name": "disk full", "what": "", "exit": 1}], ["lost: results.csv: data_03"])
    good = chaos.Round(1, 1, "disk", [{"name": "disk full", "what": "", "exit": 1}], num_rows=12, num_polls=40)
    text = chaos.counts([bad, good])
    assert "| disk full | 2 | 1: 2 |" in text
    assert "1 lost, 0 doubled" in text
    assert "40 reads of a table, 12 rows in the end" in text
