"""Features that need no model: sizes, words, characters, duplicates, groundedness."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from raylora.records import Example

DUPLICATE_COSINE = 0.8
LONG_WORD = 8
BLOCK_ROWS = 1024
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Unicode words, case-folded."""
    return _WORD.findall(text.casefold())


def text_features(
    examples: Sequence[Example], question_lengths: Sequence[int], answer_lengths: Sequence[int]
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Features of the sample's words and characters, and a note for each that cannot be measured.

    Args:
        question_lengths: tokens of each example's question with its context.
        answer_lengths: tokens of each example's answer.
    """
    questions = [words_of(e.messages[-1].content) for e in examples]
    answers = [words_of(e.answer) for e in examples]
    texts = [f"{e.messages[-1].content}\n{e.answer}" for e in examples]
    num_in, num_out = np.asarray(question_lengths, float), np.asarray(answer_lengths, float)
    grounded = [calculate_answer_groundedness(e.context or e.question, e.answer) for e in examples]
    values: dict[str, float | None] = {
        "avg_input_length": float(num_in.mean()),
        "input_length_std": float(num_in.std()),
        "avg_output_length": float(num_out.mean()),
        "output_length_std": float(num_out.std()),
        "io_length_ratio": float(num_out.mean() / num_in.mean()) if num_in.any() else None,
        "input_ttr": _mean(len(set(w)) / len(w) for w in questions if w),
        "output_ttr": _mean(len(set(w)) / len(w) for w in answers if w),
        "output_ngram_repetition": _mean(repetition(w) for w in answers if len(w) >= 3),
        "vocab_complexity": _mean(len(w) > LONG_WORD for row in (*questions, *answers) for w in row),
        "special_char_ratio": calculate_special_char_ratio("".join(texts)),
        "approximate_duplicates": duplicate_share(texts) if len(texts) > 1 else None,
        "answer_groundedness": _mean(g for g in grounded if g is not None),
    }
    reasons = {
        "io_length_ratio": "the questions have no tokens",
        "output_ngram_repetition": "no answer has three words",
        "approximate_duplicates": "needs two examples",
    }
    return values, {name: reasons.get(name, "no words") for name, value in values.items() if value is None}


def _mean(values: Iterable[float]) -> float | None:
    array = np.fromiter(values, float)
    return float(array.mean()) if len(array) else None


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
    counts = Counter(text)
    return sum(n for c, n in counts.items() if _is_special(c)) / len(text) if text else None


def calculate_answer_groundedness(context: str, answer: str) -> float | None:
    """Mean over n = 1, 2, 3 of the share of the answer's word n-grams that stand in ``context``; None without words."""
    known, said = words_of(context), words_of(answer)
    shares = []
    for n in (1, 2, 3):
        if grams := ngrams(said, n):
            there = set(ngrams(known, n))
            shares.append(sum(g in there for g in grams) / len(grams))
    return sum(shares) / len(shares) if shares else None


def duplicate_share(texts: Sequence[str]) -> float:
    """Share of texts with another one at TF-IDF cosine above 0.8.

    Equal texts are found by themselves, the others by sparse products of a block of rows with all: memory grows with
    what is similar, not with the square of the number of texts.
    """
    counts = Counter(texts)
    distinct = sorted(counts)  # sorted, so that the file's order does not move a sum of floats
    repeated = np.array([counts[t] > 1 for t in distinct])
    try:
        # The default pattern drops one-letter words, and with them whole scripts.
        matrix = TfidfVectorizer(token_pattern=r"\w+", dtype=np.float32).fit_transform(distinct)
    except ValueError:  # no words at all: only equal texts are alike
        matrix = None
    if matrix is not None:
        transposed = matrix.T.tocsr()
        for start in range(0, len(distinct), BLOCK_ROWS):
            similar = (matrix[start : start + BLOCK_ROWS] @ transposed).tocoo()
            far = (similar.data > DUPLICATE_COSINE) & (similar.row + start != similar.col)
            repeated[start + similar.row[far]] = True
    return sum(counts[t] for t, r in zip(distinct, repeated, strict=True) if r) / len(texts)
