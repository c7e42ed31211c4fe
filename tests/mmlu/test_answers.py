"""Which letter a written answer names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.mmlu.answers import parse_answer


@pytest.mark.parametrize(
    "text",
    [
        "C", "(C)", "C.", "C) banana", "C. banana", "Answer: C", "The answer is C", "The correct answer is (C).",
        "**C**", "c", "option C", " C\n", "C\nD", "[C]", "Answer: **C**", "The answer is option C.", "The answer is: C",
        "C: x",
    ],
)  # fmt: skip
def test_answers_are_read(text):
    assert parse_answer(text) == 2


@pytest.mark.parametrize(
    "text", ["Because of D.", "", "A cat", "Banana", "I think so", "Dogs", "The answer", "a dog is", "E", "Because"]
)
def test_what_names_no_option_is_unparsed(text):
    assert parse_answer(text) is None


@given(st.text(max_size=40), st.sampled_from("ABCD"))
def test_parsing_never_fails_and_a_letter_with_a_full_stop_is_that_letter(text, letter):
    assert parse_answer(text) in (None, 0, 1, 2, 3)
    assert parse_answer(f"{letter}. {text}") == "ABCD".index(letter)
