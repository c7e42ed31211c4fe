"""One record of a dataset file as examples: the shapes that are accepted, and what is wrong with others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from raylora.data.json_stream import kind, short
from raylora.errors import BadRecordError
from raylora.records import Example, Message, digest

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
# The usual keys of question and answer; the first pair of which a record has both is used.
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
ACCEPTED = "messages, conversations, qa_pairs, or pairs such as instruction/output, question/answer, prompt/completion"
# Published datasets, Chinese ones too, put the passage or the input into the question itself. Neighbouring parts of a
# pattern never match the same characters: if they did, a text could take time that grows with the square of its length.
CONTEXT_QUESTION = re.compile(
    r"(?:背景|Context|Background) ?[:：](?P<context>.+?)\n[ \t]*\n(?:问题|Question) ?[:：](?P<question>.+)", re.S
)
QUESTION_INPUT = re.compile(r"(?P<question>.+?)\n[ \t]*\n(?:输入|Input) ?[:：](?P<context>.+)", re.S)


def is_record(value: Collection[str]) -> bool:
    """Whether an object with these keys is a record."""
    conversation_keys = {"messages", "conversations", "qa_pairs"}
    return any(key in value for key in conversation_keys) or any(q in value and a in value for q, a in PAIRS)


def parse_record(record: Any) -> tuple[list[Example], list[BadRecordError]]:
    """The examples of one record, and an error for each part of it that gives none; nothing is raised."""
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
    """An example for each assistant turn, with all turns before it as its messages."""
    if not isinstance(turns, list) or not turns:
        raise BadRecordError("its conversation is no list of turns" if turns else "its conversation is empty")
    messages: list[Message] = []
    examples: list[Example] = []
    num_repeated = 0
    for number, turn in enumerate(turns, 1):
        message = _parse_turn(turn, number)
        if message.role == "assistant":
            if not messages or messages[-1].role != "user":
                raise BadRecordError(f"turn {number} answers, but no user turn stands before it")
            examples.append(_conversation_example(messages, message.content, num_repeated))
            num_repeated = len(messages) + 1  # this answer is a message of the examples that follow
        elif message.role == "system" and messages:
            raise BadRecordError(f"turn {number} is a system turn; only the first may be")
        messages.append(message)
    if not examples:
        raise BadRecordError("nobody answers: there is no assistant turn")
    if len(examples) == 1:
        return examples
    conversation = digest([(m.role, m.content) for m in messages], 32)
    return [replace(example, conversation=conversation) for example in examples]


def _parse_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRecordError(f"turn {number}: expected an object, found {kind(turn)}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    standard_role = ROLES.get(role.lower()) if isinstance(role, str) else None
    if standard_role is None:
        raise BadRecordError(f"turn {number}: role {short(role)}; known are {', '.join(ROLES)}")
    if isinstance(content, list):
        content = _join_parts(content, number)
    return Message(standard_role, _require_text(content, f"turn {number}"))


def _join_parts(parts: list[Any], number: int) -> str:
    """The text of a turn whose content is a list of parts, as multimodal chats have it."""
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(t, str) for t in texts):
        raise BadRecordError(f"turn {number}: has parts that are no text")
    return "".join(str(t) for t in texts)


def _conversation_example(messages: Sequence[Message], answer: str, num_repeated: int) -> Example:
    question, context = messages[-1].content.strip(), ""
    for pattern in (CONTEXT_QUESTION, QUESTION_INPUT):
        match = pattern.fullmatch(question)
        if match and match["question"].strip() and match["context"].strip():
            question, context = match["question"].strip(), match["context"].strip()
            break
    return Example(tuple(messages), answer, question, context, num_repeated=num_repeated)


def _parse_qa_pairs(record: dict[str, Any]) -> tuple[list[Example], list[BadRecordError]]:
    pairs = record["qa_pairs"]
    if not isinstance(pairs, list) or not pairs:
        raise BadRecordError("qa_pairs is no list of pairs" if pairs else "qa_pairs is empty")
    context = _optional_text(record, CONTEXT_KEYS)
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
        raise BadRecordError(f"its keys are {short(', '.join(map(str, record)))}; known are {ACCEPTED}")
    question, answer = _require_text(record[question_key], question_key), _require_text(record[answer_key], answer_key)
    system = _optional_text(record, ("system",))
    extra = _optional_text(record, ("input",)) if question_key == "instruction" else ""
    context = _optional_text(record, CONTEXT_KEYS)
    prompt = f"{question}\n\n{extra}" if extra else question
    if context:
        prompt = f"Context: {context}\n\nQuestion: {prompt}"
    messages = (*((Message("system", system),) if system else ()), Message("user", prompt))
    return Example(messages, answer, question, context or extra)


def _optional_text(record: dict[str, Any], keys: Iterable[str]) -> str:
    """The text under the first of ``keys`` that holds something; empty where none does, or where it is blank."""
    for key in keys:
        value = record.get(key)
        if value is not None and value != "":
            return _require_text(value, key) if not (isinstance(value, str) and not value.strip()) else ""
    return ""


def _require_text(value: Any, name: str) -> str:
    """``value``, if it is a string that is not blank and can be written as UTF-8.

    Raises:
        BadRecordError: it is not.
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
