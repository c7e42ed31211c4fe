"""Features that need no model: sizes, words, characters, duplicates, groundedness."""

from __future__ import annotations

import hashlib
import itertools
import math
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import regex
from scipy.sparse import csr_matrix, vstack
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

from raylora.records import Example

DUPLICATE_COSINE = 0.8
LONG_WORD = 8
CHUNK = 512
"""Texts tokenized together."""
MAX_PAIRS = 2_000_000
"""Pairs of rows looked at together."""
PAIRS_AT_ONCE = 100_000
ROWS_AT_ONCE = 50_000
_WORD = regex.compile(r"[\p{Han}\p{Hiragana}]|(?:(?![\p{Han}\p{Hiragana}])[\w\p{M}])+")
_ASCII_WORD = regex.compile(r"\w+", regex.ASCII)


def words_of(text: str) -> list[str]:
    """Unicode words, case-folded: runs of letters, marks, digits and underscores.

    Marks belong to their letter: vowels of Indic scripts are such. Where a script writes no spaces, each ideograph is a
    word, as in Unicode's rules (UAX 29).
    """
    folded = text.casefold()
    words: list[str] = (_ASCII_WORD if folded.isascii() else _WORD).findall(folded)
    return words


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
        if len(self._texts) == CHUNK:
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


def duplicate_share(examples: Sequence[Example]) -> float:
    """Share of examples with another one at TF-IDF cosine above 0.8, question and answer taken together."""
    return share_with_a_double(_Texts(examples))


