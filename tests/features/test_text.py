"""Features of words and characters, against brute force and by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from raylora.features import duplicates, text, words
from raylora.features.observer import loss_stability
from raylora.features.static import as_dataset
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


def test_text_statistics_by_hand():
    assert text.calculate_special_char_ratio("a,b+c d") == pytest.approx(2 / 7)
    assert text.calculate_answer_groundedness("The cat sat.", "the cat ran") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert text.calculate_answer_groundedness("x", "!!") is None
    assert text.repetition(["a", "b", "a", "b", "a"]) == pytest.approx(1 - 2 / 3)
    assert loss_stability([3.0, 2.0, 1.0]) == pytest.approx(1)
    assert loss_stability([3.0, 2.0]) is None


def test_words_of_every_script():
    for said, expected in {
        "The CAT's 3 straße_1!": ["the", "cat", "s", "3", "strasse_1"],
        "हिन्दी भाषा": ["हिन्दी", "भाषा"],
        "مُحَمَّد كتب": ["مُحَمَّد", "كتب"],
        "我喜欢ABC茶": ["我", "喜", "欢", "abc", "茶"],
        "ひらがな カタカナ": ["ひ", "ら", "が", "な", "カタカナ"],
        "🎉 ... —": [],
    }.items():
        assert words_of(said) == expected


@given(st.text(max_size=60))
def test_words_of_ascii_are_those_of_the_rule_for_all(said):
    assert [w for w in words_of(said) if w.isascii()] == [
        w for w in words._WORD.findall(said.casefold()) if w.isascii()
    ]


def test_text_features_by_hand(tokenizer):
    """Two examples that anyone can count."""
    records = [
        {"question": "Why, why is the sky blue?", "answer": "Scattering of light of light of light."},
        {"question": "Is it?", "answer": "It is, understandably; it is."},
    ]
    dataset = as_dataset(records)
    values, notes = text.text_features(dataset.examples, tokenizer)
    tokens = {k: [len(tokenizer(r[k], add_special_tokens=False)["input_ids"]) for r in records] for k in records[0]}
    asked, said = tokens["question"], tokens["answer"]
    assert asked[0] > asked[1]
    assert said != asked
    letters = "".join(r["question"] + r["answer"] for r in records)
    assert values == pytest.approx(
        {
            "avg_input_length": sum(asked) / 2,
            "input_length_std": abs(asked[0] - asked[1]) / 2,
            "avg_output_length": sum(said) / 2,
            "output_length_std": abs(said[0] - said[1]) / 2,
            "io_length_ratio": sum(said) / sum(asked),
            "input_ttr": (5 / 6 + 2 / 2) / 2,
            "output_ttr": (3 / 7 + 3 / 5) / 2,
            # Of five 3-grams three are distinct, "of light of" and "light of light" among them; the other's three all.
            "output_ngram_repetition": ((1 - 3 / 5) + 0) / 2,
            "vocab_complexity": 2 / 20,  # scattering, understandably
            "special_char_ratio": sum(c in ",?.;" for c in letters) / len(letters),
            "approximate_duplicates": 0.0,
            "answer_groundedness": (0 + (4 / 5 + 0 + 0) / 3) / 2,
        },
        abs=1e-9,
    ), values
    assert notes == {}


def test_characters_are_those_of_the_records(tmp_path, loaded):
    import json

    from raylora.data.datasets import load_dataset

    records = [
        {
            "messages": [{"role": r, "content": "x" * n} for r, n in (("user", 3), ("assistant", 5)) * 2],
            "source": "abcd",
        }
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    from_file, from_memory = load_dataset(tmp_path / "a.json"), as_dataset(records)
    assert from_memory.total_chars == from_file.total_chars
    assert from_memory.num_items == from_file.num_items == 1
