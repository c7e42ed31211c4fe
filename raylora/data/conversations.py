"""Conversations as examples: whose turns they are, which are answers to learn, and what is good of a damaged one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raylora.data.record_forms import ROLES, SPEAKERS
from raylora.data.record_stream import kind, short
from raylora.data.record_values import is_empty, json_text, parsed, require_text, text_of, without_nulls
from raylora.errors import BadRecordError
from raylora.records import Example, Message, digest

ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
TRAIN_KEYS = ("weight", "train", "training", "loss")
"""Of OpenAI, Axolotl and ms-swift: 0 or false where nothing is to be learned from a turn."""
TOOL_KEYS = ("tool_calls", "function_call", "name", "tool_call_id")
TWO_TURNS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))
"""Keys of objects that hold a question and its answer, as XTuner has them."""
# Published datasets, Chinese ones too, put the passage or the input into the question itself. Neighbouring parts of a
# pattern never match the same characters: if they did, a text could take time that grows with the square of its length.
CONTEXT_QUESTION = re.compile(
    r"(?:背景|Context|Background) ?[:：](?P<context>.+?)\n[ \t]*\n(?:问题|Question) ?[:：](?P<question>.+)", re.S
)
QUESTION_INPUT = re.compile(r"(?P<question>.+?)\n[ \t]*\n(?:输入|Input) ?[:：](?P<context>.+)", re.S)


@dataclass
class Turn:
    """A turn as it is read, or several of one speaker in a row, ``texts``, which become one message."""

    role: str
    texts: list[str]
    extra: str = ""
    is_trained: bool = True
    is_context: bool = False
    """An answer that is no example: of a history or a prompt, or a call of a tool."""

    def is_said_with(self, other: Turn) -> bool:
        """Whether it and the turn after it are one: of one speaker, with nothing that only one of them has."""
        ours, theirs = (replace(turn, texts=[]) for turn in (self, other))
        return ours == theirs and not self.extra and self.role != "tool"

    @property
    def message(self) -> Message:
        return Message(self.role, "\n\n".join(self.texts), self.extra, self.is_trained)


def is_turns(value: Any) -> bool:
    """Whether a value is a list of turns rather than a text."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def speaker(turn: Any) -> str | None:
    """The role of a turn, ``call`` of one that calls tools; None where it is no turn of a known one."""
    name = next((turn[key] for key in ROLE_KEYS if turn.get(key) is not None), None) if isinstance(turn, dict) else None
    return ROLES.get(name.strip().lower().replace("-", "_")) if isinstance(name, str) else None


def parse_conversation(
    values: Any, ignored: set[str], before: Sequence[Message] = (), tools: str = "", num_context: int = 0
) -> tuple[list[Example], list[BadRecordError]]:
    """An example for each answer, with all turns before it as its messages; an error for each turn left out.

    A conversation is read up to a turn that makes all behind it doubtful: of an unknown speaker, a later system turn,
    a question without text. Of a greeting, and of an answer without text, nothing else is left out.

    Args:
        values: the turns as they are in the file.
        ignored: the keys of turns that are not used are added to it.
        before: turns that the record has elsewhere.
        num_context: how many of ``values``, from the front, are no answers to be learned.

    Raises:
        BadRecordError: nothing of it is good.
    """
    values = parsed(values)
    if not isinstance(values, list) or not values:
        raise BadRecordError("its conversation is no list of turns" if values else "its conversation is empty")
    turns, errors = _read_turns(values, ignored, before, num_context)
    messages = [*before, *(turn.message for turn in turns)]
    is_answer = [*[False] * len(before), *(_is_answer(turn) for turn in turns)]
    examples = list(_examples(messages, is_answer, tools))
    if not examples:
        raise _named(errors[-1]) if errors else BadRecordError(_why_no_answer(turns))
    if len(examples) > 1:
        conversation = digest([m.values for m in messages], 32)
        examples = [replace(example, conversation=conversation) for example in examples]
    return examples, errors


def _is_answer(turn: Turn) -> bool:
    return turn.role == "assistant" and turn.is_trained and not turn.is_context and not turn.extra


def _why_no_answer(turns: Sequence[Turn]) -> str:
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        return "nobody answers: there is no assistant turn"
    if any(turn.is_trained for turn in answers):
        return "its assistant turns call tools or are context, and none answers"
    return "no answer is to be learned: all have weight 0 or train false"


