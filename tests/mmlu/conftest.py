"""Questions that share their beginnings."""

from __future__ import annotations

import pytest

from raylora.mmlu.prompts import build_shots, encode_questions
from raylora.records import Question
from tests.helpers.questions import questions_of_two_subjects


@pytest.fixture(scope="module")
def encoded(tokenizer):
    questions = questions_of_two_subjects()
    dev = [
        Question(s, f"Solved {i} of {s}?", ("w", "x", "y", "z"), i, "") for s in ("anatomy", "virology") for i in (1, 2)
    ]
    return encode_questions(tokenizer, questions, build_shots(dev, ["anatomy", "virology"], 2), "harness", 2048)
