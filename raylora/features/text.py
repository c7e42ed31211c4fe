"""Features that need no model: sizes, words, characters, duplicates, groundedness."""

from __future__ import annotations

import math
import unicodedata
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from raylora.features.duplicates import duplicate_share
from raylora.features.words import words_of
from raylora.records import Example

LONG_WORD = 8
COUNTED_AT_ONCE = 512
"""Texts tokenized together."""


def text_features(examples: Sequence[Example], tokenizer: Any) -> tuple[dict[str, float | None], dict[str, str]]:
    """Features of all examples' words and characters, and a note for each that cannot be measured.

    Examples are read twice, one after another. What is kept of each is a few numbers, its text's hash and its row of
    word counts.
    """
    scores = {name: array("d") for name in ("in_ttr", "out_ttr", "repetition", "grounded")}
    characters: Counter[str] = Counter()
    num_words = num_long = 0
    counter = _TokenCounter(tokenizer)
    for e in examples:
        question, answer = words_of(e.messages[-1].content), words_of(e.answer)
        for name, words in (("in_ttr", question), ("out_ttr", answer)):
            if words:
                scores[name].append(len(set(words)) / len(words))
        if len(answer) >= 3:
            scores["repetition"].append(repetition(answer))
        if (grounded := _groundedness(words_of(e.context or e.question), answer)) is not None:
            scores["grounded"].append(grounded)
        num_words += len(question) + len(answer)
        num_long += sum(len(w) > LONG_WORD for w in question) + sum(len(w) > LONG_WORD for w in answer)
        characters.update(e.messages[-1].content)
        characters.update(e.answer)
        counter.add(e.messages[-1].content.strip())
        counter.add(e.answer.strip())
    num_in, num_out = counter.counts().reshape(-1, 2).T
    values: dict[str, float | None] = {
        "avg_input_length": float(num_in.mean()),
        "input_length_std": float(num_in.std()),
        "avg_output_length": float(num_out.mean()),
        "output_length_std": float(num_out.std()),
        "io_length_ratio": float(num_out.mean() / num_in.mean()) if num_in.any() else None,
        "input_ttr": _mean(scores["in_ttr"]),
        "output_ttr": _mean(scores["out_ttr"]),
        "output_ngram_repetition": _mean(scores["repetition"]),
        "vocab_complexity": num_long / num_words if num_words else None,
        "special_char_ratio": _special_share(characters),
        "approximate_duplicates": duplicate_share(examples) if len(examples) > 1 else None,
        "answer_groundedness": _mean(scores["grounded"]),
    }
    reasons = {
        "io_length_ratio": "the questions have no tokens",
        "output_ngram_repetition": "no answer has three words",
        "approximate_duplicates": "needs two examples",
    }
    return values, {name: reasons.get(name, "no words") for name, value in values.items() if value is None}


class _TokenCounter:
    """Tokens of each text, special ones not added; texts are tokenized together and not kept."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._counts = array("q")

    def add(self, text: str) -> None:
        self._texts.append(text)
        if len(self._texts) == COUNTED_AT_ONCE:
            self._count()

    def counts(self) -> np.ndarray:
        if self._texts:
            self._count()
        return np.array(self._counts, dtype=float)

    def _count(self) -> None:
        encoded = self._tokenizer(self._texts, add_special_tokens=False, return_attention_mask=False)
        self._counts.extend(len(ids) for ids in encoded["input_ids"])
        self._texts = []


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None  # exact, so that the file's order does not move it


def repetition(words: Sequence[str]) -> float:
    """1 - distinct 3-grams / 3-grams of three words or more (seq-rep-3, Welleck et al. 2020)."""
    grams = ngrams(words, 3)
    return 1 - len(set(grams)) / len(grams)


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


@lru_cache(maxsize=1 << 16)
def _is_special(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"


def calculate_special_char_ratio(text: str) -> float | None:
    """Share of characters in Unicode categories P (punctuation) and S (symbols); None for an empty text."""
    return _special_share(Counter(text))


def _special_share(counts: Counter[str]) -> float | None:
    total = counts.total()
    return sum(n for c, n in counts.items() if _is_special(c)) / total if total else None


def calculate_answer_groundedness(context: str, answer: str) -> float | None:
    """Mean over n = 1, 2, 3 of the share of the answer's word n-grams that stand in ``context``; None without words."""
    return _groundedness(words_of(context), words_of(answer))


def _groundedness(known: Sequence[str], said: Sequence[str]) -> float | None:
    shares = []
    for n in (1, 2, 3):
        if grams := ngrams(said, n):
            there = set(ngrams(known, n))
            shares.append(sum(g in there for g in grams) / len(grams))
    return sum(shares) / len(shares) if shares else None
