"""Written answers: what MMLU.md's parser is to read, and the room that thoughts get."""

from __future__ import annotations

import json

import pytest

from raylora import evaluate_mmlu_with_model
from raylora.mmlu.answers import parse_answer
from tests.helpers.thinking import thinking_tokenizer
from tests.helpers.tiny import make_model


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


def test_an_answer_is_one_of_the_choices():
    assert [parse_answer(text, 10) for text in ("J", "(I)", "I think so", "The answer is G")] == [9, 8, None, 6]
    assert [parse_answer(text, 2) for text in ("A", "B", "C")] == [0, 1, None]


@pytest.mark.parametrize(
    ("template", "scoring", "expected"), [("begun", "generate", "on"), ("switch", "generate", "off")]
)
def test_thoughts_get_room_where_they_cannot_be_switched_off(tmp_path, monkeypatch, template, scoring, expected):
    from raylora.mmlu import answers

    monkeypatch.setattr(answers, "THINKING_TOKENS", 40)
    question = {"question": "What?", "choices": list("wxyz"), "answer": 0, "subject": "anatomy"}
    (tmp_path / "q.json").write_text(json.dumps([question]))
    found = evaluate_mmlu_with_model(
        make_model(), thinking_tokenizer(template), tmp_path / "q.json", prompt_style="chat", scoring=scoring
    )
    text = found["questions"]["text"][0]
    assert found["thinking"] == expected
    assert text.startswith("<think>") == (expected == "on")
