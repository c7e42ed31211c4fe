"""``python -m raylora.features``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from raylora.commands.features import CSV_COLUMNS
from raylora.commands.run_command import run_command
from raylora.features.columns import describe_columns
from raylora.rows import FEATURE_NAMES
from tests.helpers import ROOT
from tests.helpers.feature_rows import make_records


def call_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "raylora.features", *arguments], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
@pytest.mark.ci
def test_the_command_measures_a_folder_and_goes_on_where_it_was(tiny_model_folder, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        (folder / f"set_{i}.json").write_text(json.dumps(make_records(8, seed=i)))
    (folder / "broken.json").write_text("[{")
    csv = tmp_path / "features.csv"
    arguments = [
        "--data_folder", str(folder), "--model_path", str(tiny_model_folder), "--output_csv", str(csv),
        "--sample_size", "6", "--batch_size", "1", "--probe-steps", "2", "--quantization", "none",
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    first = call_command(*arguments)
    assert first.returncode == 1, first.stdout + first.stderr
    table = pd.read_csv(csv)
    assert list(table["dataset"]) == ["broken", "set_0", "set_1", "set_2"]
    assert list(table["status"]) == ["error", "ok", "ok", "ok"]
    assert set(FEATURE_NAMES) <= set(table.columns)
    assert table.loc[1:, "avg_param_change"].gt(0).all()
    assert "3 of 4 datasets measured" in first.stdout
    again = call_command(*arguments)
    assert again.returncode == 1
    pd.testing.assert_frame_equal(pd.read_csv(csv), table)
    assert "worker" not in again.stdout, "finished datasets were measured again"
    single = call_command("--single_dataset", str(folder / "set_1.json"), *arguments[2:])
    assert single.returncode == 0, single.stdout + single.stderr
    alone, among = pd.read_csv(csv).iloc[0], table.iloc[2]
    for name in FEATURE_NAMES:
        expected = among[name] if isinstance(among[name], str) else pytest.approx(among[name], rel=1e-4, nan_ok=True)
        assert alone[name] == expected, name


@pytest.mark.slow
def test_the_csv_grows_and_a_stopped_run_goes_on_where_it_was(tiny_model_folder, tmp_path):
    """Ctrl-C after the first rows, in a run of the first eight files of nine."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(9):
        (folder / f"set_{i}.json").write_text(json.dumps(make_records(40, seed=i)))
    csv = tmp_path / "deep" / "features.csv"
    arguments = [
        "--data_folder", str(folder), "--model_path", str(tiny_model_folder), "--output_csv", str(csv), "--limit", "8",
        "--sample_size", "40", "--probe_steps", "8", "--quantization", "none", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "raylora.features", *arguments], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not csv.is_file() or pd.read_csv(csv).empty:
            assert process.poll() is None, "it was done before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
    early = pd.read_csv(csv)
    assert 1 <= len(early) < 8
    result = call_command(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    table = pd.read_csv(csv)
    assert list(table["dataset"]) == [f"set_{i}" for i in range(8)]
    kept = table[table["dataset"].isin(early["dataset"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, early, check_dtype=False)


@pytest.mark.slow
@pytest.mark.ci
def test_the_command_describes_every_column():
    described = call_command("--describe")
    assert described.returncode == 0
    assert len(CSV_COLUMNS) == len(set(CSV_COLUMNS)), "a column of the CSV is there twice"
    assert all(f"| `{name}` |" in described.stdout for name in CSV_COLUMNS), "a column of the CSV is not described"
    page = (ROOT / "docs" / "columns.md").read_text()
    assert describe_columns() in page, "the page's table is older than the columns"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data_folder", "nowhere", "--model_path", "x"], "nowhere: no such folder"),
        (["--sample_size", "-1"], "--sample-size"),
        (["--sampl_size", "3"], "did you mean"),
    ],
)
def test_wrong_use_of_the_command_is_one_line(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command("features", arguments)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert expected in told
    assert len(told.strip().splitlines()) == 1
