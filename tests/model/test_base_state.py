"""The fingerprint of a base sees every weight, and nothing of adapters that come and go."""

from __future__ import annotations

import pytest
import torch

from raylora.config.method import Method
from raylora.model.base_state import weights_hash
from raylora.model.nf4 import WeightOnly4bit
from tests.helpers.adapters import attach_random
from tests.helpers.tiny import load


def change_an_embedding(model):
    """Of a token that the fixed input does not have, and not the output head, so that no logit changes."""
    weight = model.model.embed_tokens.weight.detach().clone()
    weight[476, 3] += 1e-3
    model.model.embed_tokens.weight = torch.nn.Parameter(weight, requires_grad=False)


def change_in_place(model):
    model.model.layers[1].mlp.down_proj.weight.data[-1, -1] += 1


def swap_rows(model):
    norm = model.model.norm.weight
    norm.data = torch.cat([norm.data[1:], norm.data[:1] + 0.5])


@pytest.mark.parametrize("change", [change_an_embedding, change_in_place, swap_rows])
def test_every_change_is_seen(loaded, change):
    before, logits = loaded.base_hash(), loaded.logits_hash()
    assert loaded.base_hash() == before
    change(loaded.model)
    assert loaded.base_hash() != before
    if change is change_an_embedding:
        assert loaded.logits_hash() == logits, "the logits alone would not have told"


def test_adapters_that_come_and_go_are_not_seen(loaded):
    before = loaded.base_hash()
    attach_random(loaded, 0, "first")
    assert loaded.base_hash() == before, "while it is attached"
    attach_random(loaded, 1, "second")
    loaded.detach("first")
    assert loaded.base_hash() == before
    loaded.unwrap()
    assert loaded.base_hash() == before
    loaded.attach(Method(bias="all", modules_to_save=("lm_head",)), 0)
    loaded.detach()
    assert loaded.base_hash() == before


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_scales_of_quantized_weights_count(tiny_model_folder, quantization):
    loaded = load(tiny_model_folder, quantization)
    before = weights_hash(loaded.model)
    layer = loaded.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        if isinstance(layer, WeightOnly4bit):
            layer.weight.quant_state.state2.absmax[0] *= 2
        else:
            layer.weight.SCB[0] *= 2
    assert weights_hash(loaded.model) != before


def test_words_need_not_begin_at_a_multiple_of_eight_bytes(loaded):
    numbers = torch.arange(200_001, dtype=torch.bfloat16)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(numbers[1:], requires_grad=False)
    before = weights_hash(model)
    numbers[100_000] += 1024
    assert weights_hash(model) != before
