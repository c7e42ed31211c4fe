"""Which letter a written answer names: right is what a person reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.mmlu.letters import closing_mark, open_thought, read_letter

WRITTEN = Path(__file__).parents[1] / "helpers" / "data" / "written_answers.jsonl"
"""Texts as models write them, each with the letter that a person reads; no letter where a person would not be sure."""


def letter_of(text: str) -> str:
    number = read_letter(text)
    return "" if number is None else "ABCD"[number]


def test_a_person_reads_the_same_letter_or_none():
    written = [json.loads(line) for line in WRITTEN.read_text(encoding="utf-8").splitlines()]
    assert len(written) > 300
    assert not [(text, letter, found) for letter, text in written if (found := letter_of(text)) != letter]


FORMS = (
    "{}", "({})", "{}.", "{})", "{}:", "[{}]", "{{{}}}", "**{}**", "`{}`", '"{}"', "\\boxed{{{}}}",
    "$\\boxed{{\\text{{{}}}}}$",
    "{}) banana", "{}. banana", "({}) banana", "**{}.** banana", "Answer: {}", "Answer: ({})", "The answer is {}",
    "The answer is ({}).", "The correct answer is **{}**.", "So the answer is {}, not E", "Option {} is correct.",
    "I would say {}.", "It is {}", "It must be {}.", "{} is correct", "{} is the best answer, I think",
    "<answer>{}</answer>",
    "La réponse est {}.", "La respuesta correcta es la {}", "Die richtige Antwort ist {}.",
    "答案是{}", "答案：{}。", "选{}", "正解は{}です",
)  # fmt: skip
SPACE = st.text("  \n\t", max_size=3)


@given(
    st.sampled_from(FORMS), st.sampled_from("ABCD"), SPACE, SPACE, st.booleans(), st.sampled_from(["", "**", "_", "> "])
)
def test_each_letter_in_each_known_form_is_read(form, letter, before, behind, full_width, mark):
    written = chr(ord(letter) + 0xFEE0) if full_width else letter
    closing = "" if mark == "> " else mark
    assert letter_of(f"{before}{mark}{form.format(written)}{closing}{behind}") == letter


@given(st.sampled_from(FORMS), st.sampled_from("ABCD"), st.text(max_size=40))
def test_what_was_thought_counts_for_nothing(form, letter, thought):
    thought = thought.replace("<", " ")
    assert letter_of(f"<think>{thought} The answer is B.</think>\n\n{form.format(letter)}") == letter
    assert letter_of(f"<think>{thought} {form.format(letter)}") == "", "cut off while it was thinking"


@pytest.mark.parametrize("opening", ["<think>", "<thinking>", "[THINK]", "<|START_THINKING|>", "<seed:think>"])
def test_a_thinking_part_is_known_by_its_marks(opening):
    closing = closing_mark(opening)
    assert open_thought(f"user\nWhat?\nassistant\n{opening}\n") == opening
    assert open_thought(f"{opening}\n\n{closing}\n\n") is None
    assert letter_of(f"{opening}A or B?{closing}C") == "C"
    assert letter_of(f"It is B, no wait{closing}\n\nC") == "C", "where the prompt has begun it"


def test_a_channel_is_a_thinking_part_too():
    assert letter_of("<|channel|>analysis<|message|>B?<|start|>assistant<|channel|>final<|message|>C") == "C"
    assert letter_of("<|channel|>analysis<|message|>The answer is B") == ""


@given(st.text(max_size=200) | st.text("ABCDabcd .,:;()or and\n*'\\{}", max_size=80))
def test_no_text_is_an_error(text):
    assert read_letter(text) in (None, 0, 1, 2, 3)


@pytest.mark.timeout(60)  # a pattern that runs in square time, or worse, would take hours
@pytest.mark.parametrize(
    "part", ["the ", "is   ", "A ", "A, ", "(", "answer is ", "not A but ", "\n", "yes ", "**A", "\\text{"]
)
def test_a_long_text_is_read_in_no_time(part):
    read_letter(part * (8000 // len(part)) + "B")
