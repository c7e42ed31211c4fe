"""Minibatches hold everything once and keep to their budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raylora.model.memory import batches_by_budget, packs_by_budget


def test_batches_keep_to_the_budget_longest_first():
    lengths = [3, 9, 1, 4, 4, 20]
    batches = list(batches_by_budget(range(6), lambda i: lengths[i], 12))
    assert sorted(i for b in batches for i in b) == list(range(6))
    assert batches[0] == [5]
    assert all(len(b) * max(lengths[i] for i in b) <= 12 for b in batches[1:])


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_packs_hold_everything_once_and_keep_to_the_budget(lengths, budget):
    packs = list(packs_by_budget(range(len(lengths)), lambda i: lengths[i], budget))
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in pack) for pack in packs]
    assert all(size <= budget or len(pack) == 1 for size, pack in zip(sizes, packs, strict=True))
    assert sizes == sorted(sizes, reverse=True)
    assert sum(2 * size <= budget for size in sizes) <= 1, "two half-empty packs would have been one"
