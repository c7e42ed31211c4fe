"""Near doubles, against brute force."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from raylora.features import duplicates
from raylora.features.words import words_of


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), num=st.integers(2, 150), num_words=st.integers(3, 400))
def test_near_doubles_among_many_words_are_those_of_brute_force(seed, num, num_words):
    rng = random.Random(seed)
    texts = [" ".join(f"w{int(rng.paretovariate(0.7)) % num_words}" for _ in range(12)) for _ in range(num)]
    texts += [f"{t} w1" for t in texts[::5]]
    matrix = TfidfVectorizer(analyzer=words_of).fit(sorted(set(texts))).transform(texts)
    cosines = (matrix @ matrix.T).toarray()
    np.fill_diagonal(cosines, 0)
    if not (np.abs(cosines - 0.8) < 1e-5).any():
        assert duplicates.share_with_a_double(texts) == pytest.approx((cosines > 0.8).any(1).mean())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab cd", min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=30))
def test_duplicates_are_those_of_brute_force(texts):
    matrix = TfidfVectorizer(analyzer=words_of).fit(sorted(set(texts))).transform(texts)
    cosines = (matrix @ matrix.T).toarray()
    np.fill_diagonal(cosines, 0)
    near_border = np.abs(cosines - 0.8) < 1e-5
    if not near_border.any():
        assert duplicates.share_with_a_double(texts) == pytest.approx((cosines > 0.8).any(1).mean())


def test_duplicates_of_many_texts_are_found_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 7)
    texts = [f"word{i} other{i} third{i}" for i in range(50)] + ["word3 other3 third3"]
    assert duplicates.share_with_a_double(texts) == pytest.approx(2 / 51)
