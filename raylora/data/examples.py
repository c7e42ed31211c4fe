"""Many examples: a tuple where they are few, on disk where they are many, and the order that their content gives them.

What all of them need at once, their identities, is one array of shape (N, 32), the bytes of SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

from raylora.data.disk_list import DiskList
from raylora.records import Example, Message, digests_of

__all__ = ["MEMORY_CHARS", "Chosen", "StoredExamples", "digests_of", "keep_examples", "order_by_content"]

MEMORY_CHARS = 16_000_000
"""Examples of more characters than this go to disk."""


class _Examples(Sequence[Example]):
    """A sequence by what it can read one at a time."""

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
    """Examples that lie on disk, each read when it is asked for."""

    def __init__(self) -> None:
        self._spool = DiskList()
        self._digests = bytearray()

    def append(self, example: Example) -> None:
        """Raises MachineError where the disk is full."""
        self._digests += bytes.fromhex(example.digest)
        messages = [[m.role, m.content] for m in example.messages]
        # The question is most often the last message: there it need not stand twice.
        question = None if example.question == example.messages[-1].content else example.question
        text = json.dumps([messages, example.answer, question, example.context], ensure_ascii=False)
        self._spool.append(text.encode("utf-8", "surrogatepass"))

    @property
    def digests(self) -> np.ndarray:
        return np.frombuffer(self._digests, dtype=np.uint8).reshape(-1, 32)

    def __len__(self) -> int:
        return len(self._spool)

    def _read(self, number: int) -> Example:
        messages, answer, question, context = json.loads(self._spool[number].decode("utf-8", "surrogatepass"))
        told = tuple(Message(role, content) for role, content in messages)
        return Example(told, answer, told[-1].content if question is None else question, context)


class Chosen(_Examples):
    """Some of ``examples``, by their numbers, in the order of these."""

    def __init__(self, examples: Sequence[Example], numbers: np.ndarray) -> None:
        self._examples, self._numbers = examples, numbers

    @property
    def digests(self) -> np.ndarray:
        return digests_of(self._examples)[self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def _read(self, number: int) -> Example:
        return self._examples[int(self._numbers[number])]


def count_chars(example: Example) -> int:
    return len(example.answer) + sum(len(m.content) for m in example.messages)


def keep_examples(examples: Iterable[Example]) -> Sequence[Example]:
    """Examples as they come, in memory or on disk.

    Raises:
        MachineError: the disk is full.
    """
    few: list[Example] = []
    stored: StoredExamples | None = None
    num_chars = 0
    for example in examples:
        if stored is not None:
            stored.append(example)
            continue
        few.append(example)
        num_chars += count_chars(example)
        if num_chars > MEMORY_CHARS:
            stored = StoredExamples()
            for earlier in few:
                stored.append(earlier)
            few = []
    return tuple(few) if stored is None else stored


def order_by_content(digests: np.ndarray, seed: int) -> np.ndarray:
    """Numbers of the examples, shape (N,), in a seeded order that does not depend on the file's.

    The order is that of ``digest([seed, example.digest])``; equal examples stay in the file's order.
    """
    keys = bytearray()
    for row in digests:
        keys += hashlib.sha256(f'[{seed},"{row.tobytes().hex()}"]'.encode()).digest()
    return sorted_rows(np.frombuffer(keys, dtype=np.uint8).reshape(-1, 32))


def sorted_rows(rows: np.ndarray) -> np.ndarray:
    """The order of byte rows of shape (N, 32), a stable one."""
    return np.lexsort(np.ascontiguousarray(rows).view(">u8").T[::-1])
