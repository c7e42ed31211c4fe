"""The forms that a record may have: by which keys they are known, and where they come from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

SPEAKERS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard", "claude", "gemini", "ai"),
    "call": ("function_call", "tool_call"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
}
"""Names of speakers, in any case, by what they are. ``call`` is an assistant turn that calls tools."""
ROLES = {name: role for role, names in SPEAKERS.items() for name in names}
SYSTEM_KEYS = ("system", "system_prompt")
CONTEXT_KEYS = ("context_text", "context")
TOOLS_KEYS = ("tools", "functions")
MEANINGFUL_KEYS = (
    *SYSTEM_KEYS, "history", "instruction", "input", *CONTEXT_KEYS, *TOOLS_KEYS, "choices", "options",
)  # fmt: skip
"""What a model must be told to see what the answer answers. A record whose form has no use for one of them is bad, but
where its text stands in the conversation anyway."""


class Shape(StrEnum):
    """What a form's keys hold."""

    TURNS = "a list of turns"
    PAIRS = "a list of pairs"
    PAIR = "a question and its answer"
    TEXT = "plain text"


@dataclass(frozen=True)
class Form:
    """One form of records."""

    shape: Shape
    keys: tuple[str, ...]
    """A record of this form has all of them; of a pair the question's and the answer's."""
    known_from: str
    """Published datasets and programs that have it."""
    example: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """As ``record_form`` calls it."""
        return "/".join(self.keys)

    @property
    def used(self) -> tuple[str, ...]:
        """Further keys that a record of this form may have, and that are used."""
        if self.shape == Shape.TEXT:
            return ()
        if self.shape == Shape.TURNS:
            return (*SYSTEM_KEYS, *TOOLS_KEYS)
        if self.shape == Shape.PAIRS:
            return (*SYSTEM_KEYS, *CONTEXT_KEYS, *TOOLS_KEYS)
        beside = {"instruction": ("question", "input")}.get(self.keys[0], ("instruction", "input"))
        others = [key for key in beside if key not in self.keys]
        return (*SYSTEM_KEYS, *others, *CONTEXT_KEYS, "history", *TOOLS_KEYS)


def _turns(key: str, role: str, content: str, known_from: str, names: tuple[str, str] = ("user", "assistant")) -> Form:
    example = {key: [{role: name, content: text} for name, text in zip(names, ("2+2?", "4"), strict=True)]}
    return Form(Shape.TURNS, (key,), known_from, example)


def _pair(question: str, answer: str, known_from: str, **others: Any) -> Form:
    return Form(Shape.PAIR, (question, answer), known_from, {**others, question: "2+2?", answer: "4"})


FORMS = (
    _turns("messages", "role", "content", "OpenAI, TRL, UltraChat"),
    _turns("conversations", "from", "value", "ShareGPT, OpenHermes, SlimOrca", ("human", "gpt")),
    Form(
        Shape.PAIRS,
        ("qa_pairs",),
        "several questions on one text",
        {"context_text": "2+2 is 4.", "qa_pairs": [{"question": "2+2?", "output": "4"}]},
    ),
    _pair("instruction", "output", "Alpaca", input=""),
    _pair("instruction", "response", "Dolly", context=""),
    _pair("question", "answer", "GSM8K and others"),
    _pair("question", "output", "sets of questions on one text"),
    _pair("input", "output", "Natural Instructions"),
    _pair("prompt", "completion", "TRL, OpenAI; texts or lists of turns"),
    _pair("prompt", "response", "many"),
    # Older versions know those above: a record of two forms stays what it was.
    _pair("question", "response", "OpenOrca", system_prompt="Be brief."),
    _pair("query", "response", "MetaMathQA, ms-swift", history=[["1+1?", "2"]]),
    _pair("query", "answer", "many"),
    _pair("input", "target", "Firefly", kind="Sums"),
    _pair("input", "response", "many"),
    _pair("input", "answer", "many"),
    _pair("instruction", "completion", "many"),
    _pair("instruction", "answer", "many"),
    _pair("prompt", "answer", "many"),
    _pair("prompt", "output", "many"),
    _pair("prompt", "chosen", "preference pairs (TRL, UltraFeedback); texts or lists of turns", rejected="5"),
    _pair("question", "chosen", "preference pairs (Orca DPO)", rejected="5"),
    _pair("instruction", "chosen", "preference pairs", rejected="5"),
    _pair("input", "chosen", "preference pairs", rejected="5"),
    _turns("conversation", "role", "content", "LMSYS-Chat, XTuner"),
    _turns("chosen", "role", "content", "preference pairs, the question within"),
    Form(Shape.TEXT, ("text",), "plain text, all of it supervised", {"text": "Two and two make four."}),
)  # fmt: skip
"""In the order in which they are tried."""
LIST_OF_TURNS = "list of turns"
"""The name of the form of a record that is no object, but a conversation itself."""
ACCEPTED = (
    "messages, conversations, qa_pairs, text, or pairs such as instruction/output, question/answer, prompt/completion"
)


def find_form(keys: Collection[Any]) -> Form | None:
    """The first form of which all keys are there."""
    return next((form for form in FORMS if all(key in keys for key in form.keys)), None)


def is_record(keys: Collection[Any]) -> bool:
    """Whether an object with these keys is a record. One that has nothing but a ``text`` may wrap a list of records."""
    form = find_form(keys)
    return form is not None and form.shape != Shape.TEXT
