"""Sequences of examples: a tuple where they are few, on disk where they are many; and a seeded order by content.

All examples' digests are in memory together, an array (N, 32) of bytes: the SHA-256 of each.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from raylora.data.disk_list import DiskList
from raylora.records import Example, Message, digests_of

__all__ = ["MEMORY_CHARS", "Chosen", "StoredExamples", "digests_of", "keep_examples", "order_by_content"]

MEMORY_CHARS = 16_000_000
"""A dataset whose examples have more characters than this goes to disk."""


class _Examples(Sequence[Example]):
    """What a sequence needs beside ``_read`` and ``__len__``, which subclasses have."""

    @abstractmethod
    def _read(self, number: int) -> Example:
        """The example at ``number``, which is one of 0 to ``len(self) - 1``."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return Chosen(self, np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._read(index % len(self))

    def __iter__(self) -> Iterator[Example]:
        return (self._read(number) for number in range(len(self)))


class StoredExamples(_Examples):
    """Examples on disk, read one by one whenever they are used. About 40 bytes of each stay in memory."""

    def __init__(self) -> None:
        self._disk_list = DiskList()
        self._digests = bytearray()

    def append(self, example: Example) -> None:
        """Raises MachineError where the disk is full."""
        self._digests += bytes.fromhex(example.digest)
        messages = [m.values for m in example.messages]
        # Most often the question is the last user message: None, so that it is not stored twice.
        question = None if example.question == example.asked else example.question
        rest = [example.context, example.conversation, example.num_repeated, example.tools]
        text = json.dumps([messages, example.answer, question, *rest], ensure_ascii=False)
        self._disk_list.append(text.encode("utf-8", "surrogatepass"))

    @property
    def digests(self) -> np.ndarray:
        """See ``digests_of``."""
        return np.frombuffer(self._digests, dtype=np.uint8).reshape(-1, 32)

    def __len__(self) -> int:
        return len(self._disk_list)

    def _read(self, number: int) -> Example:
        turns, answer, question, *rest = json.loads(self._disk_list[number].decode("utf-8", "surrogatepass"))
        example = Example(tuple(Message(*values) for values in turns), answer, question or "", *rest)
        return example if question is not None else replace(example, question=example.asked)


class Chosen(_Examples):
    """The examples at ``numbers`` (M,), in that order; nothing is copied."""

    def __init__(self, examples: Sequence[Example], numbers: np.ndarray) -> None:
        self._examples, self._numbers = examples, numbers

    @property
    def digests(self) -> np.ndarray:
        """See ``digests_of``."""
        return digests_of(self._examples)[self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def _read(self, number: int) -> Example:
        return self._examples[int(self._numbers[number])]


def count_chars(example: Example) -> int:
    """Characters of an example's messages and answer."""
    return len(example.answer) + sum(len(m.content) + len(m.extra) for m in example.messages)


def keep_examples(examples: Iterable[Example]) -> Sequence[Example]:
    """The same examples, in the same order, as a tuple or, beyond ``MEMORY_CHARS``, on disk.

    Raises:
        MachineError: the disk is full.
    """
    in_memory: list[Example] = []
    stored: StoredExamples | None = None
    num_chars = 0
    for example in examples:
        if stored is not None:
            stored.append(example)
            continue
        in_memory.append(example)
        num_chars += count_chars(example)
        if num_chars > MEMORY_CHARS:
            stored = StoredExamples()
            for earlier in in_memory:
                stored.append(earlier)
            in_memory = []
    return tuple(in_memory) if stored is None else stored


def order_by_content(digests: np.ndarray, seed: int) -> np.ndarray:
    """The examples' indices, shape (N,), in a seeded order that does not depend on the file's.

    They are sorted by ``digest([seed, example.digest])``; equal examples stay in the file's order.

    Args:
        digests: (N, 32) bytes, of ``digests_of``.
    """
    keys = bytearray()
    for row in digests:
        keys += hashlib.sha256(f'[{seed},"{row.tobytes().hex()}"]'.encode()).digest()
    return sorted_rows(np.frombuffer(keys, dtype=np.uint8).reshape(-1, 32))


def sorted_rows(rows: np.ndarray) -> np.ndarray:
    """The indices (N,) that sort rows (N, 32) of bytes; equal rows stay in their order."""
    # Rows compare as four big-endian integers each; lexsort sorts by its last key first.
    return np.lexsort(np.ascontiguousarray(rows).view(">u8").T[::-1])