def _examples(messages: Sequence[Message], is_answer: Sequence[bool], tools: str) -> Iterator[Example]:
    question = context = ""
    returned: list[str] = []  # by tools, since somebody spoke
    num_repeated = 0
    for i, message in enumerate(messages):
        if is_answer[i]:
            given = "\n\n".join(returned) or context
            yield Example(tuple(messages[:i]), message.content, question, given, "", num_repeated, tools)
            num_repeated = i + 1  # this answer is a message of the examples that follow
        if message.role == "tool":
            returned.append(message.content)
        elif message.role == "user":
            question, context = split_context(message.content)
        if message.role != "tool" and not message.extra:
            returned = []


def read_context(values: Sequence[Any]) -> list[Message]:
    """Turns of which none is an answer to be learned.

    Raises:
        BadRecordError: one of them is bad.
    """
    turns, errors = _read_turns(values, set(), (), len(values))
    if errors:
        raise _named(errors[0])
    return [turn.message for turn in turns]


def _named(error: BadRecordError) -> BadRecordError:
    """The error with its place in the text, not beside it."""
    return BadRecordError(f"{error.place.removeprefix(', ')}: {error}")


def split_context(text: str) -> tuple[str, str]:
    """The question of a user turn, and the passage or the input that it holds; an empty text where it holds none."""
    question = text.strip()
    for pattern in (CONTEXT_QUESTION, QUESTION_INPUT):
        match = pattern.fullmatch(question)
        if match and match["question"].strip() and match["context"].strip():
            return match["question"].strip(), match["context"].strip()
    return question, ""


# Turns


def _read_turns(
    values: Sequence[Any], ignored: set[str], before: Sequence[Message], num_context: int
) -> tuple[list[Turn], list[BadRecordError]]:
    """The turns up to the first that cannot be gone past, and an error for each that is left out."""
    turns: list[Turn] = []
    errors: list[BadRecordError] = []
    is_asked = any(message.role == "user" for message in before)
    for number, value in enumerate(values, 1):
        try:
            for turn in _read_turn(value, ignored):
                turn.is_context |= number <= num_context
                is_asked |= turn.role == "user"
                if turn.role == "system" and _is_said_already(turn, turns, before):
                    continue
                if why := _why_left_out(turn, is_asked):
                    errors.append(BadRecordError(why, f", turn {number}"))
                elif turns and turns[-1].is_said_with(turn):
                    turns[-1].texts += turn.texts
                else:
                    turns.append(turn)
        except BadRecordError as error:
            num_behind = len(values) - number
            behind = f"; the turns behind it, {num_behind}, are left out as well" if num_behind else ""
            errors.append(BadRecordError(f"{error}{behind}", f", turn {number}"))
            break
    return turns, errors


def _is_said_already(turn: Turn, turns: Sequence[Turn], before: Sequence[Message]) -> bool:
    """Whether a system turn is one of no text, or of the text that a key of the record has too.

    Raises:
        BadRecordError: a system turn may not stand here.
    """
    if is_empty(turn.texts[0]):
        return True
    if before and not turns:
        if turn.texts[0].strip() == before[0].content.strip():
            return True
        raise BadRecordError("is a system turn, and the record has another system text or a history beside it")
    if any(earlier.role != "system" for earlier in turns[-1:]):
        raise BadRecordError("is a system turn; only the first may be")
    return False


def _why_left_out(turn: Turn, is_asked: bool) -> str:
    """Why a turn is left out, and those behind it are not; empty where it stays."""
    if not is_asked and turn.role != "system":
        return "answers, but no user turn stands before it"
    if turn.role == "assistant" and not turn.extra and is_empty(turn.texts[0]):
        return "answers, but its text is empty"
    return ""


def _read_turn(value: Any, ignored: set[str]) -> list[Turn]:
    """A turn of the file, or the two or three that one object holds.

    Raises:
        BadRecordError: nobody can know what it says, or who says it.
    """
    if not isinstance(value, dict):
        raise BadRecordError(f"expected an object, found {kind(value)}")
    turn = without_nulls(value)
    if not any(key in turn for key in ROLE_KEYS):
        for question, answer in TWO_TURNS:
            if question in turn and answer in turn:
                return _two_turns(turn, question, answer, ignored)
    role = speaker(turn)
    if role is None:
        name = next((turn[key] for key in ROLE_KEYS if key in turn), None)
        shown = short(name) if isinstance(name, str) else kind(name)
        known = ", ".join(name for names in SPEAKERS.values() for name in names)
        raise BadRecordError(f"role {shown}; known are {known}")
    used = {*ROLE_KEYS[:2], *CONTENT_KEYS[:2], *TRAIN_KEYS, *(TOOL_KEYS if role in {"assistant", "tool"} else ())}
    content = next((turn[key] for key in CONTENT_KEYS if key in turn), "")
    used |= {key for key in (*ROLE_KEYS, *CONTENT_KEYS) if turn.get(key) is content}
    ignored.update(f"[].{short(key)}" for key in turn if key not in used)
    is_trained = _is_trained(turn)
    if role == "call":
        return [_call_turn(content, is_trained)]
    if role == "tool":
        extra = {key: turn[key] for key in ("name", "tool_call_id") if not is_empty(turn.get(key))}
        return [Turn("tool", [_returned(content, ignored)], _extra(extra), is_trained)]
    text = _join_parts(content, ignored) if isinstance(content, list) else text_of(content, "content")
    if role == "user":
        return [Turn("user", [require_text(text, "content")], "", is_trained)]
    extra = {}
    if role == "assistant" and (calls := _calls(turn)):
        extra = {"tool_calls": calls}
    return [Turn(role, [text], _extra(extra), is_trained)]


