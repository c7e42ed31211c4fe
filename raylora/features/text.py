"""Features from the text alone: lengths, words, characters, near-duplicates, groundedness."""

from __future__ import annotations

import math
import unicodedata
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from raylora.data.encoding import CHARS_TOGETHER
from raylora.data.long_texts import LONG, pieces_of
from raylora.data.rendering import rendering_of
from raylora.features.duplicates import duplicate_share
from raylora.features.words import first_words, words_of
from raylora.records import Example

LONG_WORD = 8
"""Characters; a word with more of them counts for ``vocab_complexity``."""
TOKENIZED_AT_ONCE = 512
"""Texts in one call of the tokenizer."""


def text_features(examples: Sequence[Example], tokenizer: Any) -> tuple[dict[str, float | None], dict[str, str]]:
    """Features of all examples' words, characters and token counts, and the reason for each that is None.

    Examples, which may lie on disk, are read one by one in two passes. What is kept of each is a few numbers, the hash
    of its text and its row of word counts (some 4 kB).
    """
    scores = {name: array("d") for name in ("in_ttr", "out_ttr", "repetition", "grounded")}
    characters: Counter[str] = Counter()
    num_words = num_long = 0
    counter = _TokenCounter(tokenizer)
    for example in examples:
        question = example.asked
        question_words, answer_words = first_words(question), first_words(example.answer)
        for name, words in (("in_ttr", question_words), ("out_ttr", answer_words)):
            if words:
                scores[name].append(len(set(words)) / len(words))
        if len(answer_words) >= 3:
            scores["repetition"].append(repetition(answer_words))
        if ground := example.context or example.question:  # a plain text has neither
            grounded = _groundedness(first_words(ground), answer_words)
            if grounded is not None:
                scores["grounded"].append(grounded)
        for words in (question_words, answer_words):
            num_words += len(words)
            num_long += sum(len(word) > LONG_WORD for word in words)
        characters.update(question)
        characters.update(example.answer)
        counter.add(question.strip())
        counter.add(example.answer.strip())
    num_in, num_out = counter.counts().reshape(-1, 2).T  # questions and answers were added by turns
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
    """The number of tokens of each text, without special tokens. Texts are tokenized in batches, and not kept."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._num_chars = 0
        self._counts = array("q")

    def add(self, text: str) -> None:
        if len(text) > LONG:
            self._count()
            self._counts.append(sum(map(self._num_tokens, pieces_of(text))))
            return
        self._texts.append(text)
        self._num_chars += len(text)
        if len(self._texts) == TOKENIZED_AT_ONCE or self._num_chars > CHARS_TOGETHER:
            self._count()

    def counts(self) -> np.ndarray:
        """(N,), as floats: the tokens of each text, in the order they were added."""
        self._count()
        return np.array(self._counts, dtype=float)

    def _num_tokens(self, text: str) -> int:
        return len(self._tokenize([text])[0])

    def _count(self) -> None:
        if self._texts:
            self._counts.extend(map(len, self._tokenize(self._texts)))
        self._texts, self._num_chars = [], 0

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # As in a training: special tokens that are written in the data are text.
        split = not rendering_of(self._tokenizer).allow_special_tokens
        options = {"add_special_tokens": False, "return_attention_mask": False, "split_special_tokens": split}
        return list(self._tokenizer(texts, **options)["input_ids"])


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None  # an exact sum does not depend on the file's order


def repetition(words: Sequence[str]) -> float:
    """Share of 3-grams that repeat another: 1 - distinct 3-grams / 3-grams (seq-rep-3, Welleck et al. 2020).

    Args:
        words: three or more.
    """
    grams = ngrams(words, 3)
    return 1 - len(set(grams)) / len(grams)


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of ``n`` words, in their order; none where there are fewer words."""
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


def _groundedness(context_words: Sequence[str], answer_words: Sequence[str]) -> float | None:
    shares = []
    for n in (1, 2, 3):
        if grams := ngrams(answer_words, n):
            context_grams = set(ngrams(context_words, n))
            shares.append(sum(gram in context_grams for gram in grams) / len(grams))
    return sum(shares) / len(shares) if shares else None
