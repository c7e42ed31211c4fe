"""Grouped products against a plain loop over the groups, in float64."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.model.grouped import ALIGNMENT, add_outer_products, aligned, products, products_back

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of the norm of what is added up: bfloat16 rounds a number by up to 4e-3 of it."""


@st.composite
def groups(draw):
    """x (T, m), y (T, n), weights (G, n, m), where the groups end (G,), and their parts of the tokens.

    Some groups are empty, but not all. Widths are those that a grouped product takes, and others, of which the products
    are made group by group.
    """
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
    width = st.one_of(st.integers(1, 20), st.sampled_from([8, 16, 24]))
    m, n, dtype = draw(width), draw(width), draw(st.sampled_from(list(TOLERANCE)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shapes = (sum(sizes), m), (sum(sizes), n), (len(sizes), n, m)
    x, y, weights = (torch.randn(*shape, generator=random).to(dtype) for shape in shapes)
    ends = list(itertools.accumulate(sizes))
    parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return x, y, weights, torch.tensor(ends, dtype=torch.int32), parts


def assert_near(found, expected, dtype, terms) -> None:
    """``terms``: the same sums of magnitudes. Where terms cancel, the result is smaller than what was rounded."""
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm()) <= TOLERANCE[dtype] * float(terms.norm())


@settings(deadline=None)
@given(groups())
def test_each_token_is_multiplied_with_its_groups_matrix(given_):
    x, y, weights, ends, parts = given_
    there = torch.cat([x[p].double() @ w.double().t() for p, w in zip(parts, weights, strict=True)])
    back = torch.cat([y[p].double() @ w.double() for p, w in zip(parts, weights, strict=True)])
    terms_there, terms_back = (
        torch.cat([a[p].double().abs() @ w.double().abs() for p, w in zip(parts, matrices, strict=True)])
        for a, matrices in ((x, weights.mT), (y, weights))
    )
    for found, expected, terms in (
        (products(x, weights, ends), there, terms_there),
        (products_back(y, weights, ends), back, terms_back),
    ):
        assert found.dtype == x.dtype
        assert_near(found, expected, x.dtype, terms)


@settings(deadline=None)
@given(groups())
def test_gradients_of_groups_are_added_in_place(given_):
    x, y, weights, ends, parts = given_
    total = torch.ones(weights.shape)
    kept = total.view(-1)
    expected = 1 + torch.stack([y[p].double().t() @ x[p].double() for p in parts])
    add_outer_products(total, y, x, ends)
    assert kept.data_ptr() == total.data_ptr()
    terms = 1 + torch.stack([y[p].double().abs().t() @ x[p].double().abs() for p in parts])
    assert_near(total, expected, x.dtype, terms)
    for part, of_group in zip(parts, total, strict=True):
        assert part.start < part.stop or bool((of_group == 1).all()), "a group without tokens has no gradient"


@settings(deadline=None)
@given(groups())
def test_they_are_the_gradients_of_autograd(given_):
    x, y, weights, ends, parts = (
        t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given_
    )
    x.requires_grad_(True)
    weights.requires_grad_(True)
    torch.cat(
        [x[a:b] @ w.t() for (a, b), w in zip(itertools.pairwise([0, *ends.tolist()]), weights, strict=True)]
    ).backward(y)
    total = torch.zeros(weights.shape)
    with torch.no_grad():
        add_outer_products(total, y, x, ends)
        terms = torch.cat([y[p].double().abs() @ w.double().abs() for p, w in zip(parts, weights, strict=True)])
        assert_near(products_back(y, weights, ends), x.grad.double(), torch.float32, terms)
        terms = torch.stack([y[p].double().abs().t() @ x[p].double().abs() for p in parts])
    assert_near(total, weights.grad.double(), torch.float32, terms)


@settings(deadline=None)
@given(st.integers(0, 300), st.sampled_from(list(TOLERANCE)))
def test_a_rank_is_filled_up_to_whole_units_of_memory(rank, dtype):
    found = aligned(rank, dtype)
    assert rank <= found
    assert found * dtype.itemsize % ALIGNMENT == 0
    assert (found - rank) * dtype.itemsize < ALIGNMENT
