"""How many examples have a near-duplicate: an exact all-pairs search by TF-IDF cosine."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.sparse import csr_matrix, vstack
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

from raylora.features.words import first_words
from raylora.records import Example

DUPLICATE_COSINE = 0.8
MAX_PAIRS = 2_000_000
"""Candidate pairs found at once; bounds the search's memory, like the two below."""
PAIRS_AT_ONCE = 100_000
"""Pairs whose exact cosine is computed at once."""
ROWS_AT_ONCE = 50_000
"""Rows whose common words are removed at once."""


def duplicate_share(examples: Sequence[Example]) -> float:
    """Share of examples with another one at TF-IDF cosine above 0.8, question and answer taken together."""
    return share_with_a_double(_Texts(examples))


class _Texts:
    """Question and answer of each example as one text, made anew in each pass: texts are not kept in memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __iter__(self) -> Iterator[str]:
        return (f"{e.asked}\n{e.answer}" for e in self._examples)


def share_with_a_double(texts: Iterable[str]) -> float:
    """Share of texts, 0 to 1, with another one at TF-IDF cosine above 0.8.

    Equal texts are found by their hash, so that the search sees each text once.

    Args:
        texts: read twice (a list, or an object that makes them anew in each pass; not an iterator).
    """
    row_of_hash: dict[bytes, int] = {}
    num_copies = array("q")  # of each distinct text, which is a row of the matrix
    is_first = bytearray()
    for text in texts:
        text_hash = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        row = row_of_hash.setdefault(text_hash, len(num_copies))
        is_first.append(row == len(num_copies))
        if is_first[-1]:
            num_copies.append(0)
        num_copies[row] += 1
    del row_of_hash  # its memory is free before the matrix is made
    try:
        vectorizer = CountVectorizer(analyzer=first_words, dtype=np.float32)
        word_counts = vectorizer.fit_transform(itertools.compress(texts, is_first))
    except ValueError:  # no words at all: only equal texts are alike
        word_counts = None
    weight = np.array(num_copies)
    has_duplicate = weight > 1
    if word_counts is not None:
        word_counts.sort_indices()  # by word, so that sums of floats do not depend on the file's order
        mark_similar_rows(TfidfTransformer().fit(word_counts).transform(word_counts, copy=False), has_duplicate)
    return float(weight[has_duplicate].sum() / weight.sum())


def mark_similar_rows(matrix: csr_matrix, marked: np.ndarray) -> None:
    """Set ``marked`` for each row that has another row at a cosine above 0.8.

    All-pairs similarity search with prefix filtering (Bayardo, Ma and Srikant 2007), exact. The prefix of a row is its
    most common words, as many as together have a norm below 0.8: two rows that share no word outside both prefixes
    cannot be similar. So candidates are the pairs that share such a rare word, which few rows have. Most are ruled out
    by an upper bound of their cosine (1.1 s in place of 3.5 for 32,000 texts, benchmarks/NOTES.md); the cosine of the
    others is computed.

    Memory grows with the pairs in one block, not with the square of the number of rows. Rows that are marked already
    are not searched for again.

    Args:
        matrix: rows of unit length, (rows, words).
        marked: changed in place, (rows,).
    """
    # Columns from the most common word to the rarest, so that a row's prefix is its first entries.
    frequency = np.bincount(matrix.indices, minlength=matrix.shape[1])
    new_column = np.empty(matrix.shape[1], dtype=matrix.indices.dtype)
    new_column[np.argsort(-frequency, kind="stable")] = np.arange(matrix.shape[1])
    matrix = csr_matrix((matrix.data, new_column[matrix.indices], matrix.indptr), shape=matrix.shape)
    matrix.sort_indices()
    rare = _without_common_words(matrix)
    bound = _CosineBound(matrix, rare)
    rare_by_word = rare.T.tocsr()
    num_rows_with = np.diff(rare_by_word.indptr).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(num_rows_with[rare.indices])])
    num_pairs = np.diff(total[rare.indptr])  # of each row: an upper bound of its candidate pairs
    rows = np.flatnonzero(~marked & (num_pairs > 0))
    while len(rows):
        size = max(1, int(np.searchsorted(np.cumsum(num_pairs[rows]), MAX_PAIRS, side="right")))
        block, rows = rows[:size], rows[size:]
        pairs = (rare[block] @ rare_by_word).tocoo()
        left, right = block[pairs.row], pairs.col
        possible = left != right
        possible[possible] = bound.of(left[possible], right[possible], pairs.data[possible]) > DUPLICATE_COSINE
        left, right = left[possible], right[possible]
        for start in range(0, len(left), PAIRS_AT_ONCE):
            i, j = left[start : start + PAIRS_AT_ONCE], right[start : start + PAIRS_AT_ONCE]
            cosines = np.asarray(matrix[i].multiply(matrix[j]).sum(axis=1)).ravel()
            similar = cosines > DUPLICATE_COSINE
            marked[i[similar]] = marked[j[similar]] = True
        rows = rows[~marked[rows]]


class _CosineBound:
    """An upper bound of two rows' cosine, given their rare words' product (after L2AP, Anastasiu and Karypis 2014).

        row i   prefix | rare words
        row j   prefix       | rare words
                --- u, v ----|- product -

    Right of both borders the product is known. Left of the later border it is at most the product of the norms of u and
    v (Cauchy-Schwarz).
    """

    def __init__(self, matrix: csr_matrix, rare: csr_matrix) -> None:
        self._num_words = matrix.shape[1]
        # A key for each entry, row * num_words + word, sorted: ``searchsorted`` finds a row's entries before a word.
        # Computed in place: these are the largest arrays of the search.
        self._keys = np.repeat(np.arange(matrix.shape[0], dtype=np.int64) * self._num_words, np.diff(matrix.indptr))
        self._keys += matrix.indices
        self._squares = np.zeros(len(matrix.data) + 1)
        np.multiply(matrix.data, matrix.data, out=self._squares[1:], dtype=np.float64)
        np.cumsum(self._squares, out=self._squares)
        self._starts = matrix.indptr[:-1]
        self._borders = np.full(matrix.shape[0], self._num_words, dtype=np.int64)
        has_rare = np.diff(rare.indptr) > 0
        self._borders[has_rare] = rare.indices[rare.indptr[:-1][has_rare]]
        self._prefix_norms = self._norms_before(np.arange(matrix.shape[0]), self._borders)

    def _norms_before(self, rows: np.ndarray, words: np.ndarray) -> np.ndarray:
        """The norm of each row's entries before a word, (N,)."""
        ends = np.searchsorted(self._keys, rows.astype(np.int64) * self._num_words + words)
        return np.sqrt(np.maximum(self._squares[ends] - self._squares[self._starts[rows]], 0))

    def of(self, left: np.ndarray, right: np.ndarray, rare_products: np.ndarray) -> np.ndarray:
        """An upper bound of the cosine of each pair of rows, (N,).

        Args:
            left: row indices, (N,); ``right`` as well.
            rare_products: the products of the pairs' rare words, (N,).
        """
        is_later = self._borders[left] > self._borders[right]
        early, late = np.where(is_later, right, left), np.where(is_later, left, right)
        bounds = rare_products + self._prefix_norms[late]  # first without the norm of u, which is at most 1
        close = bounds > DUPLICATE_COSINE
        early, late = early[close], late[close]
        u_norms = self._norms_before(early, self._borders[late])  # a binary search each: only where it can decide
        bounds[close] = rare_products[close] + u_norms * self._prefix_norms[late]
        return bounds + 1e-5  # for rounding: the matrix is in single precision


def _without_common_words(matrix: csr_matrix) -> csr_matrix:
    """Each row without its prefix: its first (most common) words, as many as together have a norm below 0.8."""
    kept = []
    for start in range(0, matrix.shape[0], ROWS_AT_ONCE):
        rows = matrix[start : start + ROWS_AT_ONCE]
        squares = np.concatenate([[0.0], np.cumsum(rows.data.astype(np.float64) ** 2)])
        before_row = np.repeat(squares[rows.indptr[:-1]], np.diff(rows.indptr))
        is_rare = squares[1:] - before_row >= DUPLICATE_COSINE**2 - 1e-6  # 1e-6 for rounding, in single precision
        ends = np.concatenate([[0], np.cumsum(is_rare)])[rows.indptr]
        kept.append(csr_matrix((rows.data[is_rare], rows.indices[is_rare], ends), shape=rows.shape))
    return vstack(kept, format="csr")
