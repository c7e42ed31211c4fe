"""How many examples have a near copy: a search by TF-IDF cosine."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.sparse import csr_matrix, vstack
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

from raylora.features.words import words_of
from raylora.records import Example

DUPLICATE_COSINE = 0.8
MAX_PAIRS = 2_000_000
"""Pairs of rows looked at together."""
PAIRS_AT_ONCE = 100_000
ROWS_AT_ONCE = 50_000


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
