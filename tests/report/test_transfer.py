"""What is said of every adapter on every dataset's held-out examples: the tables, the page's figures, the sentence."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy.stats import false_discovery_control

from raylora import load_transfer
from raylora.errors import UserError
from raylora.report.page import page_data, write_report
from raylora.report.read_run import load_run
from raylora.report.terminal import print_results
from raylora.report.transfer import transfer
from raylora.report.transfer_tables import COLUMNS, TransferTables
from raylora.storage.store import Store
from tests.helpers.runs import dataset_names, write_run, write_transfer

SIZES = {"anatomy": 20, "virology": 20}


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    root = tmp_path_factory.mktemp("transfer") / "chunk"
    rows = write_run(root, dataset_names(8), sizes=SIZES, num_failed=1)
    write_transfer(root, rows)
    return root, rows


def test_all_cells_are_adjusted_together(eight):
    root, _ = eight
    cells = load_transfer(root)
    assert list(cells.columns) == COLUMNS
    assert len(cells) == 49
    assert cells["fdr_p_value"].to_numpy() == pytest.approx(false_discovery_control(cells["p_value"]))
    smallest = cells.loc[cells["p_value"].idxmin()]
    assert smallest["holm_p_value"] == pytest.approx(49 * smallest["p_value"])
    pd.testing.assert_frame_equal(pd.read_csv(root / "transfer.csv"), cells, check_dtype=False, rtol=1e-9)
    table = pd.read_csv(root / "transfer_table.csv", index_col=["dataset", "experiment_id"])
    long = cells.set_index(["dataset", "experiment_id", "on_dataset"])["loss_change"]
    assert table.stack().to_numpy() == pytest.approx(long.sort_index().to_numpy())


def test_the_page_has_it_in_the_order_of_the_ranking(eight):
    root, _ = eight
    run = load_run(root)
    found = transfer(run)
    changes = run.numbers("accuracy_change")[found["rows"]]
    assert changes.is_monotonic_decreasing
    assert found["columns"] == [run.labels[row] for row in found["rows"]], "each beside its own"
    assert found["own"] == list(range(7))
    cells = load_transfer(root).set_index(["dataset", "on_dataset"])
    row, column = found["rows"][2], found["columns"][4]
    cell = cells.loc[(run.labels[row], column)]
    assert found["change"][2][4] == pytest.approx(cell["loss_change"], rel=1e-3)
    assert found["fdr"][2][4] == pytest.approx(cell["fdr_p_value"], rel=1e-3)
    others = cells[~cells["is_own"]]
    real = others[others["fdr_p_value"] < 0.05]
    assert found["num_cells"] == 42
    assert found["num_forgotten"] == (real["loss_change"] > 0).sum() > 0
    assert found["num_helped"] == (real["loss_change"] < 0).sum() > 0
    best, worst = real["loss_change"].idxmin(), real["loss_change"].idxmax()
    assert f"Helped most: {best[1]} by the adapter of {best[0]} (" in found["sentence"]
    assert f"; forgotten most: {worst[1]} by the adapter of {worst[0]} (" in found["sentence"]
    assert page_data(run, None)["transfer"]["sentence"] == found["sentence"]


def test_the_terminal_says_the_sentence(eight):
    root, rows = eight
    console = Console(width=100, file=io.StringIO(), record=True)
    print_results(rows, Store(root), console)
    text = console.export_text()
    assert transfer(load_run(root))["sentence"] in text
    assert "transfer_table.csv" in text


def test_nothing_real_is_said_to_be_nothing(tmp_path):
    rows = write_run(tmp_path / "chunk", ["a", "b"], sizes=SIZES)
    write_transfer(tmp_path / "chunk", rows, num_examples=2)
    found = transfer(load_run(tmp_path / "chunk"))
    assert (
        found["sentence"] == "No adapter significantly helps with another dataset, and none is significantly forgotten."
    )
    assert (found["num_helped"], found["num_forgotten"]) == (0, 0)


def test_of_many_the_greatest_are_shown(eight, tmp_path, monkeypatch):
    monkeypatch.setattr("raylora.report.transfer.MOST_SHOWN", 4)
    root = tmp_path / "chunk"
    shutil.copytree(eight[0], root)
    run, cells = load_run(root), pd.read_parquet(root / "transfer.parquet")
    quiet = cells[["dataset", "on_dataset"]].isin([run.labels[0], run.labels[3], run.labels[5]]).any(axis=1)
    cells.assign(loss_change=cells["loss_change"].mask(quiet, 1e-3)).to_parquet(root / "transfer.parquet")
    found = transfer(run)
    assert sorted(found["rows"]) == [1, 2, 4, 6]
    assert sorted(found["columns"]) == sorted(run.labels[row] for row in found["rows"])
    assert (found["num_rows"], found["num_columns"], found["num_cells"]) == (7, 7, 42)
    assert np.array(found["change"], dtype=float).shape == (4, 4)
    assert None not in found["own"]


@pytest.mark.parametrize("spoil", ["missing", "cut", "foreign", "other ids"])
def test_a_table_that_is_not_there_or_another_one_leaves_the_section_out(eight, tmp_path, spoil):
    rows = write_run(tmp_path / "chunk", ["a", "b"], sizes=SIZES)
    path = tmp_path / "chunk" / "transfer.parquet"
    source = eight[0] / "transfer.parquet"
    if spoil == "cut":
        path.write_bytes(source.read_bytes()[:100])
    elif spoil == "foreign":
        pd.DataFrame({"x": [1]}).to_parquet(path)
    elif spoil == "other ids":
        path.write_bytes(source.read_bytes())
    assert transfer(load_run(tmp_path / "chunk")) is None
    write_report(tmp_path / "chunk")
    assert 'id="transfer"' not in (tmp_path / "chunk" / "report.html").read_text()
    assert len(rows) == 2


def test_an_experiment_whose_cells_are_lost_has_none(eight, tmp_path):
    rows = write_run(tmp_path / "chunk", ["a", "b"], sizes=SIZES)
    write_transfer(tmp_path / "chunk", rows)
    store = Store(tmp_path / "chunk")
    store.cells_path(rows[0].values["experiment_id"]).write_bytes(b"PAR1 and no more")
    TransferTables(store).write(rows)
    assert set(load_transfer(store.root)["dataset"]) == {"b"}
    store.cells_path(rows[1].values["experiment_id"]).unlink()
    TransferTables(store).write(rows)
    assert load_transfer(store.root).empty
    with pytest.raises(UserError, match="give the folder of a run with --transfer"):
        load_transfer(tmp_path)
