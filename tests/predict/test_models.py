"""Folds that keep a group together."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.predict.models import make_folds


@given(
    groups=st.lists(st.integers(0, 12), min_size=9, max_size=60).filter(lambda g: len(set(g)) >= 3),
    folds=st.integers(3, 8),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_a_group_is_never_on_both_sides(groups, folds, seed):
    codes = np.array(groups)
    splits = list(make_folds(folds, codes, len(codes), seed).split(codes, codes, codes))
    assert len(splits) == min(folds, len(set(groups)))
    assert sorted(i for _, held_out in splits for i in held_out) == list(range(len(codes)))
    for rest, held_out in splits:
        assert not set(codes[rest]) & set(codes[held_out])
