"""A model whose files lack weights, or hold some that are no numbers, is refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raylora.errors import ErrorKind, UserError
from raylora.model.loaded_weights import is_finite
from raylora.model.merging import merge
from tests.helpers.tiny import load, save_model


def without_a_layer(weights):
    for name in [name for name in weights if "layers.1." in name]:
        del weights[name]


def without_embeddings(weights):
    """The output head, which is tied to them, is then missing too."""
    weights["another"] = weights.pop("model.embed_tokens.weight")


def not_a_number(weights):
    for tensor in weights.values():
        tensor.fill_(float("nan"))


def one_infinite_number(weights):
    weights["model.layers.0.self_attn.q_proj.weight"][3, 5] = float("inf")


def of_another_shape(weights):
    weights["model.norm.weight"] = torch.ones(32)


@pytest.fixture
def changed(tiny_model_folder, tmp_path):
    def make(change):
        folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_a_layer, r"its files lack 9 weights, the first model\.layers\.1\.input_layernorm\.weight"),
        (without_embeddings, r"its files lack 2 weights, the first lm_head\.weight"),
        (not_a_number, r"\d+ of its weights are not finite numbers, the first model\.embed_tokens\.weight"),
        (one_infinite_number, r"1 of its weights are not finite .*layers\.0\.self_attn\.q_proj\.weight"),
        (of_another_shape, "cannot be loaded"),
    ],
)
def test_a_model_without_all_its_weights_is_one_line(changed, quantization, change, says):
    folder = changed(change)
    with pytest.raises(UserError, match=says) as raised:
        load(folder, quantization)
    assert str(raised.value).startswith(f"--model {folder}: cannot be loaded: ")
    assert "\n" not in str(raised.value)
    assert raised.value.kind is ErrorKind.MODEL


def test_an_adapter_is_not_merged_into_such_a_model(changed, adapter_folder, tmp_path):
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/model"}))
    with pytest.raises(UserError, match="its files lack 9 weights"):
        merge(folder, tmp_path / "merged", str(changed(without_a_layer)))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_a_head_that_is_tied_is_not_missing(tiny_model_folder, quantization):
    assert "lm_head.weight" not in load_file(tiny_model_folder / "model.safetensors")
    loaded = load(tiny_model_folder, quantization)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_a_head_that_is_not_tied_and_missing_is_said(tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"lack 1 weights, the first lm_head\.weight"):
        load(folder, "none")


def test_scales_that_are_missing_of_stored_4_bits_are_said(tmp_path):
    """transformers loads them without a word: scales of scales become scales."""
    given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = save_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=given, device_map={"": torch.device("cpu")}, dtype=torch.float32
    )
    folder = shutil.copytree(base, tmp_path / "stored")
    model.save_pretrained(folder)
    load(folder, "none")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight.nested_absmax"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"scales of 1 quantized weights, the first model\.layers\.0\.mlp\.down_proj"):
        load(folder, "none")


def test_logits_that_overflow_are_said(changed):
    """Each weight is finite, and what is computed with them is not."""

    def enlarge(weights):
        weights["model.norm.weight"].fill_(3e38)

    with pytest.raises(UserError, match="its logits are not finite numbers"):
        load(changed(enlarge), "none")


def test_a_sum_that_overflows_is_no_infinite_number():
    large = torch.full((100,), 60_000.0, dtype=torch.float16)
    assert not large.sum().isfinite()
    assert is_finite(large)
    large[7] = float("nan")
    assert not is_finite(large)
    assert is_finite(torch.ones(3).to(torch.float8_e4m3fn))
    assert is_finite(torch.tensor([2**62, 2**62]))
