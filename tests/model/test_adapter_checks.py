"""An adapter from a stranger: what does not fit together, or has no end, is one line before PEFT builds anything."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from raylora.errors import ErrorKind, UserError
from raylora.model import adapter_checks
from raylora.model.adapter_checks import check_patterns
from raylora.model.adapter_files import check_adapter
from raylora.model.adapters import LoadedModel
from tests.helpers.adapters import logits, make_qwen2, save_kind
from tests.helpers.tiny import make_loaded, make_tokenizer

BACKTRACKING = "(([a-z_.0-9]+)+)+!"


def variant(adapter_folder, folder, config=None, weights=None):
    """A copy of an adapter with options of another value, and its tensors changed by a function."""
    shutil.copytree(adapter_folder, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    if weights:
        tensors = load_file(folder / "adapter_model.safetensors")
        weights(tensors)
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def refusal(folder, loaded=None) -> str:
    loaded = loaded or make_loaded()
    before = loaded.base_hash()
    with pytest.raises(UserError) as raised:
        loaded.attach_saved(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    assert raised.value.kind is ErrorKind.ADAPTER
    assert loaded.base_hash() == before, "it has left something in the base"
    return str(raised.value)


def rename(tensors):
    for name in list(tensors):
        tensors[name.replace("layers", "layerz")] = tensors.pop(name)


def leave_half(tensors):
    for name in sorted(tensors)[::2]:
        del tensors[name]


def leave_one_out(tensors):
    del tensors[min(tensors)]


def fill(value):
    return lambda tensors: [tensor.fill_(value) for tensor in tensors.values()]


def make_integers(tensors):
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(torch.int32)


def add_another(tensors):
    tensors["base_model.model.model.layers.0.mlp.up_proj.oft_R.weight"] = torch.ones(2)


@pytest.mark.parametrize(
    ("config", "weights", "says"),
    [
        ({}, rename, "no adapter of tiny: has weights that the model has no place for"),
        ({}, leave_half, "no adapter of tiny: lacks weights"),
        ({}, leave_one_out, r"no adapter of tiny: lacks weights \(1, the first"),
        ({}, add_another, "has weights that the model has no place for (1, the first"),
        ({}, fill(float("nan")), "of its weights are not finite numbers, the first"),
        ({}, fill(float("inf")), "of its weights are not finite numbers, the first"),
        ({}, make_integers, "tensors are no numbers of LoRA"),
        ({"peft_type": "IA3"}, None, "no adapter of tiny: "),
        ({"peft_type": "LOHA"}, None, "no adapter of tiny: "),
        ({"peft_type": "SHADOW", "shadow_model": "/somewhere"}, None, "of a kind that raylora does not know (SHADOW)"),
        ({"peft_type": None}, None, "of a kind that raylora does not know"),
        ({"r": 10**9}, None, "r is 1000000000, and no tensor of its file has an axis above"),
        ({"r": 10**30}, None, "and no tensor of its file has an axis above"),
        ({"r": 5}, None, "no adapter of tiny"),
        ({"r": "8"}, None, "r must be an integer, and is '8'"),
        ({"r": True}, None, "r must be an integer, and is True"),
        ({"rank_pattern": {"q_proj": 10**9}}, None, "q_proj is 1000000000"),
        ({"rank_pattern": {"q_proj": "x"}}, None, "rank_pattern must name a number for 'q_proj'"),
        ({"rank_pattern": [1]}, None, "rank_pattern must be an object"),
        ({"rank_pattern": {f"a{i}": 1 for i in range(2_000)}}, None, "rank_pattern has 2000 entries"),
        ({"modules_to_save": 7}, None, "modules_to_save must be a text or a list"),
        ({"modules_to_save": [["lm_head"]]}, None, "modules_to_save must be a text or a list of texts"),
        ({"target_modules": {"a": 1}}, None, "target_modules must be a text or a list"),
        ({"target_modules": ["nowhere"]}, None, "no adapter of tiny"),
        ({"target_modules": "("}, None, "target_modules: '(' is no regular expression"),
        ({"target_modules": "a{99999999999999999999}"}, None, "is no regular expression: OverflowError"),
        ({"init_lora_weights": ["pissa"]}, None, "init_lora_weights must be true or false or a text"),
        ({"lora_alpha": None}, None, "lora_alpha must be an integer or a number"),
        ({"layer_replication": [[0, 10**9]]}, None, "layer_replication makes 1000000000 layers"),
        ({"layer_replication": [[0, "2"]]}, None, "layer_replication must be a list of two integers each"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, None, "of Megatron"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(adapter_folder, tmp_path, config, weights, says):
    text = refusal(variant(adapter_folder, tmp_path / "adapter", config, weights))
    assert says.replace("\\", "") in text


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"[1]", b" " * (1 << 24) + b"{}", b'{"r": 1'],
)
def test_a_configuration_that_cannot_be_read_is_one_line(adapter_folder, tmp_path, data):
    folder = variant(adapter_folder, tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(data)
    assert "adapter_config.json: " in refusal(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": BACKTRACKING},
        {"exclude_modules": BACKTRACKING},
        {"layers_to_transform": [0], "layers_pattern": BACKTRACKING},
        {"rank_pattern": {BACKTRACKING: 4}},
        {"alpha_pattern": {BACKTRACKING: 4}},
        {"modules_to_save": [BACKTRACKING]},
        {"feedforward_modules": BACKTRACKING},
    ],
)
def test_a_pattern_that_never_ends_is_one_line(adapter_folder, tmp_path, config, monkeypatch):
    monkeypatch.setattr(adapter_checks, "PATTERN_SECONDS", 0.3)
    started = time.perf_counter()
    text = refusal(variant(adapter_folder, tmp_path / "adapter", config))
    assert "names of modules within 0.3 s: name the modules in a list" in text
    assert next(key for key in list(config)[::-1]) in text
    assert time.perf_counter() - started < 5


def test_names_need_no_process_and_patterns_with_an_end_are_taken(monkeypatch):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(30_000)]
    check_patterns("here", {"target_modules": r".*layers\.(1|2)\..*q_proj", "rank_pattern": {"^model.*q": 3}}, names)
    monkeypatch.setattr(adapter_checks.sys, "executable", "/nowhere")
    check_patterns("here", {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.q_proj": 3}}, names)


def test_a_good_adapter_with_a_pattern_is_what_its_list_would_be(adapter_folder, tmp_path):
    loaded, found = make_loaded(), []
    for modules in (json.loads((adapter_folder / "adapter_config.json").read_text())["target_modules"], r".*_proj"):
        loaded.attach_saved(variant(adapter_folder, tmp_path / str(len(found)), {"target_modules": modules}))
        found.append(logits(loaded.model))
        loaded.detach()
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["bias of all", "modules to save", "OLoRA", "token", "DoRA", "embeddings", "IA3"])
def test_whatever_an_adapter_asks_for_the_base_is_what_it_was(tmp_path, name):
    loaded = LoadedModel(make_qwen2(), make_tokenizer(), "qwen2", "none")
    before = loaded.base_hash()
    loaded.attach_saved(save_kind(name, tmp_path / "adapter"))
    loaded.detach()
    assert loaded.base_hash() == before
    refusal(variant(tmp_path / "adapter", tmp_path / "broken", weights=add_another), loaded)
    if name == "bias of all":
        refusal(variant(tmp_path / "adapter", tmp_path / "in part", weights=leave_one_out), loaded)


def test_the_file_is_looked_at_before_the_model(adapter_folder, tmp_path):
    with pytest.raises(UserError, match="has no tensors"):
        check_adapter(variant(adapter_folder, tmp_path / "adapter", weights=dict.clear))
