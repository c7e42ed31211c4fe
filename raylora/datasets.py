"""Folders and files to Examples.

A dataset file is a JSON list of records, an object that wraps one, or JSON lines. A bad record is left out and counted;
a bad file is one line that names the file, the place and the mend. What is asked of a record's shape stands in
``parse_record``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylora.files import reason
from raylora.records import BadRecord, Dataset, Example, Message, UserError, digest

MAX_KEPT_BAD_RECORDS = 100
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# Question, answer and context by their usual names; the first pair whose keys are both there is taken.
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "output"),
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
)
CONTEXT_KEYS = ("context_text", "context")
KNOWN = "messages, conversations, qa_pairs, or pairs such as instruction/output, question/answer, prompt/completion"
# Questions that carry their passage or their input inside, as published sets have them (in Chinese too). No two
# neighbouring parts match the same characters, so that no text takes time that grows with its square.
CONTEXT_QUESTION = re.compile(
    r"(?:背景|Context|Background) ?[:：](?P<context>.+?)\n[ \t]*\n(?:问题|Question) ?[:：](?P<question>.+)", re.S
)
QUESTION_INPUT = re.compile(r"(?P<question>.+?)\n[ \t]*\n(?:输入|Input) ?[:：](?P<context>.+)", re.S)


class BadRecordError(ValueError):
    """Why a record cannot be used; ``place`` says where in it."""

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(reason)
        self.place = place


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


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{_shown(path)}: cannot be read: {reason(error)}") from None


def sample_examples(examples: Sequence[Example], size: int, seed: int) -> list[Example]:
    """A seeded draw of ``size`` examples (0: all), in an order by content: a file's own order changes nothing."""
    ordered = sorted(examples, key=lambda e: digest([seed, e.digest]))
    return ordered[:size] if size else ordered


# Files


@dataclass(frozen=True)
class _Record:
    place: str
    value: Any
    error: str = ""


@dataclass(frozen=True)
class _Records:
    records: list[_Record]
    num_lost: int = 0


def load_dataset(path: Path, salvage: bool = False, limit: int | None = None) -> Dataset:
    """Read a dataset file.

    Args:
        salvage: keep the complete leading records of a file that breaks off.
        limit: look at the first records only.

    Raises:
        UserError: the file cannot be read, is no JSON, breaks off, or holds no valid record.
    """
    text = _read_text(path)
    try:
        found = _split_records(path, text, salvage)
    except RecursionError:
        raise UserError(f"{_shown(path)}: nested too deeply to be a dataset") from None
    records = found.records[:limit]
    examples: list[Example] = []
    bad: list[BadRecord] = []
    num_chars = 0
    for record in records:
        if record.error:
            bad.append(BadRecord(record.place, record.error))
            continue
        num_chars += sum(len(s) for s in _strings(record.value))
        parsed, errors = parse_record(record.value)
        examples += parsed
        bad += [BadRecord(f"{record.place}{error.place}", str(error)) for error in errors]
    if not examples:
        why = f"; the first: {bad[0].place}: {bad[0].reason}" if bad else ""
        raise UserError(f"{_shown(path)}: none of its {len(records)} records is valid{why}")
    return Dataset(
        path=str(path),
        examples=tuple(examples),
        num_items=len(records),
        total_chars=num_chars,
        bad_records=tuple(bad[:MAX_KEPT_BAD_RECORDS]),
        num_bad_records=len(bad),
        num_lost_records=found.num_lost,
    )


