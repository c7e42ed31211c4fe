"""Fixed sizes of passes, and what filling a pass up to one leaves as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.data.encoding import IGNORE_INDEX, labels_of
from raylora.model.adapter_products import AdapterProducts
from raylora.model.attention import attention_in_blocks
from raylora.model.forward import head_is_plain, token_losses
from raylora.model.graphs import fixed_size
from raylora.training.pass_inputs import (
    Example,
    PassSize,
    align_groups,
    make_inputs,
    size_of,
)
from tests.helpers.training import DROPOUT, METHOD

PAD = 0


def example(num_tokens: int, num_labels: int, slot: int = 0, group: int = 0, seed: int = 7) -> Example:
    labels = [IGNORE_INDEX] * (num_tokens - num_labels) + list(range(1, num_labels + 1))
    return Example(range(1, num_tokens + 1), labels, slot, seed, group, 0.5, num_labels)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 1)), min_size=1, max_size=40), st.booleans())
def test_what_has_a_size_fits_into_it(shapes, drops):
    examples = [example(n, int(share * (n - 1))) for n, share in shapes]
    num_tokens, longest = sum(n for n, _ in shapes), max(n for n, _ in shapes)
    size = size_of(examples, drops)
    if size is None:
        assert len(examples) > num_tokens / 2 / 32 - 2, "only many short examples have none"
        return
    assert (size.tokens, size.drops) == (fixed_size(num_tokens), drops)
    assert longest <= size.longest <= size.tokens
    assert sum(e.num_labels for e in examples) <= size.labels <= size.tokens
    fillers = -(-(size.tokens - num_tokens) // size.longest)
    assert len(examples) + fillers <= size.blocks


def test_sizes_by_hand():
    assert size_of([example(300, 20), example(190, 30)], drops=True) == PassSize(512, 128, 512, True)
    assert size_of([example(600, 161)], drops=False) == PassSize(640, 320, 640, False)
    assert size_of([example(600, 20)] * 5, drops=False) == PassSize(3072, 768, 2048, False)
    assert size_of([example(3, 1)] * 17, drops=False) is None  # 512 tokens have room for 16 blocks


def tensors(record: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a dataclass and of those in it, by their names."""
    if isinstance(record, torch.Tensor):
        return {name: record}
    if not dataclasses.is_dataclass(record):
        return {}
    found = {}
    for field in dataclasses.fields(record):
        found |= tensors(getattr(record, field.name), f"{name}.{field.name}")
    return found


def hold(loaded, methods, num_groups: int, remake: bool = False) -> AdapterProducts:
    """The products of attached adapters, whose weights are not zero."""
    names = [f"a{i}" for i in range(len(methods))]
    torch.manual_seed(1)
    for i, (name, method) in enumerate(zip(names, methods, strict=True)):
        with torch.no_grad():
            for p in loaded.attach(method, i, name):
                p.copy_(torch.randn_like(p) * 0.1)
    products = AdapterProducts(loaded, len(names), num_groups)
    products.remakes_masks = remake
    products.hold(names)
    loaded.allows(head_is_plain)  # tried while the model is its own
    return products