class _Texts:
    """Question and answer of each example, made anew in every pass."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __iter__(self) -> Iterator[str]:
        return (f"{e.messages[-1].content}\n{e.answer}" for e in self._examples)


def share_with_a_double(texts: Iterable[str]) -> float:
    """Share of texts with another one at TF-IDF cosine above 0.8. Equal texts are found by themselves.

    ``texts`` are read twice; a list is as good as what makes them anew.
    """
    numbers: dict[bytes, int] = {}
    counts = array("q")
    is_first = bytearray()
    for text in texts:
        number = numbers.setdefault(
            hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), len(counts)
        )
        is_first.append(number == len(counts))
        if is_first[-1]:
            counts.append(0)
        counts[number] += 1
    del numbers
    try:
        vectorizer = CountVectorizer(analyzer=words_of, dtype=np.float32)
        words = vectorizer.fit_transform(itertools.compress(texts, is_first))
    except ValueError:  # no words at all: only equal texts are alike
        words = None
    weight = np.array(counts)
    doubled = weight > 1
    if words is not None:
        words.sort_indices()  # by word, so that the file's order does not move a sum of floats
        mark_similar_rows(TfidfTransformer().fit(words).transform(words, copy=False), doubled)
    return float(weight[doubled].sum() / weight.sum())


def mark_similar_rows(matrix: csr_matrix, marked: np.ndarray) -> None:
    """Set ``marked`` for each row of unit length that has another one at a cosine above 0.8.

    All-pairs similarity search with prefix filtering (Bayardo, Ma and Srikant 2007), exact: a row's most common words,
    as long as their part of the row is shorter than 0.8, cannot by themselves make a pair similar. A similar pair thus
    shares one of the other, rarer words, of which few rows have any, and what it has in common there must be enough
    (``_Beginnings``). Memory grows with the pairs looked at together, not with the square of the number of rows; rows
    that are marked already are not looked up again.
    """
    frequency = np.bincount(matrix.indices, minlength=matrix.shape[1])
    place = np.empty(matrix.shape[1], dtype=matrix.indices.dtype)
    place[np.argsort(-frequency, kind="stable")] = np.arange(matrix.shape[1])
    matrix = csr_matrix((matrix.data, place[matrix.indices], matrix.indptr), shape=matrix.shape)
    matrix.sort_indices()
    rare = _without_common_words(matrix)
    beginnings = _Beginnings(matrix, rare)
    columns = rare.T.tocsr()
    in_column = np.diff(columns.indptr).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(in_column[rare.indices])])
    num_pairs = np.diff(total[rare.indptr])
    rows = np.flatnonzero(~marked & (num_pairs > 0))
    while len(rows):
        size = max(1, int(np.searchsorted(np.cumsum(num_pairs[rows]), MAX_PAIRS, side="right")))
        block, rows = rows[:size], rows[size:]
        pairs = (rare[block] @ columns).tocoo()
        left, right = block[pairs.row], pairs.col
        possible = left != right
        possible[possible] = beginnings.most(left[possible], right[possible], pairs.data[possible]) > DUPLICATE_COSINE
        left, right = left[possible], right[possible]
        for start in range(0, len(left), PAIRS_AT_ONCE):
            i, j = left[start : start + PAIRS_AT_ONCE], right[start : start + PAIRS_AT_ONCE]
            cosines = np.asarray(matrix[i].multiply(matrix[j]).sum(axis=1)).ravel()
            similar = cosines > DUPLICATE_COSINE
            marked[i[similar]] = marked[j[similar]] = True
        rows = rows[~marked[rows]]


class _Beginnings:
    """The most that two rows' cosine can be, known their rarer words (after L2AP, Anastasiu and Karypis 2014).

        row i   common words | rarer words
        row j   common words       | rarer words
                ---- u, v ---------|-- known --

    Their products right of both borders are known. Left of the later border they are no more than the lengths of u and
    v multiplied (Cauchy and Schwarz).
    """

    def __init__(self, matrix: csr_matrix, rare: csr_matrix) -> None:
        self._num_words = matrix.shape[1]
        # In place: these are the largest arrays of the search.
        self._keys = np.repeat(np.arange(matrix.shape[0], dtype=np.int64) * self._num_words, np.diff(matrix.indptr))
        self._keys += matrix.indices
        self._squares = np.zeros(len(matrix.data) + 1)
        np.multiply(matrix.data, matrix.data, out=self._squares[1:], dtype=np.float64)
        np.cumsum(self._squares, out=self._squares)
        self._starts = matrix.indptr[:-1]
        self._borders = np.full(matrix.shape[0], self._num_words, dtype=np.int64)
        filled = np.diff(rare.indptr) > 0
        self._borders[filled] = rare.indices[rare.indptr[:-1][filled]]
        self._common = self._length(np.arange(matrix.shape[0]), self._borders)

    def _length(self, rows: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Of each row's part before a word."""
        ends = np.searchsorted(self._keys, rows.astype(np.int64) * self._num_words + words)
        return np.sqrt(np.maximum(self._squares[ends] - self._squares[self._starts[rows]], 0))

    def most(self, left: np.ndarray, right: np.ndarray, known: np.ndarray) -> np.ndarray:
        """An upper bound of the cosine of each pair, (N,); ``known`` are the products of their rarer words."""
        later = self._borders[left] > self._borders[right]
        early, late = np.where(later, right, left), np.where(later, left, right)
        bound = known + self._common[late]  # no beginning is longer than 1
        near = bound > DUPLICATE_COSINE
        early, late = early[near], late[near]
        bound[near] = known[near] + self._length(early, self._borders[late]) * self._common[late]
        return bound + 1e-5  # the matrix is in single precision


def _without_common_words(matrix: csr_matrix) -> csr_matrix:
    """Each row without its most common words, which come first, as long as their part is shorter than 0.8."""
    kept = []
    for start in range(0, matrix.shape[0], ROWS_AT_ONCE):
        rows = matrix[start : start + ROWS_AT_ONCE]
        total = np.concatenate([[0.0], np.cumsum(rows.data.astype(np.float64) ** 2)])
        before = np.repeat(total[rows.indptr[:-1]], np.diff(rows.indptr))
        rare = total[1:] - before >= DUPLICATE_COSINE**2 - 1e-6
        ends = np.concatenate([[0], np.cumsum(rare)])[rows.indptr]
        kept.append(csr_matrix((rows.data[rare], rows.indices[rare], ends), shape=rows.shape))
    return vstack(kept, format="csr")