def _shown(path: Path) -> str:
    """A path on one line, whatever its name holds."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{_shown(path)}: cannot be read: {reason(error)}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise UserError(
            f"{_shown(path)}: line {line}, column {column}: not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from None
    if not text.strip():
        raise UserError(f"{_shown(path)}: line 1: empty; delete the file or write it again")
    return text


def _split_records(path: Path, text: str, salvage: bool) -> _Records:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if _looks_like_lines(text, path):
            return _Records(list(_json_lines(text)))
        return _broken_list(path, text, error, salvage)
    except ValueError as error:  # an integer of more digits than Python reads
        raise UserError(f"{_shown(path)}: {_short(error)}") from None
    return _Records(_records_of(path, value))


def _records_of(path: Path, value: Any) -> list[_Record]:
    if isinstance(value, dict) and not _is_record(value):
        lists = [v for v in value.values() if isinstance(v, list)]
        if len(lists) == 1:
            value = lists[0]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise UserError(f"{_shown(path)}: line 1: expected a list of records, found {_kind(value)}")
    if not value:
        raise UserError(f"{_shown(path)}: line 1: an empty list; a dataset needs at least one record")
    return [_Record(f"record {i}", record) for i, record in enumerate(value, 1)]


def _looks_like_lines(text: str, path: Path) -> bool:
    """Whether the first line that is not blank is a whole JSON object, or the name says that lines are meant."""
    first = next(line for line in text.split("\n") if line.strip())
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return path.suffix.lower() == ".jsonl" and not text.lstrip().startswith("[")


def _json_lines(text: str) -> Iterator[_Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _Record(f"line {number}", json.loads(line))
        except json.JSONDecodeError as error:
            yield _Record(f"line {number}", None, f"column {error.colno}: not JSON: {error.msg}")
        except ValueError as error:
            yield _Record(f"line {number}", None, _short(error))


def _broken_list(path: Path, text: str, error: json.JSONDecodeError, salvage: bool) -> _Records:
    """What to do with a file that is no JSON: the complete leading records of its list, or one line that says so."""
    records, end = _leading_records(text)
    place = f"{_shown(path)}: line {error.lineno}, column {error.colno}"
    breaks_off = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    if not salvage or not records:
        what = "the file breaks off here" if breaks_off else f"not JSON: {error.msg}"
        mend = f"; --salvage keeps the {len(records)} complete records before it" if records else ""
        raise UserError(f"{place}: {what}{mend}")
    # The record in which the file breaks off is lost; how many more there were behind other damage, no one can know.
    num_lost = (1 if text[end:].strip(" \t\r\n,") else 0) if breaks_off else -1
    return _Records([_Record(f"record {i}", record) for i, record in enumerate(records, 1)], num_lost)


def _leading_records(text: str) -> tuple[list[Any], int]:
    decoder = json.JSONDecoder()
    records: list[Any] = []
    start = len(text) - len(text.lstrip())
    if not text.startswith("[", start):
        return [], 0
    end = start + 1
    while True:
        begin = end
        while begin < len(text) and text[begin] in " \t\r\n,":
            begin += 1
        try:
            record, end = decoder.raw_decode(text, begin)
        except ValueError:
            return records, begin
        records.append(record)


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


# Records


def _is_record(value: dict[str, Any]) -> bool:
    known = {"messages", "conversations", "qa_pairs"}
    return bool(known & value.keys()) or any(q in value and a in value for q, a in PAIRS)


def parse_record(record: Any) -> tuple[list[Example], list[BadRecordError]]:
    """The examples of one record, and what is wrong with those parts of it that make none."""
    try:
        if not isinstance(record, dict):
            raise BadRecordError(f"expected an object, found {_kind(record)}")
        for key in ("messages", "conversations"):
            if key in record:
                return _parse_conversation(record[key]), []
        if "qa_pairs" in record:
            return _parse_qa_pairs(record)
        return [_parse_pair(record)], []
    except BadRecordError as error:
        return [], [error]


def _parse_conversation(turns: Any) -> list[Example]:
    """Each assistant turn is an answer to all that stands before it."""
    if not isinstance(turns, list) or not turns:
        raise BadRecordError("its conversation is no list of turns" if turns else "its conversation is empty")
    messages: list[Message] = []
    examples: list[Example] = []
    for number, turn in enumerate(turns, 1):
        message = _parse_turn(turn, number)
        if message.role == "assistant":
            if not messages or messages[-1].role != "user":
                raise BadRecordError(f"turn {number} answers, but no user turn stands before it")
            examples.append(_example(messages, message.content))
        elif message.role == "system" and messages:
            raise BadRecordError(f"turn {number} is a system turn; only the first may be")
        messages.append(message)
    if not examples:
        raise BadRecordError("nobody answers: there is no assistant turn")
    return examples


def _parse_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRecordError(f"turn {number}: expected an object, found {_kind(turn)}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise BadRecordError(f"turn {number}: role {_short(role)}; known are {', '.join(ROLES)}")
    if isinstance(content, list):
        content = _join_parts(content, number)
    return Message(known, _text(content, f"turn {number}"))


def _join_parts(parts: list[Any], number: int) -> str:
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(t, str) for t in texts):
        raise BadRecordError(f"turn {number}: has parts that are no text")
    return "".join(str(t) for t in texts)


def _example(messages: Sequence[Message], answer: str) -> Example:
    asked = messages[-1].content.strip()
    for pattern in (CONTEXT_QUESTION, QUESTION_INPUT):
        match = pattern.fullmatch(asked)
        if match and match["question"].strip() and match["context"].strip():
            return Example(tuple(messages), answer, match["question"].strip(), match["context"].strip())
    return Example(tuple(messages), answer, asked)


def _parse_qa_pairs(record: dict[str, Any]) -> tuple[list[Example], list[BadRecordError]]:
    pairs = record["qa_pairs"]
    if not isinstance(pairs, list) or not pairs:
        raise BadRecordError("qa_pairs is no list of pairs" if pairs else "qa_pairs is empty")
    context = _optional(record, CONTEXT_KEYS)
    examples, errors = [], []
    for number, pair in enumerate(pairs, 1):
        try:
            if not isinstance(pair, dict):
                raise BadRecordError(f"expected an object, found {_kind(pair)}")
            inner = {"context": context, **pair} if context else pair
            examples.append(_parse_pair(inner))
        except BadRecordError as error:
            errors.append(BadRecordError(str(error), f", qa_pairs[{number}]"))
    return examples, errors


def _parse_pair(record: dict[str, Any]) -> Example:
    for question_key, answer_key in PAIRS:
        if question_key in record and answer_key in record:
            break
    else:
        raise BadRecordError(f"its keys are {_short(', '.join(map(str, record)))}; known are {KNOWN}")
    question, answer = _text(record[question_key], question_key), _text(record[answer_key], answer_key)
    system = _optional(record, ("system",))
    extra = _optional(record, ("input",)) if question_key == "instruction" else ""
    context = _optional(record, CONTEXT_KEYS)
    asked = f"{question}\n\n{extra}" if extra else question
    if context:
        asked = f"Context: {context}\n\nQuestion: {asked}"
    messages = (*((Message("system", system),) if system else ()), Message("user", asked))
    return Example(messages, answer, question, context or extra)


def _optional(record: dict[str, Any], keys: Iterable[str]) -> str:
    for key in keys:
        value = record.get(key)
        if value is not None and value != "":
            return _text(value, key) if not (isinstance(value, str) and not value.strip()) else ""
    return ""


def _text(value: Any, name: str) -> str:
    """A string that says something and can be encoded.

    Raises:
        BadRecordError: it is none.
    """
    if not isinstance(value, str):
        raise BadRecordError(f"{name}: expected text, found {_kind(value)}")
    if not value.strip():
        raise BadRecordError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecordError(f"{name}: holds half a character (a lone surrogate)") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    text = ascii(str(value))[1:-1] if not str(value).isprintable() else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
