"""Folders and files to Examples.

A dataset file is a JSON list of records, an object that wraps one, or JSON lines. A bad record is left out and counted;
a bad file is one line that names the file, the place and the mend. What is asked of a record's shape stands in
``parse_record``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylora.examples import Chosen, count_chars, digests_of, keep_examples, order_by_content
from raylora.files import reading, reason
from raylora.jsonstream import RecordStream, kind, short, shown
from raylora.records import BadRecord, Dataset, Example, Message, UserError

MAX_KEPT_BAD_RECORDS = 100
SURVEYED = 32
"""Examples that say how long those of a dataset are."""
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


def sample_examples(examples: Sequence[Example], size: int, seed: int) -> Sequence[Example]:
    """A seeded draw of ``size`` examples (0: all), in an order by content: a file's own order changes nothing.

    Only what is drawn is read where examples lie on disk.
    """
    order = order_by_content(digests_of(examples), seed)
    return list(Chosen(examples, order[:size])) if size else Chosen(examples, order)


# Files


@dataclass
class Survey:
    """What a dataset file holds, without its examples; ``error`` says why it cannot be used."""

    data_hash: str = ""
    num_examples: int = 0
    num_chars: int = 0
    """Over all examples; what several of them share counts in each."""
    error: str = ""
    sample: list[Example] = field(default_factory=list)
    """The first examples."""


def survey(path: Path, salvage: bool = False, limit: int | None = None) -> Survey:
    """Look a dataset file through as ``load_dataset`` does, and keep little of it. A bad file is no exception."""
    reader = _Reader(path, salvage, limit)
    found = Survey()
    try:
        with reading(path):
            for example in reader:
                found.num_examples += 1
                found.num_chars += count_chars(example)
                if len(found.sample) < SURVEYED:
                    found.sample.append(example)
    except UserError as error:
        found = Survey(error=str(error))
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
    with reading(path):
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
        self.records = RecordStream(path, _is_record, salvage)
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
            raise UserError(f"{shown(self.path)}: none of its {self.num_items} records is valid{why}")

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


# Records


def _is_record(value: Collection[str]) -> bool:
    """By an object's keys."""
    known = {"messages", "conversations", "qa_pairs"}
    return any(key in value for key in known) or any(q in value and a in value for q, a in PAIRS)


def parse_record(record: Any) -> tuple[list[Example], list[BadRecordError]]:
    """The examples of one record, and what is wrong with those parts of it that make none."""
    try:
        if not isinstance(record, dict):
            raise BadRecordError(f"expected an object, found {kind(record)}")
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
        raise BadRecordError(f"turn {number}: expected an object, found {kind(turn)}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise BadRecordError(f"turn {number}: role {short(role)}; known are {', '.join(ROLES)}")
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
                raise BadRecordError(f"expected an object, found {kind(pair)}")
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
        raise BadRecordError(f"its keys are {short(', '.join(map(str, record)))}; known are {KNOWN}")
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
        raise BadRecordError(f"{name}: expected text, found {kind(value)}")
    if not value.strip():
        raise BadRecordError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecordError(f"{name}: holds half a character (a lone surrogate)") from None
    return value
