"""Which files are datasets, and the reader of each kind. A folder of such files, its shards, is one dataset."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raylora.config.options import MAX_RECORD_CHARS
from raylora.data.byte_stream import COMPRESSIONS, hash_of
from raylora.data.columns import ColumnNames
from raylora.data.csv_records import CsvRecords
from raylora.data.json_records import LINE_SUFFIXES, JsonRecords
from raylora.data.record_stream import Record, RecordStream, shown_path
from raylora.data.table_records import IpcRecords, ParquetRecords
from raylora.errors import UserError, reason


@dataclass(frozen=True)
class FileKind:
    """A kind of dataset files."""

    name: str
    suffixes: tuple[str, ...]
    """In any case."""
    can_be_compressed: bool
    """Whether one of ``COMPRESSIONS`` may stand behind the suffix."""
    read: str
    """What is in memory at a time, for people."""
    place: str
    """What a bad record's place is."""

    @property
    def endings(self) -> tuple[str, ...]:
        more = [suffix + packed for suffix in self.suffixes for packed in COMPRESSIONS if self.can_be_compressed]
        return (*self.suffixes, *more)


JSON = FileKind("JSON", (".json",), True, "a record", "record 7")
LINES = FileKind("JSON lines", LINE_SUFFIXES, True, "a line", "line 7")
CSV = FileKind("CSV, TSV", (".csv", ".tsv"), True, "a row", "line 7")
PARQUET = FileKind("Parquet", (".parquet",), False, "a page of each column", "row 7")
IPC = FileKind("Arrow IPC, Feather", (".arrow", ".feather", ".ipc"), False, "a record batch", "row 7")
KINDS = (JSON, LINES, CSV, PARQUET, IPC)
READERS: dict[FileKind | None, type[CsvRecords | ParquetRecords | IpcRecords]] = {
    CSV: CsvRecords,
    PARQUET: ParquetRecords,
    IPC: IpcRecords,
}
ENDINGS = tuple(sorted((ending for kind in KINDS for ending in kind.endings), key=len, reverse=True))
PATTERNS = ", ".join(f"*{suffix}" for kind in KINDS for suffix in kind.suffixes)
METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""What ``datasets`` writes beside the shards of a folder; they hold no records."""
MAX_DEPTH = 3
"""Folders below a folder of shards: ``data/``, or a configuration and a split."""
_SPLITS = {"test": "test", "tests": "test", "validation": "validation", "valid": "validation", "val": "validation",
           "dev": "validation", "eval": "test", "evaluation": "test", "testing": "test",
           "train": "train", "training": "train"}  # fmt: skip


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that compares the digits in a name as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def split_name(name: str) -> tuple[str, str]:
    """A file's name without its ending, and the ending, in its own case; no ending where it is none of a dataset's."""
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    stem = name[: len(name) - len(ending)]
    return (stem, name[len(stem) :]) if stem else (name, "")


def name_and_ending(path: Path) -> tuple[str, str]:
    """A dataset's name, and the ending of its file: none of a folder of shards."""
    name, ending = split_name(path.name)
    if ending:
        return name, ending
    return (path.name, "") if path.is_dir() else (path.stem, path.suffix)


def kind_of(name: str) -> FileKind | None:
    """The kind of a file by its name; None where it is none of a dataset's."""
    _, ending = split_name(name)
    return next((kind for kind in KINDS if ending.lower() in kind.endings), None)


def list_dataset_files(chunk: Path) -> list[Path]:
    """The dataset files of a chunk, and the folders in it that hold shards of one dataset each, sorted by name.

    Raises:
        UserError: the chunk holds none, or cannot be read.
    """
    try:
        # No check that it is a readable file: users expect a row for each .json, if only one that says what is wrong.
        paths = [p for p in chunk.iterdir() if not p.name.startswith(".")]
        found = [p for p in paths if split_name(p.name)[1] or (p.is_dir() and _shards_below(p, MAX_DEPTH))]
    except OSError as error:
        raise UserError(f"{chunk}: {reason(error)}") from None
    if not found:
        raise UserError(f"{chunk}: no dataset in it ({PATTERNS})")
    return sorted(found)


