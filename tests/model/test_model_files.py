"""A model's folder from a stranger: which files are loaded, and what is refused before anything is built."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from raylora.config.options import ModelOptions
from raylora.errors import ErrorKind, UserError
from raylora.model.loading import load_model
from raylora.model.model_files import check_source, files_below, leads_outside, read_settings
from raylora.model.sources import model_hash, resolve_model
from raylora.model.targets import skeleton
from tests.helpers.tiny import load


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(folder) -> str:
    with pytest.raises(UserError) as raised:
        resolve_model(str(folder))
    assert "\n" not in str(raised.value)
    assert raised.value.kind is ErrorKind.MODEL
    return str(raised.value)


def shard(folder, name):
    """Move the weights of a folder to a file that an index names."""
    weights = load_file(folder / "model.safetensors")
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.move(folder / "model.safetensors", folder / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


def test_weights_that_an_index_names_in_a_folder_are_in_the_hash(folder):
    weights = shard(folder, "shards/w.safetensors")
    before, loaded = model_hash(str(folder)), load(folder, "none")
    other = {key: value + 1 for key, value in weights.items()}
    save_file(other, folder / "shards" / "w.safetensors", metadata={"format": "pt"})
    assert model_hash(str(folder)) != before
    assert load(folder, "none").base_hash() != loaded.base_hash()


@pytest.mark.parametrize("name", ["../w.safetensors", "shards/../../w.safetensors", "/tmp/w.safetensors", "C:\\w"])
def test_an_index_that_leads_out_of_the_folder_is_refused(folder, name):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert f"{index}: names {name}, which is outside" in refusal(folder)
    with pytest.raises(UserError, match="outside of the model's folder"):
        model_hash(str(folder))
    assert leads_outside(name)
    assert not leads_outside("shards/a..b.safetensors")


def test_code_and_templates_below_the_folder_are_in_the_hash(folder):
    before = model_hash(str(folder))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    assert model_hash(str(folder)) != before
    assert [path.name for path in files_below(folder)] == ["tool.jinja"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff\xfe", r"not UTF-8 \(byte 1\)"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deep"),
        (b"[]", "is no JSON object"),
        (b"{", "Expecting property name"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "cannot be read"),
        (b" " * 1_001, "has 1,001 bytes, and a file of settings at most 1,000"),
    ],
)
def test_settings_that_are_no_object_are_one_line(tmp_path, data, says):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"config\.json: .*{says}") as raised:
        read_settings(path, 1_000 if b" " * 9 in data else 10**6)
    assert "\n" not in str(raised.value)


def test_settings_that_are_no_file_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(UserError, match="is no regular file"):
        read_settings(tmp_path / "fifo.json")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_each_file_of_settings_is_looked_at(folder, name):
    (folder / name).write_bytes(b"[1]")
    assert f"{folder / name}: is no JSON object" in refusal(folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_hidden_layers", 10**7),
        ("num_hidden_layers", 1e7),
        ("vocab_size", 10**12),
        ("hidden_size", 128),  # an axis of half its length is there
        ("intermediate_size", 10**9),
        ("num_attention_heads", 10**6),
        ("text_config", {"num_hidden_layers": 10**7}),
        ("num_experts", 10**7),
    ],
)
def test_a_configuration_of_another_size_is_refused_before_anything_is_built(folder, option, value):
    before = time.perf_counter()
    change(folder / "config.json", **{option: value})
    if option == "hidden_size":
        value = 96
        change(folder / "config.json", hidden_size=value)
    assert "they do not belong together" in refusal(folder)
    assert time.perf_counter() - before < 1


def test_without_weights_only_what_no_model_has_is_refused(folder):
    (folder / "model.safetensors").unlink()
    change(folder / "config.json", num_hidden_layers=50)
    assert resolve_model(str(folder))
    change(folder / "config.json", num_hidden_layers=10**7)
    assert "no model has so many" in refusal(folder)


def test_an_adapter_in_the_model_s_folder_is_refused(folder):
    """transformers would load the base that it names, from wherever that is."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/somewhere/else"}))
    assert "adapter_config.json beside its config.json" in refusal(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "org/kernel"},
        {"_attn_implementation": "org/kernel@main:forward"},
        {"attn_implementation": {"": "eager", "text_config": {"": "paged|org/kernel"}}},
        {"text_config": {"_attn_implementation_internal": "org/kernel"}},
        {"experts_implementation": "org/kernel"},
    ],
)
def test_a_kernel_of_the_hub_is_code_that_must_be_trusted(folder, values):
    change(folder / "config.json", **values)
    for use in (
        lambda: check_source(str(folder), False),
        lambda: skeleton(str(folder)),
        lambda: load_model(ModelOptions(model=str(folder), quantization="none")),
    ):
        with pytest.raises(UserError, match=r"names the kernel \S*org/kernel\S*, code that .*--trust-remote-code"):
            use()
    check_source(str(folder), True)


def test_what_is_no_kernel_is_loaded(folder):
    change(folder / "config.json", attn_implementation="eager")
    loaded = load(folder, "none")
    assert loaded.model.config._attn_implementation == "eager"
    assert torch.isfinite(next(loaded.model.parameters())).all()
