"""Dropout is a hash of the example, the module and the number: whatever else is in a pass, its mask is the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.model.adapted_product import PassRows
from raylora.model.adapter_products import AdapterProducts, Span
from raylora.model.dropout import column_hashes, mix, module_hash, threshold_of, token_hashes
from tests.helpers.tiny import make_loaded
from tests.helpers.training import DROPOUT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def products():
    """Those of two adapters with different dropout."""
    loaded = make_loaded()
    for i, dropout in enumerate((0.1, 0.4)):
        loaded.attach(DROPOUT.model_copy(update={"lora_dropout": dropout}), i, f"a{i}")
    found = AdapterProducts(loaded, 2, 2)
    found.hold(["a0", "a1"])
    return found


def spans_of(examples) -> list[Span]:
    """Examples, (tokens, slot, seed) each, side by side."""
    spans, start = [], 0
    for num_tokens, slot, seed in examples:
        spans.append(Span(start, start + num_tokens, slot, seed, slot))
        start += num_tokens
    return spans


EXAMPLES = st.lists(
    st.tuples(st.integers(1, 12), st.integers(0, 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=8
).map(lambda examples: sorted(examples, key=lambda example: example[1]))


@settings(deadline=None)
@given(EXAMPLES, st.data(), st.integers(0, 300), st.integers(1, 33))
def test_masks_do_not_depend_on_how_a_step_is_cut(products, examples, data, module, width):
    cut = data.draw(st.integers(0, len(examples)))
    spans = spans_of(examples)
    whole = products.rows_of(spans, spans[-1].stop).mask(module, width)
    parts = []
    for part in (examples[:cut], examples[cut:]):
        if part:
            rows = products.rows_of(spans_of(part), spans_of(part)[-1].stop)
            parts.append(rows.mask(module, width))
    assert whole.shape == (spans[-1].stop, width)
    assert whole.dtype == torch.uint8
    assert torch.equal(torch.cat(parts), whole)


@settings(deadline=None)
@given(EXAMPLES, st.integers(0, 9))
def test_padding_before_an_example_moves_its_mask_and_changes_no_number_of_it(products, examples, padding):
    spans = spans_of(examples)
    packed = products.rows_of(spans, spans[-1].stop).mask(3, 8)
    apart, start = [], 0
    for span in spans:
        start += padding
        apart.append(Span(start, start + span.stop - span.start, span.slot, span.seed, span.group))
        start = apart[-1].stop
    padded = products.rows_of(apart, start).mask(3, 8)
    for here, there in zip(spans, apart, strict=True):
        assert torch.equal(packed[here.start : here.stop], padded[there.start : there.stop])


def test_masks_differ_between_modules_examples_and_steps(products):
    seeds = [mix(0, step, place) for step in range(3) for place in range(3)]
    masks = {
        tuple(products.rows_of([Span(0, 20, 1, seed)], 20).mask(module, 16).flatten().tolist())
        for seed in seeds
        for module in range(4)
    }
    assert len(masks) == len(seeds) * 4


@settings(deadline=None)
@given(st.integers(0, 1), st.integers(0, 2**64 - 1))
def test_the_share_that_is_dropped_is_the_adapters(products, slot, seed):
    mask = products.rows_of([Span(0, 200, slot, seed, slot)], 200).mask(5, 128).float()
    dropout = (0.1, 0.4)[slot]
    assert 1 - float(mask.mean()) == pytest.approx(dropout, abs=6 * (dropout * (1 - dropout) / mask.numel()) ** 0.5)


@settings(deadline=None)
@given(st.floats(0, 0.999))
def test_a_threshold_is_the_share_to_16_bits(dropout):
    assert abs(threshold_of(dropout) / 2**16 - dropout) <= 2**-17


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_hashes_of_tokens_and_columns_are_all_different_and_begin_alike(num, seed):
    hashes = token_hashes(num, seed)
    assert (hashes.shape, hashes.dtype) == ((num,), torch.int32)
    assert len(set(hashes.tolist())) == num
    assert torch.equal(hashes, token_hashes(num + 5, seed)[:num]), "a longer example begins with the same draws"
    columns = column_hashes(num, CPU)
    assert columns.shape == ((num + 1) // 2,)
    assert len(set(columns.tolist())) == len(columns)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_hashes_of_modules_are_int32_and_differ(one, two):
    assert -(2**31) <= module_hash(one) < 2**31
    assert (mix(one) == mix(two)) == (one == two)
    assert mix(one, two) == mix(one, two)
    assert one == two or mix(one, two) != mix(two, one)


def masks_of_down_proj(monkeypatch, targets) -> list[torch.Tensor]:
    """What is drawn for the first of several adapters in each ``down_proj``, the only modules of 128 inputs."""
    loaded = make_loaded()
    names = [f"a{i}" for i in range(len(targets))]
    for i, (name, modules) in enumerate(zip(names, targets, strict=True)):
        loaded.attach(DROPOUT.model_copy(update={"target_modules": modules}), i, name)
    products, drawn, draw = AdapterProducts(loaded, len(names), len(names)), [], PassRows.mask
    products.hold(names)
    products.expect(products.rows_of(spans_of([(6, slot, 5) for slot in range(len(names))]), 6 * len(names)))
    with monkeypatch.context() as patch, products.installed(), torch.inference_mode():
        patch.setattr(PassRows, "mask", lambda *args: drawn.append(draw(*args)) or drawn[-1])
        products.begin()
        loaded.model(input_ids=torch.arange(6 * len(names))[None])
    return [mask[:6] for mask in drawn if mask.shape[1] == 128]


def test_a_modules_draws_do_not_depend_on_what_else_is_adapted(monkeypatch):
    alone = masks_of_down_proj(monkeypatch, [("down_proj",)])
    assert len(alone) == 2
    assert not torch.equal(*alone)
    for targets in (
        [("down_proj",), ("q_proj",)],
        [("down_proj", "v_proj")],
        [("down_proj",), ("down_proj", "up_proj", "o_proj")],
    ):
        for mine, theirs in zip(masks_of_down_proj(monkeypatch, targets), alone, strict=True):
            assert torch.equal(mine, theirs)
