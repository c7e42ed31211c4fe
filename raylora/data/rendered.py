"""Examples as text: what the chat template makes of them, where question and answer stand, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raylora.data.chat import render_chat, system_in_next_turn, tools_as_text, untrained_spans
from raylora.data.rendering import special_tokens_of
from raylora.errors import UserError
from raylora.records import Example, Message

ANOTHER_ANSWER = "Another answer stands here."
"""Rendered in place of an example's answer, to see where a chat template puts answers."""

MAX_KEPT_REASONS = 100


@dataclass(frozen=True)
class Rendered:
    """An example as text, and (start, end) of its question and of its answer in it, in characters."""

    text: str
    question: tuple[int, int]
    answer: tuple[int, int]
    repeated_end: int
    """Where the turns end that an earlier example of the conversation has too; 0 where there are none."""
    untrained: Sequence[tuple[int, int]] = ()
    """(start, end) of each turn behind these of which nothing is to be learned."""
    is_plain: bool = False
    """Whether no template rendered it: the record is a text."""
    has_special_text: bool = False
    """Whether special tokens are written in the data: ``text`` is swapped, as ``SpecialTokens.tokenize`` takes it."""
    is_cut: bool = False
    """Whether the template left out more of the answer than white space."""
    has_end: bool = True
    """Whether a special or added token stands behind the answer."""
    is_system_dropped: bool = False


def render_example(tokenizer: Any, example: Example) -> Rendered:
    """An example as its chat template renders it; a plain text has the tokenizer's end behind it.

    Raises:
        UserError: the template refuses it.
    """
    special = special_tokens_of(tokenizer)
    if not special.is_in_example(example):
        return _render_text(tokenizer, example)
    rendered = _render_text(tokenizer, special.hidden_example(example))
    spans = [rendered.question, rendered.answer, (rendered.repeated_end,) * 2, *rendered.untrained]
    moved = iter(special.swapped_places(rendered.text, [place for span in spans for place in span]))
    question, answer, (repeated_end, _), *untrained = zip(moved, moved, strict=True)
    return replace(
        rendered,
        text=special.swapped(rendered.text),
        question=question,
        answer=answer,
        repeated_end=repeated_end,
        untrained=untrained,
        has_special_text=True,
    )


def _render_text(tokenizer: Any, example: Example) -> Rendered:
    special = special_tokens_of(tokenizer)
    if not example.messages:
        end = tokenizer.eos_token or ""
        return Rendered(
            example.answer + end, (0, 0), (0, len(example.answer)), 0, is_plain=True, has_end=special.has_mark(end)
        )
    asked = example.asked.strip()
    example = _with_tools_as_text(tokenizer, example)
    prompt, whole = _prompt_and_whole(tokenizer, example)
    is_dropped = _is_system_dropped(example, whole)
    if is_dropped:  # many templates leave a system turn out where others refuse it
        merged = tuple(system_in_next_turn(example.messages))
        example = replace(example, messages=merged, num_repeated=max(example.num_repeated - 1, 0))
        prompt, whole = _prompt_and_whole(tokenizer, example)
        is_dropped = not _has_text(whole, merged[0].content)
    answer_start, answer_end = _find_answer(tokenizer, example, prompt, whole)
    # Many templates put a line break after the end-of-turn token: no use to supervise it.
    whole = whole[:answer_end] + whole[answer_end:].rstrip()
    question_start = whole.rfind(asked, 0, answer_start) if asked else -1
    question = (question_start, question_start + len(asked)) if question_start >= 0 else (0, 0)
    repeated_end = _find_repeated_end(tokenizer, example, whole, whole[answer_end:]) if example.num_repeated else 0
    untrained = untrained_spans(tokenizer, example, whole, whole[answer_end:])
    is_cut, end = not _has_text(whole[answer_start:answer_end], example.answer), whole[answer_end:]
    # Where a template changes every text, what it writes behind an answer counts as a part of it.
    has_end = special.ends_with_mark(whole.rstrip()) if is_cut and not end else special.has_mark(end)
    return Rendered(
        whole,
        question,
        (answer_start, answer_end),
        min(repeated_end, answer_start),
        untrained,
        is_cut=is_cut,
        has_end=has_end,
        is_system_dropped=is_dropped,
    )


def _prompt_and_whole(tokenizer: Any, example: Example) -> tuple[str, str]:
    """The conversation up to the answer, and with it."""
    prompt = render_chat(tokenizer, example.messages, True, example.tools)
    if not tokenizer.chat_template:
        return prompt, prompt + example.answer + (tokenizer.eos_token or "")
    return prompt, render_chat(
        tokenizer, [*example.messages, Message("assistant", example.answer)], False, example.tools
    )


def _with_tools_as_text(tokenizer: Any, example: Example) -> Example:
    """The example as ``render_chat`` tells it to a template that knows no tools: with a system turn, which may drop."""
    if not example.tools or "tools" in str(tokenizer.chat_template):
        return example
    messages = tuple(tools_as_text(example.messages, example.tools))
    num_more = len(messages) - len(example.messages)
    return replace(
        example, messages=messages, tools="", num_repeated=example.num_repeated and example.num_repeated + num_more
    )


def _is_system_dropped(example: Example, whole: str) -> bool:
    first = example.messages[0]
    return first.role == "system" and not _has_text(whole, first.content)


def _has_text(rendered: str, text: str) -> bool:
    """Whether a text is in what a template made of it, white space aside."""
    return text in rendered or "".join(text.split()) in "".join(rendered.split())


