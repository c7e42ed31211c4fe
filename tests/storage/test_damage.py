"""One line for each damaged product, and for what has taken the place of one."""

from __future__ import annotations

import json

import pytest

from raylora.errors import UserError
from raylora.records import ResultRow
from raylora.storage.damage import check_adapter_of_run, check_places, damage_told, note_damaged, read_sealed
from raylora.storage.digests import seal
from raylora.storage.store import Store
from tests.helpers.damages import CONTENT, PLACE, remove
from tests.helpers.pool import make_experiment

FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "loss_curve.csv")


@pytest.fixture
def told():
    lines: list[str] = []
    with damage_told(lines.append):
        yield lines


@pytest.fixture
def trained(tmp_path):
    """A store with an experiment that has a row and a finished training."""
    store, one = Store(tmp_path / "run"), make_experiment("one")
    for name in FILES:
        path = store.folder(one) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"what a training makes: {list(range(20))}")
    store.write_stage(one, "train", {"train_loss": 1.25, "steps": list(range(20))})
    store.write_row(one, ResultRow({"dataset": "one", "experiment_id": "one", "status": "ok", "accuracy": 0.25}))
    return store, one


@pytest.mark.parametrize("damage", CONTENT)
@pytest.mark.parametrize("name", ["result.json", "train.json", *FILES])
def test_what_is_damaged_is_not_there_and_said_once(trained, told, name, damage):
    store, one = trained
    path = store.folder(one) / name
    CONTENT[damage](path)
    for _ in range(3):
        is_row = name == "result.json"
        assert (store.read_row(one) is None) == (store.read_rows([one]) == {}) == is_row
        assert (store.read_stage(one, "train") is None) != is_row
    assert told == [f"{path}: damaged: it is made again"]
    if name in FILES and damage != "empty":
        assert store.why_not_done(one, "train") == f"{name} damaged"


def test_what_an_older_version_wrote_is_taken(trained, told):
    store, one = trained
    row = {"dataset": "one", "experiment_id": "one", "status": "ok"}
    (store.folder(one) / "result.json").write_text(json.dumps({"identity": one.identity, "row": row}))
    assert store.read_row(one) == ResultRow(row)
    (store.folder(one) / "result.json").write_text(json.dumps({"identity": one.identity, "row": {"statts": "ok"}}))
    assert store.read_row(one) is None
    curve = store.folder(one) / "loss_curve.csv"
    for values in ({"train_loss": 1.25}, None):
        (store.folder(one) / "features.json").write_text(
            json.dumps({"origin": one.origins["features"], "values": values})
        )
        assert store.read_stage(one, "features") == values
    assert curve.is_file()
    assert told == []


def test_who_deletes_an_adapter_keeps_the_row(trained, told):
    store, one = trained
    (store.folder(one) / FILES[1]).unlink()
    assert not store.is_damaged(one, "train")
    (store.folder(one) / FILES[0]).write_text("other")
    assert store.is_damaged(one, "train")
    assert len(told) == 1


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("name", ["result.json", "train.json", *FILES, "adapter", "../../base/ab/scores.parquet"])
def test_what_has_taken_a_product_s_place_is_one_line(trained, name, place):
    store, one = trained
    base = store.base_file("ab", "scores.parquet")
    base.parent.mkdir(parents=True)
    base.write_text("x")
    with store.held(False):
        pass
    if (name, place) == ("adapter", "make_folder"):
        remove(store.folder(one) / name)
        (store.folder(one) / name).write_text("a file")
    else:
        PLACE[place](store.folder(one) / name)
    with pytest.raises(UserError, match="where a f") as raised, store.held(False):
        pass
    assert str((store.folder(one) / name).resolve().parent) in str(raised.value) or place == "make_link"
    assert "\n" not in str(raised.value)


def test_a_table_s_place_and_an_experiment_s_folder(tmp_path):
    (tmp_path / "results.csv").mkdir()
    with pytest.raises(UserError, match=r"results\.csv: a folder, where a file belongs"):
        check_places(tmp_path)
    (tmp_path / "results.csv").rmdir()
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / ".DS_Store").write_text("a stray file")
    (tmp_path / "my notes").mkdir()
    check_places(tmp_path)
    (tmp_path / "experiments" / "data-0123456789ab").write_text("no folder")
    with pytest.raises(UserError, match="data-0123456789ab: no folder, where one belongs"):
        check_places(tmp_path)


def test_a_terminal_that_is_gone_costs_a_line_alone():
    def tell(line: str) -> None:
        raise BrokenPipeError

    with damage_told(tell):
        note_damaged("somewhere", "for the first time")


def test_json_that_is_not_there_is_no_damage(tmp_path, told):
    assert read_sealed(tmp_path / "gone.json") is None
    assert read_sealed(tmp_path) is None
    assert told == []
    (tmp_path / "a.json").write_text(seal({"x": 1}))
    assert read_sealed(tmp_path / "a.json") == {"x": 1}


def test_an_adapter_of_a_run_is_what_it_wrote(trained):
    store, one = trained
    check_adapter_of_run(store.adapter_folder(one))
    (store.folder(one) / FILES[1]).write_text("other")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: damaged: remove .*result\.json and run"):
        check_adapter_of_run(store.adapter_folder(one))
    (store.folder(one) / "train.json").unlink()
    check_adapter_of_run(store.adapter_folder(one))
