"""Chunk folders, and their dataset files as Examples.

``dataset_files`` knows the kinds of files, ``parse_record`` what a record may look like. A bad record is skipped and
counted. A bad file raises an error of one line that names the file, the place in it and the fix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raylora.config.options import MAX_RECORD_CHARS
from raylora.data.columns import ColumnNames
from raylora.data.dataset_files import list_dataset_files, natural_order, open_records
from raylora.data.examples import Chosen, count_chars, keep_examples, order_by_content
from raylora.data.hub_files import HubRecords
from raylora.data.parse_record import FormCounts, parse_record
from raylora.data.record_stream import shown_path, too_long
from raylora.data.record_values import leaves_of
from raylora.errors import ErrorKind, UserError, errors_are, reason
from raylora.records import BadRecord, Dataset, Example, digests_of
from raylora.storage.hub_names import DatasetPlace, HubDataset
from raylora.storage.places import reading

__all__ = [
    "Survey", "find_chunk", "list_chunks", "list_dataset_files", "read_dataset", "sample_examples", "survey",
]  # fmt: skip

MAX_KEPT_BAD_RECORDS = 100
"""Bad records that are described; those after them are only counted."""
SURVEY_SAMPLE_SIZE = 32
"""Examples that ``survey`` keeps of a file: the plan estimates the tokens of all from them."""
SURVEY_SAMPLE_CHARS = MAX_RECORD_CHARS
"""Characters of the file's examples up to which it keeps more of them: one that is all a file has is one of them."""


# Folders


def list_chunks(data_root: Path) -> list[Path]:
    """The folders ``chunk_*`` of ``data_root``, chunk_2 before chunk_10.

    Raises:
        UserError: ``data_root`` cannot be read.
    """
    try:
        folders = [p for p in data_root.iterdir() if p.name.startswith("chunk_") and p.is_dir()]
    except OSError as error:
        raise UserError(
            f"--data-root {data_root}: {reason(error)}; it is the folder that holds the chunk_* folders"
        ) from None
    return sorted(folders, key=lambda p: natural_order(p.name))


def find_chunk(data_root: Path, name: str) -> Path:
    """A chunk by its folder's name, or by its number in ``list_chunks``, from 1.

    Raises:
        UserError: there is no such chunk; the message lists the chunks of ``data_root``.
    """
    chunks = list_chunks(data_root)
    if name.isdecimal() and len(name) < 7 and 1 <= int(name) <= len(chunks):
        return chunks[int(name) - 1]
    for folder in [*chunks, *(p for p in data_root.iterdir() if p.is_dir())]:
        if folder.name == name:  # compared, never joined: a name cannot lead out of the folder
            return folder
    chunk_names = ", ".join(f"{i} {c.name}" for i, c in enumerate(chunks[:20], 1)) or "no chunk_* folder"
    more = " ..." if len(chunks) > 20 else ""
    raise UserError(f"--chunk {name[:80]!r}: not in {data_root}, which has: {chunk_names}{more}")


def sample_examples(examples: Sequence[Example], size: int, seed: int) -> Sequence[Example]:
    """``size`` examples (0: all), drawn and ordered by a seeded hash of their content, whatever the file's order.

    Of examples on disk only those drawn are read.
    """
    order = order_by_content(digests_of(examples), seed)
    return list(Chosen(examples, order[:size])) if size else Chosen(examples, order)


# Files


@dataclass
class Survey:
    """What the plan needs to know of a dataset file: counts and a few examples."""

    data_hash: str = ""
    """SHA-256 of the file's bytes; empty where it cannot be read."""
    num_examples: int = 0
    num_chars: int = 0
    """Of the messages and answers of all examples. Examples of one conversation each count the turns they share."""
    error: str = ""
    """Why the file cannot be used; empty where it can."""
    error_kind: str = ""
    """An ``ErrorKind``; empty where there is no error."""
    sample: list[Example] = field(default_factory=list)
    """The first ``SURVEY_SAMPLE_SIZE`` examples."""
    record_form: str = ""
    """As ``Dataset.record_form``; ``ignored_keys`` as well."""
    ignored_keys: str = ""
    pinned: HubDataset | None = None
    """Of a dataset on the hub: its commit, configuration and split. None where the hub does not give it."""


