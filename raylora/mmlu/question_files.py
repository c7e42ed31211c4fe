"""The files of a set of questions: which ones a folder's splits are, and their records, which are not checked yet."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from raylora.data.byte_stream import compression_of, unpacked
from raylora.data.dataset_files import table_rows
from raylora.data.record_values import leaves_of
from raylora.errors import UserError

Fields = dict[str, Any]
Record = tuple[str, Fields]
"""The place of a question in its file ("question 7"), and its fields."""
Split = Literal["test", "validation", "dev", "train"]

MOST_CHARS, MOST_QUESTION_CHARS = 128_000_000, 1_000_000
"""Characters of all questions, and of one. MMLU has 8 million, and 8,000 in the longest."""
SUFFIXES = (".parquet", ".arrow", ".feather", ".jsonl", ".json", ".csv")
"""In a folder, files of the first of these are the questions: converted copies often lie beside the originals."""
_WORDS: dict[Split, frozenset[str]] = {
    "test": frozenset({"test"}),
    "validation": frozenset({"validation", "valid", "val"}),
    "dev": frozenset({"dev"}),
    "train": frozenset({"train"}),
}
_ALL_WORDS = frozenset().union(*_WORDS.values())
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def _words(path: Path) -> list[str]:
    """``ARC-Challenge-Test.jsonl`` is ``arc``, ``challenge``, ``test``."""
    name = (path.stem if compression_of(path) else path.name).lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return [word for word in re.split(r"[\W_]+", _SHARD.sub("", name)) if word]


def _is_of(path: Path, split: Split) -> bool:
    words = _words(path)
    # MMLU's auxiliary_train are questions of other sets.
    return not _WORDS[split].isdisjoint(words) and "auxiliary" not in words


def split_of(path: Path) -> Split | None:
    """The split that a file or folder is named after."""
    return next((split for split in _WORDS if _is_of(path, split)), None)


def files_of(folder: Path, split: Split) -> list[Path]:
    """A split's files: one has the split's name as a word of its own, or lies in a folder of that name.

    They lie in the folder itself, in its ``all`` or ``data``, or in all its folders, as one for each subject.
    """
    for suffix in SUFFIXES:
        for word in sorted(_WORDS[split]):
            if files := _with_suffix(folder.glob(f"{word}/*"), suffix):
                return files
        for place in ("all", ".", "data"):
            if files := [f for f in _with_suffix((folder / place).glob("*"), suffix) if _is_of(f, split)]:
                return files
    for suffix in SUFFIXES:
        if files := [f for f in _with_suffix(folder.glob("*/*"), suffix) if _is_of(f, split)]:
            return files
    return []


def _with_suffix(paths: Iterable[Path], suffix: str) -> list[Path]:
    """Those whose name ends so, in capitals or not, sorted."""
    return sorted(path for path in paths if suffix_of(path) == suffix)


def files_without_split(folder: Path) -> list[Path]:
    """A folder's own files, where none is named after a split."""
    if any(files_of(folder, split) for split in _WORDS):
        return []
    return next((files for suffix in SUFFIXES if (files := _with_suffix(folder.glob("*"), suffix))), [])


def paths_beside(path: Path, split: Split) -> list[Path]:
    """Files (or folders, beside a folder) of another split, which are named alike but for the split's name.

    Beside ``own_test.json`` that is ``own_dev.json``, beside ``test-00000-of-00001.parquet`` its ``train-*.parquet``.
    """
    path = path.absolute()
    name = [word for word in _words(path) if word not in _ALL_WORDS]
    named = [p for p in path.parent.glob("*") if _is_of(p, split) and p != path]
    found = sorted(p for p in named if [word for word in _words(p) if word not in _ALL_WORDS] == name)
    if split == "dev":
        found += [path.with_name(path.name.replace("test", "dev")), *([path.with_name("dev")] if path.is_dir() else [])]
    is_dir = path.is_dir()
    return [p for p in found if p != path and (p.is_dir() if is_dir else p.is_file() and suffix_of(p) in SUFFIXES)]


def suffix_of(path: Path) -> str:
    """A file's suffix in lower case, without that of a compression behind it."""
    return (path.with_suffix("") if compression_of(path) else path).suffix.lower()


def read_file(path: Path) -> Iterator[Record]:
    """The records of a file, by its suffix: Parquet, Arrow, CSV, JSON lines or JSON.

    Raises:
        UserError: the file cannot be read, or is far larger than any set of questions: all are kept in memory.
    """
    num_chars = 0
    for place, fields in _read_records(path):
        here = sum(len(leaf) for leaf in leaves_of(fields) if isinstance(leaf, str))
        num_chars += here
        if here > MOST_QUESTION_CHARS:
            raise UserError(f"{path}: {place}: longer than {MOST_QUESTION_CHARS:,} characters: no question; cut it")
        if num_chars > MOST_CHARS:
            raise UserError(f"{path}: {place}: more than {MOST_CHARS:,} characters up to here: no set of questions")
        yield place, fields


def _read_records(path: Path) -> Iterator[Record]:
    if rows := table_rows(path):
        for i, row in enumerate(rows, 1):
            if row.error:
                raise UserError(f"{path}: question {i}: {row.error}")
            yield f"question {i}", row.value
        return
    yield from _read_csv(path) if suffix_of(path) == ".csv" else _read_json(path)


def _read_csv(path: Path) -> Iterator[Record]:
    """Lines without a header: question, choices, letter. The subject is the file's name without its split.

    All lines have as many columns as the first, so that one that was cut off is noticed.
    """
    subject = re.sub("_(?:test|dev|val)$", "", path.name.partition(".")[0], flags=re.IGNORECASE)
    try:
        rows = list(csv.reader(io.StringIO(text_of(path), newline="")))
    except csv.Error as error:
        raise UserError(f"{path}: no CSV: {error}") from None
    num_columns = next((len(row) for row in rows if row), 0)
    for i, row in enumerate(rows, 1):
        if not row:
            continue
        if len(row) != num_columns:
            raise UserError(f"{path}: question {i}: has {len(row)} columns, the first has {num_columns}")
        if len(row) < 4:
            raise UserError(f"{path}: question {i}: needs columns of question, 2 to 10 choices, letter; has {len(row)}")
        yield f"question {i}", {"subject": subject, "question": row[0], "choices": row[1:-1], "answer": row[-1]}


def text_of(path: Path) -> str:
    """What a file of UTF-8 holds, without a byte order mark.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    data = unpacked(path, MOST_CHARS)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def _read_json(path: Path) -> Iterator[Record]:
    values = json_values(path)
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of questions, found {type(values).__name__}")
    for i, fields in enumerate(values, 1):
        if not isinstance(fields, dict):
            raise UserError(f"{path}: question {i}: expected an object, found {type(fields).__name__}")
        yield f"question {i}", fields


def json_values(path: Path) -> Any:
    """A JSON value; or a list of JSON lines, by the suffix ``.jsonl`` or a first line that is an object by itself.

    Raises:
        UserError: the file cannot be read, or is not JSON.
    """
    text = text_of(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        first_line = text.lstrip().partition("\n")[0]
        if suffix_of(path) != ".jsonl" and not (first_line.startswith("{") and first_line.rstrip().endswith("}")):
            raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
        values = list(_json_lines(path, text))
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not JSON: {str(error)[:200]}") from None
    return [values] if suffix_of(path) == ".jsonl" and not isinstance(values, list) else values  # a single line


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    # Not splitlines(): it would cut at U+2028 as well, which may stand within a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (RecursionError, ValueError) as error:
                raise UserError(f"{path}: line {number}: not JSON: {str(error)[:200]}") from None
