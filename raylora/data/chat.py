"""Conversations as text, by the tokenizer's chat template, and where turns stand in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raylora.data.rendering import dated_template
from raylora.errors import ErrorKind, TemplateLimitError, UserError, one_line
from raylora.records import Example, Message

TEMPLATE_CHARS, MOST_SWELLING = 1_000_000, 10
"""Characters that a chat template may add of its own, and how often it may say what it is told: the system turn or the
tools stand in some texts twice."""


def render_chat(
    tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool, tools: str = "", **variables: Any
) -> str:
    """The conversation as text, by the tokenizer's chat template.

    Tokenizers of base models have none: they get ``User: ...`` and ``Assistant: ...``, one turn a line. A template that
    refuses a system turn gets it at the beginning of the next turn, one that refuses user turns in a row gets them as
    one. One that knows no tools gets them, and calls of them, as JSON text; one that refuses the turns of tools gets
    those as the user's. A template that asks for the date is told ``--template-date``.

    Args:
        tools: as ``Example.tools``.
        variables: what else the template is told, such as ``enable_thinking``.

    Raises:
        UserError: the template refuses the conversation.
    """
    template, messages = str(tokenizer.chat_template or ""), list(messages)
    if "tool_calls" not in template:
        messages = [_calls_as_text(message) for message in messages]
    if tools and "tools" not in template:
        messages, tools = tools_as_text(messages, tools), ""
    dicts = [{"role": m.role, "content": m.content, **(json.loads(m.extra) if m.extra else {})} for m in messages]
    if not tokenizer.chat_template:
        text = "".join(f"{m.role.capitalize()}: {m.content}\n" for m in messages)
        return text + ("Assistant: " if add_generation_prompt else "")
    try:
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, **variables}
        options |= {"tools": json.loads(tools)} if tools else {}
        if dated := dated_template(tokenizer, options.get("tools")):
            options["chat_template"] = dated
        return _within_limit(str(tokenizer.apply_chat_template(dicts, **options)), messages, tools)
    except TemplateLimitError:
        raise
    except Exception as error:  # a template may raise anything; most often it refuses a system turn
        if tools or any(m.extra or m.role == "tool" for m in messages):
            return render_chat(tokenizer, _without_tools(messages, tools), add_generation_prompt, **variables)
        if (others := system_in_next_turn(messages)) != messages or (others := _joined_questions(messages)) != messages:
            return render_chat(tokenizer, others, add_generation_prompt, **variables)
        raise UserError(
            f"the tokenizer's chat template refuses the conversation that ends in {_shortened(dicts)}: "
            f"{one_line(error)}; fix or remove it",
            kind=ErrorKind.CHAT_TEMPLATE,
        ) from error


def _within_limit(text: str, messages: Sequence[Message], tools: str) -> str:
    """The rendered text.

    Raises:
        TemplateLimitError: it is far longer than the conversation.
    """
    told = len(tools) + sum(len(m.content) + len(m.extra) for m in messages)
    if len(text) > TEMPLATE_CHARS + MOST_SWELLING * told:
        raise TemplateLimitError(
            f"the tokenizer's chat template makes {len(text):,} characters of a conversation of {told:,}; fix it"
        )
    return text


def system_in_next_turn(messages: Sequence[Message]) -> list[Message]:
    """The same with the system turn, if there is one, at the beginning of the turn behind it."""
    if len(messages) < 2 or messages[0].role != "system":
        return list(messages)
    merged = replace(messages[1], role="user", content=f"{messages[0].content}\n\n{messages[1].content}")
    return [merged, *messages[2:]]


def _joined_questions(messages: Sequence[Message]) -> list[Message]:
    """The same with user turns in a row as one: a tool's text, as a user turn, and the question behind it."""
    joined: list[Message] = []
    for message in messages:
        if joined and message.role == joined[-1].role == "user":
            joined[-1] = replace(joined[-1], content=f"{joined[-1].content}\n\n{message.content}")
        else:
            joined.append(message)
    return joined


def _shortened(messages: Sequence[dict[str, str]]) -> str:
    last_turns = [f"{m['role']}: {' '.join(m['content'].split())[:40]}" for m in messages[-2:]]
    return repr(" / ".join(last_turns))


# Tools, for templates that know none


def _calls_as_text(message: Message) -> Message:
    if message.role != "assistant" or not message.extra:
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in json.loads(message.extra)["tool_calls"]]
    return replace(message, content="\n".join([*filter(None, [message.content]), *calls]), extra="")


def tools_as_text(messages: Sequence[Message], tools: str) -> list[Message]:
    """The messages, with the tools in the system turn."""
    first = messages[0].content + "\n\n" if messages and messages[0].role == "system" else ""
    return [Message("system", f"{first}Tools: {tools}"), *messages[1 if first else 0 :]]


def _without_tools(messages: Sequence[Message], tools: str) -> list[Message]:
    """The same as turns of system, user and assistant. What tools return, one after another, is one user turn."""
    plain: list[list[Message]] = []
    for message in tools_as_text(messages, tools) if tools else messages:
        if message.role == "tool" and plain and plain[-1][0].role == "tool":
            plain[-1].append(message)
        else:
            plain.append([message])
    return [
        Message("user", "\n\n".join(m.content for m in turns)) if turns[0].role == "tool" else _calls_as_text(turns[0])
        for turns in plain
    ]


# Turns not to be learned


def untrained_spans(tokenizer: Any, example: Example, whole: str, end_of_turn: str) -> list[tuple[int, int]]:
    """(start, end), in characters of the rendered conversation ``whole``, of each turn that is not to be learned.

    Without those that an earlier example of the conversation has too. The conversation is rendered once more with a
    mark in place of each turn's text: what stands between two marks stands between the two texts as well.
    """
    turns = [*example.messages, Message("assistant", example.answer)]
    wanted = {i for i in range(example.num_repeated, len(turns)) if not turns[i].is_trained}
    if not wanted:
        return []
    # A number each, of one width: none is the beginning of another.
    marks = [f"Turn {i:08} stands here." if turn.content else "" for i, turn in enumerate(turns)]
    marked = [replace(turn, content=mark) for turn, mark in zip(turns, marks, strict=True)]
    rendered = render_chat(tokenizer, marked, False, example.tools)
    separators, shown, end = [], [], 0
    for i, mark in enumerate(marks):
        if mark and (start := rendered.find(mark, end)) >= 0:  # a template may leave a turn out
            separators.append(rendered[end:start])
            shown.append(i)
            end = start + len(mark)
    separators.append(rendered[end:])
    spans, position = [], 0
    for before, i, after in zip(separators, shown, separators[1:], strict=False):
        start = max(whole.find(before, position), position) + len(before)
        texts = (turns[i].content, turns[i].content.strip())
        text = next((text for text in texts if whole.startswith(text + after[:1], start)), None)
        found = start + len(text) if text is not None else whole.find(after, start) if after else -1
        position = found if found >= 0 else len(whole)
        if i in wanted:
            has_end = bool(end_of_turn) and whole.startswith(end_of_turn, position)
            spans.append((start, position + len(end_of_turn) * has_end))
    return spans
