"""What shares a minibatch with a row moves the row's numbers by float noise alone, but for LLM.int8."""

from __future__ import annotations

import pytest
import torch

from raylora.data.minibatch import pack_rows, pad_left
from raylora.model.attention import attention_in_blocks
from raylora.model.packing import can_pack, is_exact
from tests.helpers.tiny import load, make_model

ROWS = [[(7919 * i + k) % 400 + 3 for i in range(n)] for k, n in enumerate((40, 17, 33, 8))]


def logits_of(loaded) -> dict[str, list[torch.Tensor]]:
    """The logits (T, V) of each of four rows: alone, padded to the longest, packed."""
    model, found = loaded.model, {}
    with torch.inference_mode():
        found["alone"] = [model(input_ids=torch.tensor([row])).logits[0] for row in ROWS]
        padded = model(**pad_left(ROWS, 0, loaded.device).model_inputs()).logits
        found["padded"] = [part[-len(row) :] for part, row in zip(padded, ROWS, strict=True)]
        with attention_in_blocks(model):
            packed = model(**pack_rows(ROWS, loaded.device).model_inputs(), use_cache=False).logits[0]
        found["packed"] = list(packed.split([len(row) for row in ROWS]))
    return found


def largest_difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_a_row_has_the_same_logits_alone_padded_and_packed(outlier_model_folder, quantization):
    loaded = load(outlier_model_folder, quantization)
    found = logits_of(loaded)
    assert found["alone"][0].abs().max() > 0.1
    assert largest_difference(found["padded"], found["alone"]) < 1e-5
    assert largest_difference(found["packed"], found["alone"]) < 1e-5
    assert is_exact(loaded.model)
    assert can_pack(loaded.model)


def test_llm_int8_moves_with_what_shares_a_minibatch(outlier_model_folder):
    loaded = load(outlier_model_folder, "8bit", int8_activations=True)
    found = logits_of(loaded)
    assert largest_difference(found["padded"], found["alone"]) > 1e-3
    assert not is_exact(loaded.model)


def test_half_precision_is_not_exact():
    assert not is_exact(make_model().bfloat16())


def test_eager_attention_is_not_packed():
    model = make_model()
    model.set_attn_implementation("eager")
    assert not can_pack(model)


def test_a_trial_in_mixed_precision_counts_as_one_in_half_precision():
    """As a training over a float32 model has it on a GPU."""
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert can_pack(model)