def examples_of(encoded, places, num_slots: int = 1) -> list[Example]:
    """Encoded examples for the adapters, and groups, in turn."""
    rows = [
        (e, labels_of(e, "answer"), i * num_slots // len(places))
        for i, e in enumerate(encoded[place] for place in places)
    ]
    return [
        Example(e.input_ids, labels, slot, 11 * i, slot, 0.01 * (i + 1), sum(x != IGNORE_INDEX for x in labels))
        for i, (e, labels, slot) in enumerate(rows)
    ]


def run(loaded, products, inputs, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted losses of the groups and all gradients of one pass."""
    for parameter in loaded.peft_model.parameters():
        parameter.requires_grad_(False)
    loaded.model.train()
    products.begin()
    products.expect(inputs.rows)
    blocks = attention_in_blocks(loaded.model) if inputs.batch.blocks else contextlib.nullcontext()
    with products.installed(), blocks:
        losses = token_losses(loaded, inputs.batch) * inputs.weights
        losses.sum().backward()
    sums = torch.zeros(num_groups).index_add_(0, inputs.groups, losses.detach())
    return sums, torch.cat([g.clone() for g in products.gradients])


@pytest.mark.parametrize("remake", [False, True])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_pass_that_is_filled_up_has_the_same_losses_and_gradients(loaded, encoded, num_slots, remake):
    methods = [DROPOUT, METHOD, DROPOUT.model_copy(update={"lora_r": 3, "lora_dropout": 0.3})][:num_slots]
    products = hold(loaded, methods, num_slots, remake)
    examples = examples_of(encoded, range(6), num_slots)
    size = size_of(examples, True)
    filled = make_inputs(examples, products, PAD, packed=True, size=size)
    assert filled.batch.input_ids.shape == (1, size.tokens)
    assert filled.batch.targets.shape == filled.weights.shape == filled.groups.shape == (size.labels,)
    assert filled.batch.blocks.ends.tolist()[-1] == size.tokens
    assert len(filled.batch.blocks.ends) == size.blocks + 1
    plain = make_inputs(examples, products, PAD, packed=True)
    padded = make_inputs(examples, products, PAD, packed=False)
    assert plain.batch.input_ids.numel() == sum(len(e.input_ids) for e in examples) < size.tokens
    losses, gradients = run(loaded, products, plain, num_slots)
    assert float(losses.min()) > 0
    for other in (filled, padded):
        others, theirs = run(loaded, products, other, num_slots)
        torch.testing.assert_close(others, losses, atol=1e-6, rtol=1e-6)
        assert float((theirs - gradients).norm()) < 1e-5 * float(gradients.norm())


@pytest.mark.parametrize(("num_slots", "num_groups"), [(1, 4), (4, 4)])
def test_groups_are_aligned_and_none_is_empty(loaded, encoded, num_slots, num_groups):
    products = hold(loaded, [DROPOUT] * num_slots, num_groups, remake=True)
    there = [dataclasses.replace(e, slot=3 if num_slots > 1 else 0, group=3) for e in examples_of(encoded, [2])]
    examples = [*examples_of(encoded, [0, 1]), *there]  # none of groups 1 and 2
    aligned = align_groups(examples, products, 16, PAD)
    added = [e for e in aligned if e not in examples]
    assert [e for e in aligned if e in examples] == examples
    assert [e.group for e in aligned] == sorted(e.group for e in aligned)
    for e in added:
        assert (set(e.labels), e.num_labels, set(e.input_ids)) == ({IGNORE_INDEX}, 0, {PAD})
        assert e.slot == (e.group if num_slots > 1 else 0)
    inputs = make_inputs(aligned, products, PAD, packed=True, size=size_of(aligned, True))
    ends = [0, *inputs.rows.group_ends.tolist()]
    assert all(b > a for a, b in itertools.pairwise(ends))
    assert all(end % 16 == 0 for end in ends[:-1])
    assert ends[-1] == inputs.batch.input_ids.numel(), "what fills a pass up belongs to the last group"
    losses, gradients = run(loaded, products, make_inputs(examples, products, PAD, packed=True), num_groups)
    others, theirs = run(loaded, products, inputs, num_groups)
    torch.testing.assert_close(others, losses, atol=1e-6, rtol=1e-6)
    assert float((theirs - gradients).norm()) < 1e-5 * float(gradients.norm())


def test_filling_tensors_copies_all_of_them(loaded, encoded):
    products = hold(
        loaded, [DROPOUT, DROPOUT.model_copy(update={"lora_dropout": 0.3, "lora_alpha": 5})], 2, remake=True
    )
    one, two = [examples_of(encoded, places, 2) for places in ([1, 2, 3], [9, 4, 8])]
    size = max((size_of(part, True) for part in (one, two)), key=lambda size: (size.tokens, size.labels))
    mine, theirs = (make_inputs(part, products, PAD, packed=True, size=size) for part in (one, two))
    places = {name: tensor.data_ptr() for name, tensor in tensors(mine).items()}
    wanted = {name: tensor.clone() for name, tensor in tensors(theirs).items()}
    assert len(wanted) == 12
    assert all(not torch.equal(tensors(mine)[name], wanted[name]) for name in wanted), "the test would show nothing"
    mine.fill(theirs)
    for name, tensor in tensors(mine).items():
        assert torch.equal(tensor, wanted[name]), name
        assert tensor.data_ptr() == places[name], f"{name} is where it was captured"


def test_inputs_of_another_size_are_refused(loaded, encoded):
    products = hold(loaded, [METHOD], 1, remake=True)
    small, large = (make_inputs(examples_of(encoded, places), products, PAD, packed=True) for places in ([0], [1]))
    with pytest.raises(AssertionError):
        small.fill(large)


def test_copies_on_a_device_are_the_same_numbers(loaded, encoded):
    products = hold(loaded, [DROPOUT], 1)
    for packed in (True, False):
        inputs = make_inputs(examples_of(encoded, [0, 1]), products, PAD, packed=packed)
        moved = inputs.to(torch.device("cpu"))
        assert tensors(moved).keys() == tensors(inputs).keys()
        assert all(torch.equal(tensor, tensors(inputs)[name]) for name, tensor in tensors(moved).items())