def _two_turns(turn: Mapping[str, Any], question: str, answer: str, ignored: set[str]) -> list[Turn]:
    system = [Turn("system", [text_of(turn["system"], "system")])] if "system" in turn else []
    ignored.update(f"[].{short(key)}" for key in turn if key not in {"system", question, answer, *TRAIN_KEYS})
    asked, answered = require_text(turn[question], question), text_of(turn[answer], answer)
    return [*system, Turn("user", [asked]), Turn("assistant", [answered], "", _is_trained(turn))]


def _is_trained(turn: Mapping[str, Any]) -> bool:
    """Whether the turn is to be learned, if it is an answer.

    Raises:
        BadRecordError: it is to be learned by half, or in parts.
    """
    if "train_detail" in turn and not is_empty(turn["train_detail"]):
        raise BadRecordError("train_detail: parts of a turn cannot be left out; give train: false, or two turns")
    values = [(key, turn[key]) for key in TRAIN_KEYS if key in turn]
    for key, value in values:
        if not isinstance(value, bool | int | float) or value not in {0, 1}:
            shown = value if isinstance(value, float | int) else kind(value)
            raise BadRecordError(f"{key}: expected 0, 1, true or false, found {short(shown)}")
    return all(value for _, value in values)


def _join_parts(parts: list[Any], ignored: set[str]) -> str:
    """The text of a turn whose content is a list of parts, as multimodal chats have it."""
    texts = []
    for part in parts:
        if isinstance(part, dict):
            part = without_nulls(part)
            ignored.update(f"[].content[].{short(key)}" for key in part if key not in {"type", "text"})
            part = part.get("text") if part.get("type", "text") == "text" else None
        if part is None or isinstance(part, dict | list):
            raise BadRecordError("has parts that are no text")
        texts.append(text_of(part, "text"))
    return "".join(texts)


# Tools


def _call_turn(content: Any, is_trained: bool) -> Turn:
    """A turn that is nothing but calls, as ShareGPT has it: ``{"name": ..., "arguments": ...}`` or a list of these."""
    calls = parsed(content)
    calls = calls if isinstance(calls, list) else [calls]
    if all(isinstance(call, dict) and "name" in call for call in calls):
        return Turn("assistant", [""], _extra({"tool_calls": [_call(call) for call in calls]}), is_trained)
    return Turn("assistant", [require_text(content, "content")], "", is_trained, is_context=True)


def _calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of an assistant turn, as chat templates take them; none in most."""
    calls = parsed(turn.get("tool_calls"))
    if is_empty(calls) and not is_empty(turn.get("function_call")):
        calls = [parsed(turn["function_call"])]
    if is_empty(calls):
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRecordError("tool_calls: expected a list of objects")
    return [_call(call) for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    call = without_nulls(call)
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecordError("tool_calls: a call names no function")
    arguments = parsed(function.get("arguments", function.get("parameters")))
    identity = {"id": call["id"]} if "id" in call else {}
    arguments = {} if arguments is None else arguments
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _returned(content: Any, ignored: set[str]) -> str:
    """What a tool returned, as text."""
    if isinstance(content, list) and any(isinstance(part, dict) and "text" in part for part in content):
        return _join_parts(content, ignored)
    return json_text(content, "content") if isinstance(content, dict | list) else text_of(content, "content")


def _extra(values: dict[str, Any]) -> str:
    return json_text(values, "tool_calls") if values else ""


def parse_tools(value: Any) -> str:
    """The tools that a record names, as JSON text for chat templates; empty where there are none.

    Raises:
        BadRecordError: it is no list of tools.
    """
    tools = parsed(value)
    if is_empty(tools):
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecordError("tools: expected a list of objects, or its JSON text")
    wrapped = [
        tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in tools
    ]
    return json_text(wrapped, "tools")
