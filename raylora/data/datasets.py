"""Folders and files to Examples.

A dataset file is a JSON list of records, an object that wraps one, or JSON lines. A bad record is left out and counted;
a bad file is one line that names the file, the place and the mend. What is asked of a record's shape stands in
``parse_record``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylora.data.examples import Chosen, count_chars, keep_examples, order_by_content
from raylora.data.json_stream import RecordStream, shown_path
from raylora.data.parse_record import is_record, parse_record
from raylora.errors import ErrorKind, UserError, errors_are, reason
from raylora.records import BadRecord, Dataset, Example, digests_of
from raylora.storage.places import reading

MAX_KEPT_BAD_RECORDS = 100
SURVEYED = 32
"""Examples that say how long those of a dataset are."""


# Folders


def list_chunks(data_root: Path) -> list[Path]:
    """The folders ``chunk_*`` of ``data_root``, chunk_2 before chunk_10.

    Raises:
        UserError: there is no such folder.
    """
    try:
        folders = [p for p in data_root.iterdir() if p.name.startswith("chunk_") and p.is_dir()]
    except OSError as error:
        raise UserError(
            f"--data-root {data_root}: {reason(error)}; it is the folder that holds the chunk_* folders"
        ) from None
    return sorted(folders, key=lambda p: _natural(p.name))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def find_chunk(data_root: Path, name: str) -> Path:
    """A chunk by its folder's name, or by its number in ``list_chunks``, from 1.

    Raises:
        UserError: there is none by that name; the line lists those there are.
    """
    chunks = list_chunks(data_root)
    if name.isdecimal() and len(name) < 7 and 1 <= int(name) <= len(chunks):
        return chunks[int(name) - 1]
    for folder in [*chunks, *(p for p in data_root.iterdir() if p.is_dir())]:
        if folder.name == name:  # compared, never joined: a name cannot lead out of the folder
            return folder
    there = ", ".join(f"{i} {c.name}" for i, c in enumerate(chunks[:20], 1)) or "no chunk_* folder"
    more = " ..." if len(chunks) > 20 else ""
    raise UserError(f"--chunk {name[:80]!r}: not in {data_root}, which has: {there}{more}")


def list_dataset_files(chunk: Path) -> list[Path]:
    """The ``.json`` and ``.jsonl`` files of a chunk, by name.

    Raises:
        UserError: there is none.
    """
    try:
        # Whatever ends in .json is a dataset that someone expects a row for, also where it cannot be read.
        files = [p for p in chunk.iterdir() if p.suffix.lower() in {".json", ".jsonl"} and not p.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{chunk}: {reason(error)}") from None
    if not files:
        raise UserError(f"{chunk}: no dataset in it (*.json, *.jsonl)")
    return sorted(files)


def sample_examples(examples: Sequence[Example], size: int, seed: int) -> Sequence[Example]:
    """A seeded draw of ``size`` examples (0: all), in an order by content: a file's own order changes nothing.

    Only what is drawn is read where examples lie on disk.
    """
    order = order_by_content(digests_of(examples), seed)
    return list(Chosen(examples, order[:size])) if size else Chosen(examples, order)


# Files


@dataclass
class Survey:
    """What a dataset file holds, without its examples; ``error`` says why it cannot be used, ``error_kind`` too."""

    data_hash: str = ""
    num_examples: int = 0
    num_chars: int = 0
    """Over all examples; what several of them share counts in each."""
    error: str = ""
    error_kind: str = ""
    sample: list[Example] = field(default_factory=list)
    """The first examples."""


def survey(path: Path, salvage: bool = False, limit: int | None = None) -> Survey:
    """Look a dataset file through as ``load_dataset`` does, and keep little of it. A bad file is no exception."""
    reader = _Reader(path, salvage, limit)
    found = Survey()
    try:
        with errors_are(ErrorKind.DATA), reading(path):
            for example in reader:
                found.num_examples += 1
                found.num_chars += count_chars(example)
                if len(found.sample) < SURVEYED:
                    found.sample.append(example)
    except UserError as error:
        found = Survey(error=str(error), error_kind=error.kind)
    found.data_hash = reader.records.hash
    return found


def load_dataset(path: Path, salvage: bool = False, limit: int | None = None) -> Dataset:
    """Read a dataset file. Examples of a large one lie on disk (``examples.MEMORY_CHARS``).

    Args:
        salvage: keep the complete leading records of a file that breaks off.
        limit: look at the first records only.

    Raises:
        UserError: the file cannot be read, is no JSON, breaks off, or holds no valid record.
    """
    reader = _Reader(path, salvage, limit)
    with errors_are(ErrorKind.DATA), reading(path):
        examples = keep_examples(reader)
    return Dataset(
        path=str(path),
        examples=examples,
        num_items=reader.num_items,
        total_chars=reader.num_chars,
        bad_records=tuple(reader.bad),
        num_bad_records=reader.num_bad,
        num_lost_records=reader.records.num_lost,
        data_hash=reader.records.hash,
    )


class _Reader:
    """The examples of a file, good for one pass, which counts what it meets.

    Iteration raises:
        UserError: as ``load_dataset`` does.
    """

    def __init__(self, path: Path, salvage: bool, limit: int | None) -> None:
        self.path, self.limit = path, limit
        self.records = RecordStream(path, is_record, salvage)
        self.num_items = self.num_chars = self.num_bad = 0
        self.bad: list[BadRecord] = []
        """The first ones."""

    def __iter__(self) -> Iterator[Example]:
        num_examples = 0
        for record in self.records:
            if self.limit is not None and self.num_items >= self.limit:
                continue  # the file is still read to its end: it may turn out to be broken
            self.num_items += 1
            if record.error:
                self._leave_out(record.place, record.error)
                continue
            self.num_chars += sum(len(s) for s in _strings(record.value))
            examples, errors = parse_record(record.value)
            num_examples += len(examples)
            yield from examples
            for error in errors:
                self._leave_out(f"{record.place}{error.place}", str(error))
        if not num_examples:
            why = f"; the first: {self.bad[0].place}: {self.bad[0].reason}" if self.bad else ""
            text = f"{shown_path(self.path)}: none of its {self.num_items} records is valid{why}"
            raise UserError(text, kind=ErrorKind.BAD_RECORDS)

    def _leave_out(self, place: str, reason: str) -> None:
        self.num_bad += 1
        if self.num_bad <= MAX_KEPT_BAD_RECORDS:
            self.bad.append(BadRecord(place, reason))


def _strings(value: Any) -> Iterator[str]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
