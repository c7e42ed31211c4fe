"""One record of a dataset file as examples: the forms of ``record_forms``, and what is wrong with other records."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from raylora.data.conversations import is_turns, parse_conversation, parse_tools, read_context, speaker
from raylora.data.record_forms import (
    ACCEPTED,
    CONTEXT_KEYS,
    LIST_OF_TURNS,
    MEANINGFUL_KEYS,
    SYSTEM_KEYS,
    TOOLS_KEYS,
    Form,
    Shape,
    find_form,
    is_record,
)
from raylora.data.record_stream import kind, short
from raylora.data.record_values import (
    is_empty,
    leaves_of,
    optional_text,
    parsed,
    require_text,
    stands_in,
    text_of,
    without_nulls,
)
from raylora.errors import BadRecordError
from raylora.records import Example, Message

__all__ = ["ParsedRecord", "is_record", "parse_record"]

ROLES_OF_PAIR = ("user", "assistant")
MAX_SHOWN_KEYS = 20
MAX_IGNORED_KEYS = 10_000
"""Keys that are remembered of a file: its records may have a new one each."""
MAX_LEAVES = 100
"""Texts under one key that are looked for in a conversation; where there are more, the key counts as lost."""


@dataclass
class ParsedRecord:
    """What one record gives."""

    examples: list[Example] = field(default_factory=list)
    errors: list[BadRecordError] = field(default_factory=list)
    """One for each part of it that gives no example."""
    form: str = ""
    """The name of its form; empty where it has none."""
    ignored_keys: set[str] = field(default_factory=set)
    """Its keys that hold something and are not used; those of turns with ``[].`` before them."""


class FormCounts:
    """The forms of a file's records, and the keys that were left aside; the same in whichever order they come."""

    def __init__(self) -> None:
        self._num_records: Counter[str] = Counter()
        self._ignored: set[str] = set()

    def add(self, record: ParsedRecord) -> None:
        self._num_records[record.form] += 1
        if len(self._ignored) < MAX_IGNORED_KEYS:
            self._ignored |= record.ignored_keys

    @property
    def record_form(self) -> str:
        """As ``Dataset.record_form``; most frequent first."""
        forms = sorted(self._num_records.items(), key=lambda item: (-item[1], item[0]))
        return forms[0][0] if len(forms) == 1 else ", ".join(f"{form} ({number:,})" for form, number in forms)

    @property
    def ignored_keys(self) -> str:
        """As ``Dataset.ignored_keys``, in alphabetical order; the first ``MAX_SHOWN_KEYS``."""
        keys = sorted(self._ignored)
        more = [f"and {len(keys) - MAX_SHOWN_KEYS} more"] if len(keys) > MAX_SHOWN_KEYS else []
        return ", ".join([*keys[:MAX_SHOWN_KEYS], *more])


def parse_record(record: Any) -> ParsedRecord:
    """The examples of one record, and an error for each part of it that gives none; nothing is raised."""
    result = ParsedRecord()
    try:
        if is_turns(record):
            result.form = LIST_OF_TURNS
            result.examples, result.errors = parse_conversation(record, result.ignored_keys)
        elif isinstance(record, dict):
            _parse_object(without_nulls(record), [key for key in record if record[key] is None], result)
        else:
            raise BadRecordError(f"expected an object, found {kind(record)}")
    except BadRecordError as error:
        result.examples, result.errors = [], [error]
    except RecursionError:
        result.examples, result.errors = [], [BadRecordError("nested too deeply")]
    return result


def _parse_object(record: dict[Any, Any], nulls: list[Any], result: ParsedRecord) -> None:
    form = find_form(record)
    if form is None:
        null = f" (null: {short(', '.join(map(str, nulls)))})" if nulls else ""
        raise BadRecordError(f"its keys are {short(', '.join(map(str, record)))}{null}; known are {ACCEPTED}")
    result.form = form.name
    used = {*form.keys, *form.used}
    if form.shape == Shape.PAIRS:
        _parse_pairs(record, result)
    elif form.shape == Shape.TURNS:
        values = parsed(record[form.keys[0]])
        # Of a preference pair only the last answer is the chosen one: the turns before it are of both.
        num_context = len(values) - 1 if form.keys == ("chosen",) and isinstance(values, list) else 0
        _parse_turns(record, form.keys[0], _system(record), values, num_context, result)
    elif form.shape == Shape.TEXT:
        result.examples = [Example((), require_text(record["text"], "text"), "")]
    elif any(is_turns(record[key]) for key in form.keys):
        used = {*form.keys, *SYSTEM_KEYS, "history", *TOOLS_KEYS}
        _parse_pair_of_turns(record, form, result)
    else:
        result.examples = [_parse_pair(record, form)]
    for group in (SYSTEM_KEYS, CONTEXT_KEYS, TOOLS_KEYS):  # of each the first that holds something is used
        used.difference_update([key for key in group if not is_empty(record.get(key))][1:])
    unused = [key for key in record if key not in used and not is_empty(record[key])]
    result.ignored_keys.update(short(key) for key in unused)
    if result.examples:
        _check_nothing_lost(record, unused, result)


