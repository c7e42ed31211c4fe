"""Features of words and characters, by hand."""

from __future__ import annotations

import pytest

from raylora.features import text
from raylora.features.observer import loss_stability
from raylora.features.static import as_dataset


def test_text_statistics_by_hand():
    assert text.calculate_special_char_ratio("a,b+c d") == pytest.approx(2 / 7)
    assert text.calculate_answer_groundedness("The cat sat.", "the cat ran") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert text.calculate_answer_groundedness("x", "!!") is None
    assert text.repetition(["a", "b", "a", "b", "a"]) == pytest.approx(1 - 2 / 3)
    assert loss_stability([3.0, 2.0, 1.0]) == pytest.approx(1)
    assert loss_stability([3.0, 2.0]) is None


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


def test_plain_texts_have_no_question_and_no_ground(tokenizer):
    values, notes = text.text_features(as_dataset([{"text": "Two and two make four."}] * 2).examples, tokenizer)
    assert (values["avg_input_length"], values["io_length_ratio"], values["approximate_duplicates"]) == (0, None, 1)
    assert (values["answer_groundedness"], values["input_ttr"]) == (None, None)
    assert values["avg_output_length"] > 5
    assert set(notes) == {"answer_groundedness", "input_ttr", "io_length_ratio"}
