"""``--scoring cloze``: the choice whose text is likeliest behind the question, which does not show the choices.

A text's log-likelihood is a sum over its tokens, so that short texts win. What it is divided by is an option: by
default the number of characters, as lm-evaluation-harness' ``acc_norm`` has it for MMLU's ``continuation`` tasks. The
sums are stored with all the lengths, so that every variant can be computed from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from raylora.config.options import ClozePer
from raylora.mmlu.prompts import EncodedQuestion
from raylora.mmlu.questions import LETTERS

COLUMNS: dict[ClozePer, str] = {"character": "num_characters", "byte": "num_bytes", "token": "num_tokens"}
"""How the columns of the lengths begin; a letter follows."""


def lengths_of(encoded: EncodedQuestion, per: ClozePer) -> list[int]:
    """What the log-likelihood of each choice is divided by; 1 for an empty text."""
    choices = encoded.question.choices
    lengths = {
        "character": [len(choice) for choice in choices],
        "byte": [len(choice.encode()) for choice in choices],
        "token": [len(continuation) for continuation in encoded.continuations],
        "choice": [1] * len(choices),
    }[per]
    return [max(1, length) for length in lengths]


def predict(encoded: EncodedQuestion, logprobs: list[float], per: ClozePer) -> int:
    """The choice of the highest log-likelihood by ``per``; the first of equal ones."""
    return int(np.argmax(np.divide(logprobs, lengths_of(encoded, per))))


def by_letter(name: str, letters: str, values: Sequence[float]) -> dict[str, float]:
    """A question's columns, ``name_a`` and so on, a value for each of ``letters``; NaN where it has no such choice."""
    columns = [f"{name}_{letter.lower()}" for letter in letters]
    return dict(zip(columns, [*values, *[math.nan] * (len(letters) - len(values))], strict=True))


def columns_of(encoded: EncodedQuestion, letters: str) -> dict[str, float]:
    """A question's columns of lengths, for each of ``letters``; NaN where it has no such choice."""
    of_each = (by_letter(name, letters, lengths_of(encoded, per)) for per, name in COLUMNS.items())
    return {name: length for lengths in of_each for name, length in lengths.items()}


def letters_of(questions: pd.DataFrame) -> list[str]:
    """The letters of the choices that a score's questions have columns for."""
    return [letter for letter in LETTERS if f"logprob_{letter.lower()}" in questions]


def normalised(questions: pd.DataFrame, per: ClozePer) -> np.ndarray:
    """Log-likelihoods (N, choices) by ``per``, from a score's questions; NaN where one has no such choice."""
    names = [letter.lower() for letter in letters_of(questions)]
    sums = questions[[f"logprob_{name}" for name in names]].to_numpy(dtype=float)
    if per == "choice":
        return sums
    divided: np.ndarray = sums / questions[[f"{COLUMNS[per]}_{name}" for name in names]].to_numpy()
    return divided


def accuracies(questions: pd.DataFrame) -> dict[str, Any]:
    """The accuracy by each variant, ``accuracy_per_choice`` and so on; nothing of a score that is not cloze."""
    if f"{COLUMNS['character']}_a" not in questions:
        return {}
    right = questions["answer"].map(LETTERS.index).to_numpy()
    variants: tuple[ClozePer, ...] = ("choice", "character", "byte", "token")
    likeliest = {per: np.nanargmax(normalised(questions, per), axis=1) for per in variants}
    return {f"accuracy_per_{per}": float((chosen == right).mean()) for per, chosen in likeliest.items()}