def survey(
    path: DatasetPlace,
    salvage: bool = False,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    max_chars: int = MAX_RECORD_CHARS,
) -> Survey:
    """Read a dataset file as ``read_dataset`` does, but keep only counts and a sample. A bad file raises nothing."""
    reader = _Reader(path, salvage, limit, columns, max_chars)
    result = Survey()
    try:
        with errors_are(ErrorKind.DATA), reading(path):
            for example in reader:
                result.num_examples += 1
                result.num_chars += count_chars(example)
                if len(result.sample) < SURVEY_SAMPLE_SIZE and result.num_chars <= SURVEY_SAMPLE_CHARS:
                    result.sample.append(example)
    except UserError as error:
        result = Survey(error=str(error), error_kind=error.kind)
    result.data_hash = reader.records.hash
    result.record_form, result.ignored_keys = reader.forms.record_form, reader.forms.ignored_keys
    result.pinned = reader.pinned
    return result


def read_dataset(
    path: DatasetPlace,
    salvage: bool = False,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    max_chars: int = MAX_RECORD_CHARS,
) -> Dataset:
    """Read a dataset file, a folder of shards, or a dataset of the hub.

    Many examples are kept on disk (``examples.MEMORY_CHARS``).

    Args:
        salvage: keep the complete records at the beginning of a file that breaks off.
        limit: use only so many records, the first ones.
        columns: by a key that forms know, the file's own name of it (``--columns``).
        max_chars: a record with more characters is a bad one.

    Raises:
        UserError: the file cannot be read, is not what its name says, breaks off, or holds no valid record.
        MachineError: it is large, and the disk that is to hold it is full.
    """
    reader = _Reader(path, salvage, limit, columns, max_chars)
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
        record_form=reader.forms.record_form,
        ignored_keys=reader.forms.ignored_keys,
    )


def places_of(
    path: DatasetPlace,
    numbers: Collection[int],
    columns: Mapping[str, str] | None = None,
    max_chars: int = MAX_RECORD_CHARS,
) -> dict[int, str]:
    """Where in the file the records of these examples are (``record 7``, ``line 12``). The file is read once more.

    Args:
        numbers: of examples as ``read_dataset`` returned them, from 0.
        columns: as for ``read_dataset``; ``max_chars`` as well.

    Raises:
        UserError: as ``read_dataset``.
    """
    # Neither ``salvage`` nor ``limit`` changes which example comes where.
    reader = _Reader(path, True, None, columns, max_chars)
    with errors_are(ErrorKind.DATA), reading(path):
        return {number: reader.place for number, _ in enumerate(reader) if number in numbers}


class _Reader:
    """Yields the examples of a file, once, and counts records, characters and bad records on the way.

    Iteration raises:
        UserError: as ``read_dataset`` does.
    """

    def __init__(
        self,
        path: DatasetPlace,
        salvage: bool,
        limit: int | None,
        columns: Mapping[str, str] | None,
        max_chars: int,
    ) -> None:
        self.path, self.limit, self.max_chars = path, limit, max_chars
        self._names = ColumnNames(columns)
        self.records = (
            HubRecords(path, self._names, salvage, max_chars)
            if isinstance(path, HubDataset)
            else open_records(path, self._names, salvage, max_chars)
        )
        self.num_items = self.num_chars = self.num_bad = 0
        self.forms = FormCounts()
        self.place = ""
        """Of the record that the last example is from."""
        self.bad: list[BadRecord] = []
        """The first ``MAX_KEPT_BAD_RECORDS``."""

    @property
    def pinned(self) -> HubDataset | None:
        return self.records.pinned if isinstance(self.records, HubRecords) else None

    def __iter__(self) -> Iterator[Example]:
        num_examples = 0
        for record in self.records:
            if self.limit is not None and self.num_items >= self.limit:
                continue  # the file is still read to its end: it may turn out to be broken
            self.num_items += 1
            if record.error:
                self._skip(record.place, record.error)
                continue
            num_chars = sum(len(leaf) for leaf in leaves_of(record.value) if isinstance(leaf, str))
            if num_chars > self.max_chars:
                self._skip(record.place, too_long(self.max_chars))
                continue
            self.num_chars += num_chars
            parsed = parse_record(self._names.of_record(record.value))
            num_examples += len(parsed.examples)
            if parsed.examples:
                self.forms.add(parsed)
            self.place = record.place
            yield from parsed.examples
            for error in parsed.errors:
                self._skip(f"{record.place}{error.place}", str(error))
        if not num_examples:
            why = f"; the first: {self.bad[0].place}: {self.bad[0].reason}" if self.bad else ""
            text = f"{shown_path(self.path)}: none of its {self.num_items} records is valid{why}"
            raise UserError(text, kind=ErrorKind.BAD_RECORDS)

    def _skip(self, place: str, cause: str) -> None:
        self.num_bad += 1
        if self.num_bad <= MAX_KEPT_BAD_RECORDS:
            self.bad.append(BadRecord(place, cause))
