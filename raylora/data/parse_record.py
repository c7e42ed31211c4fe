"""One record of a dataset file to examples: what is asked of its shape."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from raylora.data.json_stream import kind, short
from raylora.errors import BadRecordError
from raylora.records import Example, Message

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


# Records


def is_record(value: Collection[str]) -> bool:
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
    return Message(known, _checked_text(content, f"turn {number}"))


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
    question, answer = _checked_text(record[question_key], question_key), _checked_text(record[answer_key], answer_key)
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
            return _checked_text(value, key) if not (isinstance(value, str) and not value.strip()) else ""
    return ""


def _checked_text(value: Any, name: str) -> str:
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
