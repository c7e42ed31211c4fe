"""Which letter a written answer names: right is what a person reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.mmlu.letters import closing_mark, open_thought, read_letter
from raylora.mmlu.questions import LETTERS

DATA = Path(__file__).parents[1] / "helpers" / "data"
WRITTEN = {4: DATA / "written_answers.jsonl", 10: DATA / "written_answers_of_ten.jsonl"}
"""By number of choices, texts as models write them, each with the letter that a person reads; no letter where a person
would not be sure."""


def letter_of(text: str, num_choices: int = 4) -> str:
    number = read_letter(text, num_choices)
    return "" if number is None else LETTERS[number]


@pytest.mark.parametrize(("num_choices", "at_least"), [(4, 546), (10, 200)])
def test_a_person_reads_the_same_letter_or_none(num_choices, at_least):
    written = [json.loads(line) for line in WRITTEN[num_choices].read_text(encoding="utf-8").splitlines()]
    assert len(written) >= at_least
    found = [(text, letter, letter_of(text, num_choices)) for letter, text in written]
    assert not [(text, letter, read) for text, letter, read in found if letter != read]


@pytest.mark.parametrize("num_choices", [5, 8, 9, 10])
def test_more_choices_change_nothing_in_the_other_answers(num_choices):
    """But for the letter E, which is no choice of four."""
    written = [json.loads(line) for line in WRITTEN[4].read_text(encoding="utf-8").splitlines()]
    assert {text for letter, text in written if letter_of(text, num_choices) != letter} == {"E", "e"}


@pytest.mark.parametrize(
    ("num_choices", "text", "letter"),
    [
        (2, "C", ""), (2, "The answer is C", ""), (2, "(B) yes", "B"), (2, "The answer is A.", "A"), (2, "b", "B"),
        (2, "C, not A", ""), (2, "Vitamin C", ""), (3, "C", "C"), (3, "D", ""), (3, "Option D is correct", ""),
        (5, "E", "E"), (5, "F", ""), (5, "E is wrong, so C", "C"), (8, "I", ""), (8, "I think H", "H"),
        (8, "The answer is I", ""), (9, "I", "I"), (9, "J", ""), (10, "J", "J"), (10, "K", ""),
    ],
)  # fmt: skip
def test_a_letter_beyond_the_choices_is_no_answer(num_choices, text, letter):
    assert letter_of(text, num_choices) == letter


FORMS = (
    "{}", "({})", "{}.", "{})", "{}:", "[{}]", "{{{}}}", "**{}**", "`{}`", '"{}"', "\\boxed{{{}}}",
    "$\\boxed{{\\text{{{}}}}}$",
    "{}) banana", "{}. banana", "({}) banana", "**{}.** banana", "Answer: {}", "Answer: ({})", "The answer is {}",
    "The answer is ({}).", "The correct answer is **{}**.", "So the answer is {}, not K", "Option {} is correct.",
    "I would say {}.", "It is {}", "It must be {}.", "{} is correct", "{} is the best answer, I think",
    "<answer>{}</answer>",
    "La réponse est {}.", "La respuesta correcta es la {}", "Die richtige Antwort ist {}.",
    "答案是{}", "答案：{}。", "选{}", "正解は{}です",
)  # fmt: skip
SPACE = st.text("  \n\t", max_size=3)


@given(
    st.sampled_from(FORMS), st.integers(2, 10), st.data(), SPACE, SPACE, st.booleans(),
    st.sampled_from(["", "**", "_", "> "]),
)  # fmt: skip
def test_each_letter_in_each_known_form_is_read(form, num_choices, data, before, behind, full_width, mark):
    letter = data.draw(st.sampled_from(LETTERS))
    written = chr(ord(letter) + 0xFEE0) if full_width else letter
    closing = "" if mark == "> " else mark
    expected = letter if letter in LETTERS[:num_choices] else ""
    assert letter_of(f"{before}{mark}{form.format(written)}{closing}{behind}", num_choices) == expected


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


@given(st.text(max_size=200) | st.text("ABCDIJabcdi .,:;()or and\n*'\\{}", max_size=80), st.integers(2, 10))
def test_no_text_is_an_error(text, num_choices):
    assert read_letter(text, num_choices) in (None, *range(num_choices))


@pytest.mark.timeout(60)  # a pattern that runs in square time, or worse, would take hours
@pytest.mark.parametrize(
    "part", ["the ", "is   ", "A ", "A, ", "(", "answer is ", "not A but ", "\n", "yes ", "**A", "\\text{", "I ", "I, "]
)
def test_a_long_text_is_read_in_no_time(part):
    read_letter(part * (8000 // len(part)) + "B", 10)