def _find_answer(tokenizer: Any, example: Example, prompt: str, whole: str) -> tuple[int, int]:
    """Start and end of the answer in the rendered conversation ``whole``, in characters.

    Most templates put it right after the prompt, and may strip its white space. Templates that add or remove thinking
    change the text before it: there the conversation is rendered once more with ``ANOTHER_ANSWER``, and the answer is
    what stands between the same text before and the same text after.
    """
    if whole.startswith(prompt):
        completion = whole[len(prompt) :]
        for answer in (example.answer, example.answer.strip()):
            for skipped in range(len(completion) - len(completion.lstrip()) + 1):
                if completion.startswith(answer, skipped):
                    start = len(prompt) + skipped
                    return start, start + len(answer)
        if (end := _end_of_spaced(completion, example.answer)) is not None:
            return len(whole) - len(completion.lstrip()), len(prompt) + end
    other = render_chat(tokenizer, [*example.messages, Message("assistant", ANOTHER_ANSWER)], False, example.tools)
    before, separator, after = other.rpartition(ANOTHER_ANSWER)
    start = common_prefix_length(whole, before)
    if separator and whole.endswith(after) and start <= len(whole) - len(after):
        return start, len(whole) - len(after)
    return common_prefix_length(whole, prompt), len(whole)


def _end_of_spaced(rendered: str, text: str) -> int | None:
    """Where a text ends that ``rendered`` begins with, other white space aside; None where it does not begin so."""
    letters = iter("".join(text.split()))
    wanted = next(letters, None)
    for place, character in enumerate(rendered):
        if wanted is None:
            return place
        if character == wanted:
            wanted = next(letters, None)
        elif not character.isspace():
            return None
    return len(rendered) if wanted is None else None


def _find_repeated_end(tokenizer: Any, example: Example, whole: str, end_of_turn: str) -> int:
    """Where the last turn that an earlier example supervises ends in the rendered conversation ``whole``.

    Most templates render these turns as they do when nothing follows: then ``whole`` begins with them. Templates that
    drop thinking from earlier turns do not: there the conversation is rendered once more with ``ANOTHER_ANSWER`` in
    place of that turn, which ends where the same text follows in both.
    """
    earlier, last = example.messages[: example.num_repeated], example.messages[example.num_repeated - 1]
    rendered = render_chat(tokenizer, earlier, False, example.tools)
    # As in the earlier example: without the line break behind the end-of-turn token, with all white space before it.
    end = max(len(rendered.rstrip()), rendered.rfind(last.content) + len(last.content))
    if end <= len(rendered) and whole.startswith(rendered[:end]):
        return end
    # It must not end as the turn does: the same text would begin too early.
    other = ANOTHER_ANSWER.removesuffix("." if last.content.rstrip().endswith(".") else "")
    messages = [*earlier[:-1], Message(last.role, other), *example.messages[example.num_repeated :]]
    changed = render_chat(tokenizer, [*messages, Message("assistant", example.answer)], False, example.tools).rstrip()
    end = len(whole) - common_prefix_length(whole[::-1], changed[::-1])
    return end + len(end_of_turn) if whole.startswith(end_of_turn, end) else end


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters, or tokens, at the beginning are the same in both."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# Many


@dataclass
class TemplateCounts:
    """What became of examples in the chat template, counted by ``encode_each``."""

    num_examples: int = 0
    refused: dict[int, str] = field(default_factory=dict)
    """Which examples the template refuses, counted from 0, and why (of the first ``MAX_KEPT_REASONS``). Nothing of them
    is in the other counts."""
    num_answers_cut: int = 0
    """Answers of which not all is supervised, white space aside: templates of reasoning models cut the thinking."""
    num_without_end: int = 0
    """Answers without a special or added token behind them: the model is not taught to stop."""
    num_systems_dropped: int = 0
    """Examples whose system turn is not in the rendered text."""
    first_cut: int | None = None
    """The first example whose answer is cut."""

    def add(self, number: int, rendered: Rendered) -> None:
        """Count an example: its number, and what became of it."""
        self.num_examples += 1
        self.num_answers_cut += rendered.is_cut
        self.num_without_end += not rendered.has_end
        self.num_systems_dropped += rendered.is_system_dropped
        if rendered.is_cut and self.first_cut is None:
            self.first_cut = number

    @property
    def note_on_sample(self) -> str:
        """What the chat template does to the first examples of a dataset, for the dry run."""
        of_all = f"the chat template refuses {len(self.refused)} of the first {len(self.refused) + self.num_examples}"
        return "; ".join(filter(None, [f"{of_all} examples" if self.refused else "", self.note]))

    @property
    def note(self) -> str:
        """What is missing in the rendered text; empty where nothing is."""
        of_all = f"of {self.num_examples:,} examples"
        causes = {
            f"the chat template leaves out a part of the answer of {self.num_answers_cut:,} {of_all}": (
                self.num_answers_cut
            ),
            f"no end-of-turn token stands behind the answer of {self.num_without_end:,} {of_all}: the model does not "
            "learn to stop there": self.num_without_end,
            f"the chat template leaves out the system turn of {self.num_systems_dropped:,} {of_all}": (
                self.num_systems_dropped
            ),
        }
        return "; ".join(text for text, number in causes.items() if number)


def count_in_template(tokenizer: Any, examples: Iterable[Example], counts: TemplateCounts) -> None:
    """Count examples, without their tokens."""
    for _ in render_each(tokenizer, examples, counts):
        pass


def render_each(tokenizer: Any, examples: Iterable[Example], counts: TemplateCounts | None) -> Iterator[Rendered]:
    """``render_example`` of each; see ``encoding.encode_each``."""
    for number, example in enumerate(examples):
        try:
            rendered = render_example(tokenizer, example)
        except UserError as error:
            if counts is None:
                raise
            counts.refused[number] = str(error) if len(counts.refused) < MAX_KEPT_REASONS else ""
            continue
        if counts is not None:
            counts.add(number, rendered)
        yield rendered
