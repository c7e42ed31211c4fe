"""Where a model comes from, and the hash that it is known by."""

from __future__ import annotations

import shutil

import pytest

from raylora.errors import MachineError, UserError
from raylora.model import sources
from raylora.model.sources import model_hash, resolve_model
from tests.helpers.damages import CONTENT, PLACE


def test_no_model_and_wrong_models_are_one_line(tmp_path):
    for name, expected in {
        None: "MODEL_NAME",
        "": "--model demo",
        str(tmp_path / "missing"): "no such folder",
        str(tmp_path): "config.json",
        str(tmp_path / "a.gguf"): "no such file",
        "modelscope://org/model": "raylora[modelscope]",
        "../up": "no such folder",
    }.items():
        with pytest.raises(UserError) as raised:
            resolve_model(name)
        assert expected in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_hub_name_that_cannot_be_had_is_one_line():
    with pytest.raises(UserError, match="not loaded from the hub") as raised:
        model_hash(resolve_model("nobody/nothing"))
    assert "\n" not in str(raised.value)


def test_the_hash_of_a_model_follows_its_files_and_not_its_place(tmp_path, tiny_model_folder):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "moved")
    assert model_hash(str(folder)) == model_hash(str(tiny_model_folder))
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    for place in (len(raw) // 2, len(raw) - 1):
        weights.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert model_hash(str(folder)) != model_hash(str(tiny_model_folder))
    weights.write_bytes(raw)
    assert model_hash(str(folder)) == model_hash(str(tiny_model_folder))
    (folder / "modeling_own.py").write_text("own = 1")
    assert model_hash(str(folder)) != model_hash(str(tiny_model_folder))


def test_a_cache_without_room_costs_no_hash_and_is_named_where_it_is_needed(tmp_path, tiny_model_folder, monkeypatch):
    before = model_hash(str(tiny_model_folder))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("raylora.model.sources.REMEMBERED_BYTES", 0)
    assert model_hash(str(tiny_model_folder)) == before
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        MachineError, match=f"^{tmp_path / 'file'}: cannot keep the converted model here: .*RAYLORA_CACHE"
    ):
        resolve_model(str(tmp_path / "a.gguf"))


def test_the_hash_of_a_large_file_is_remembered_until_it_changes(tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "REMEMBERED_BYTES", 1000)
    expected = model_hash(str(tiny_model_folder))
    known = list((tmp_path / "cache" / "hashes").iterdir())
    assert known
    assert model_hash(str(tiny_model_folder)) == expected
    for damage in CONTENT.values():
        damage(known[0])
        assert model_hash(str(tiny_model_folder)) == expected
    PLACE["make_folder"](known[0])
    assert model_hash(str(tiny_model_folder)) == expected
    folder = shutil.copytree(tiny_model_folder, tmp_path / "moved")
    assert model_hash(str(folder)) == expected
    (folder / "model.safetensors").write_bytes(b"x" * (folder / "model.safetensors").stat().st_size)
    assert model_hash(str(folder)) != expected