def _check_nothing_lost(record: dict[Any, Any], unused: list[Any], result: ParsedRecord) -> None:
    """Raises BadRecordError where a key that carries meaning is not used, and its text stands in no message either."""
    lost_keys = [key for key in unused if key in MEANINGFUL_KEYS]
    if not lost_keys:
        return
    messages = "\n".join(message.content for message in result.examples[-1].messages)
    for key in lost_keys:
        leaves = list(itertools.islice(leaves_of(record[key]), MAX_LEAVES + 1))
        if len(leaves) > MAX_LEAVES or not all(stands_in(text_of(leaf, key).strip(), messages) for leaf in leaves):
            raise BadRecordError(
                f"{key} has no use beside {result.form}, and its text is not in the question; put it there or remove it"
            )


# Conversations


def _parse_turns(
    record: dict[Any, Any], name: str, before: list[Message], values: Any, num_context: int, result: ParsedRecord
) -> None:
    turn_keys: set[str] = set()
    result.examples, result.errors = parse_conversation(values, turn_keys, before, _tools(record), num_context)
    result.ignored_keys |= {f"{name}{key}" for key in turn_keys}


def _parse_pair_of_turns(record: dict[Any, Any], form: Form, result: ParsedRecord) -> None:
    """A prompt and a completion, or a chosen answer, of which one or both are lists of turns.

    The answer may be the whole conversation, with the question as its first turns.
    """
    question, answer = form.keys
    asked, answered = record[question], record[answer]
    before = asked if is_turns(asked) else [{"role": "user", "content": require_text(asked, question)}]
    after = answered if is_turns(answered) else [{"role": "assistant", "content": require_text(answered, answer)}]
    if speaker(after[0]) in {"user", "system"}:
        if is_turns(asked):
            is_asked = after[: len(before)] == before
        else:
            turn = next((turn for turn in after if speaker(turn) == "user"), {})
            is_asked = require_text(asked, question).strip() in [
                text.strip() for text in turn.values() if isinstance(text, str)
            ]
        if not is_asked:
            raise BadRecordError(f"{answer} begins with a question that is not its {question}")
        before, after = after[:-1], after[-1:]
    earlier = [*_system(record), *_history(record)]
    _parse_turns(record, form.name, earlier, [*before, *after], len(before), result)


def _system(record: dict[Any, Any]) -> list[Message]:
    text = optional_text(record, SYSTEM_KEYS)
    return [Message("system", text)] if text else []


def _tools(record: dict[Any, Any]) -> str:
    return parse_tools(next((record[key] for key in TOOLS_KEYS if not is_empty(record.get(key))), None))


def _history(record: dict[Any, Any]) -> list[Message]:
    """The turns before the question: of pairs of a question and its answer, or of turns."""
    values = parsed(record.get("history"))
    if is_empty(values):
        return []
    if not isinstance(values, list):
        raise BadRecordError(f"history: expected a list of pairs, found {kind(values)}")
    turns: list[Any] = []
    for value in values:
        is_pair = isinstance(value, list) and len(value) == 2
        turns += [{"role": r, "content": t} for r, t in zip(ROLES_OF_PAIR, value, strict=True)] if is_pair else [value]
    try:
        messages = read_context(turns)
    except BadRecordError as error:
        raise BadRecordError(f"history: {error}") from None
    if messages[-1].role == "user":
        raise BadRecordError("history: nobody answers its last question")
    return messages


# Questions and answers


def _parse_pairs(record: dict[Any, Any], result: ParsedRecord) -> None:
    pairs = parsed(record["qa_pairs"])
    if not isinstance(pairs, list) or not pairs:
        raise BadRecordError("qa_pairs is no list of pairs" if pairs else "qa_pairs is empty")
    shared: dict[str, Any] = {key: record[key] for key in (*SYSTEM_KEYS, *TOOLS_KEYS) if key in record}
    if context := optional_text(record, CONTEXT_KEYS):
        shared["context"] = context
    for number, pair in enumerate(pairs, 1):
        try:
            if not isinstance(pair, dict):
                raise BadRecordError(f"expected an object, found {kind(pair)}")
            inner = ParsedRecord()
            _parse_object({**shared, **without_nulls(pair)}, [], inner)
            result.examples += inner.examples
            result.ignored_keys |= {f"qa_pairs[].{key}" for key in inner.ignored_keys}
        except BadRecordError as error:
            result.errors.append(BadRecordError(str(error), f", qa_pairs[{number}]"))


def _parse_pair(record: dict[Any, Any], form: Form) -> Example:
    question, *further = _user_parts(record, form)
    answer = require_text(record[form.keys[1]], form.keys[1])
    extra = "\n\n".join(further)
    context = optional_text(record, CONTEXT_KEYS)
    prompt = f"{question}\n\n{extra}" if extra else question
    if context:
        prompt = f"Context: {context}\n\nQuestion: {prompt}"
    messages = (*_system(record), *_history(record), Message("user", prompt))
    return Example(messages, answer, question, context or extra, tools=_tools(record))


def _user_parts(record: dict[Any, Any], form: Form) -> list[str]:
    """What the user says: the instruction, the question and the input, those that the record has."""
    key = form.keys[0]
    question = require_text(record[key], key)
    if key == "instruction":
        asked = optional_text(record, ("question",)) if "question" in form.used else ""
        given = optional_text(record, ("input",))
        return [question, *_unless_in(question, asked), *([given] if given else [])]
    instruction = optional_text(record, ("instruction",)) if "instruction" in form.used else ""
    given = optional_text(record, ("input",)) if "input" in form.used else ""
    return [*_unless_in(question, instruction), question, *_unless_in(question, given)]


def _unless_in(text: str, part: str) -> list[str]:
    return [part] if part and not stands_in(part.strip(), text) else []