def open_records(path: Path, names: ColumnNames, salvage: bool, max_chars: int = MAX_RECORD_CHARS) -> RecordStream:
    """The records of a dataset file by its suffix, or of a folder of shards. Nothing is read yet.

    Args:
        max_chars: a record with more characters is a bad one.
    """
    try:
        if path.is_dir():
            return FolderRecords(path, names, salvage, max_chars)
    except (OSError, ValueError):
        pass  # reading it will say why
    kind = kind_of(path.name)
    if kind in READERS:
        return READERS[kind](path, names, salvage, max_chars)
    return JsonRecords(path, names, salvage, is_lines=kind is LINES, max_chars=max_chars)


def table_rows(path: Path) -> Iterator[Record] | None:
    """The rows of a Parquet or Arrow file, whatever columns it has; None where its name is no such file's.

    Iteration raises:
        UserError: it cannot be read.
    """
    kind = kind_of(path.name)
    return iter(ParquetRecords(path) if kind is PARQUET else IpcRecords(path)) if kind in {PARQUET, IPC} else None


class FolderRecords(RecordStream):
    """The records of a folder's shards, in natural order: those named after train, where others are test or validation.

    ``hash`` is the SHA-256 of the shards' names and bytes.
    """

    def __init__(self, path: Path, names: ColumnNames, salvage: bool, max_chars: int = MAX_RECORD_CHARS) -> None:
        super().__init__(path, max_chars)
        self._names, self._salvage = names, salvage

    def __iter__(self) -> Iterator[Record]:
        shards = self.find_shards()
        hashes = dict.fromkeys(shards, "")
        try:
            for name, path in shards.items():
                records = open_records(path, self._names, self._salvage, self.max_chars)
                try:
                    for record in records:
                        yield Record(f"{shown_path(Path(name))}, {record.place}", record.value, record.error)
                finally:
                    hashes[name] = records.hash
                lost = records.num_lost
                self.num_lost = -1 if -1 in (lost, self.num_lost) else self.num_lost + lost
        finally:
            self.hash = self._hash(shards, hashes)

    def find_shards(self) -> dict[str, Path]:
        """The shards by their names within the folder.

        Raises:
            UserError: there are none, or of several kinds, or they cannot be found.
        """
        where = shown_path(self.path)
        try:
            found = {"/".join(p.parts[len(self.path.parts) :]): p for p in _shards_below(self.path, MAX_DEPTH)}
        except OSError as error:
            raise UserError(f"{where}: cannot be read: {reason(error)}") from None
        splits = {name: split_of(name) for name in found}
        if "train" in splits.values():
            found = {name: path for name, path in found.items() if splits[name] in {"train", ""}}
        if not found:
            raise UserError(f"{where}: no dataset file in this directory ({PATTERNS})")
        kinds = {kind_of(name): name for name in found}
        if len(kinds) > 1:
            names = " and ".join(list(kinds.values())[:2])
            text = f"{where}: files of several kinds ({names}) in the folder of one dataset"
            raise UserError(f"{text}: leave one kind in it, or give each dataset a folder of its own")
        return {name: found[name] for name in sorted(found, key=natural_order)}

    @staticmethod
    def _hash(shards: dict[str, Path], hashes: dict[str, str]) -> str:
        """Empty where one of them cannot be read."""
        total = hashlib.sha256()
        for name, path in shards.items():
            try:
                total.update(f"{name}\0{hashes[name] or hash_of(path)}\n".encode("utf-8", "surrogateescape"))
            except UserError:
                return ""
        return total.hexdigest()


def split_of(name: str) -> str:
    """The split that a shard is named after, ``train``, ``test`` or ``validation``; empty where it is after none."""
    words = re.split(r"[\W_\d]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def standard_split(name: str) -> str:
    """A split's usual name, for one of its other names: ``validation`` for ``dev``. Other names as they are."""
    return _SPLITS.get(name.lower(), name)


def _shards_below(folder: Path, depth: int) -> list[Path]:
    found: list[Path] = []
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name in METADATA:
            continue
        if split_name(path.name)[1] and not path.is_dir():
            found.append(path)
        elif depth and path.is_dir():
            found += _shards_below(path, depth - 1)
    return found
