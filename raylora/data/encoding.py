"""Examples as token ids: chat template, labels, and minibatches by token budget.

A minibatch is either rows padded on the left, so that what is scored stands at the end of each, or one row of several
examples packed one after another.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, overload

import numpy as np

from raylora.data.disk_list import DiskList
from raylora.errors import ErrorKind, UserError
from raylora.records import Example, Message

IGNORE_INDEX = -100
ANOTHER_ANSWER = "Another answer stands here."
ENCODED_TOGETHER = 512
"""Examples tokenised together."""
T = TypeVar("T")
TrainOn = Literal["answer", "all"]


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example and, for each token, whether it is of the question or of the answer.

    Tokens of the chat template itself and of earlier turns are neither.
    """

    input_ids: list[int]
    is_question: list[bool]
    is_answer: list[bool]
    """The answer and the mark that ends the turn."""
    is_answer_text: list[bool] = field(repr=False)
    """The answer alone."""

    def __len__(self) -> int:
        return len(self.input_ids)


def render_chat(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """The conversation as text, by the tokenizer's own chat template, or a plain one where it has none.

    The plain form (``User: ...``, ``Assistant: ...``, one line break between turns) serves base models.

    Raises:
        UserError: the template does not accept these roles.
    """
    dicts = [{"role": m.role, "content": m.content} for m in messages]
    if not tokenizer.chat_template:
        text = "".join(f"{m.role.capitalize()}: {m.content}\n" for m in messages)
        return text + ("Assistant: " if add_generation_prompt else "")
    try:
        return str(tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # a template may raise anything; most often it knows no system turn
        if dicts and dicts[0]["role"] == "system" and len(dicts) > 1:
            merged = Message("user", f"{dicts[0]['content']}\n\n{dicts[1]['content']}")
            return render_chat(tokenizer, [merged, *messages[2:]], add_generation_prompt)
        raise UserError(
            f"the tokenizer's chat template refuses the conversation that ends in {_shortened(dicts)}: {error}; fix "
            "or remove it",
            kind=ErrorKind.CHAT_TEMPLATE,
        ) from error


def _shortened(messages: Sequence[dict[str, str]]) -> str:
    said = [f"{m['role']}: {' '.join(m['content'].split())[:40]}" for m in messages[-2:]]
    return repr(" / ".join(said))


def encode_example(tokenizer: Any, example: Example, max_length: int) -> EncodedExample:
    """Tokenise one example whole and mark its tokens by the characters they stand for.

    Longer than ``max_length`` tokens: the front is cut, as the answer and the question nearest to it matter most; an
    answer that is longer by itself loses its end.
    """
    return next(encode_each(tokenizer, [example], max_length))


def encode_each(tokenizer: Any, examples: Iterable[Example], max_length: int) -> Iterator[EncodedExample]:
    """``encode_example`` of each, tokenised ``ENCODED_TOGETHER`` at a time."""
    left = iter(examples)
    while part := [_render(tokenizer, example) for example in itertools.islice(left, ENCODED_TOGETHER)]:
        for rendered, ids, offsets in zip(part, *_tokenize(tokenizer, part), strict=True):
            yield _marked(rendered, ids, offsets, max_length)[0]


def encode_with_offsets(
    tokenizer: Any, example: Example, max_length: int
) -> tuple[EncodedExample, str, list[tuple[int, int]]]:
    """``encode_example``, the answer as it stands in the text, and the characters of it that each of its tokens is."""
    rendered = _render(tokenizer, example)
    (ids,), (offsets,) = _tokenize(tokenizer, [rendered])
    encoded, kept = _marked(rendered, ids, offsets, max_length)
    start, end = rendered.answer
    mine = [pair for pair, of_answer in zip(offsets[kept], encoded.is_answer_text, strict=True) if of_answer]
    return encoded, rendered.text[start:end], [(max(a - start, 0), min(b, end) - start) for a, b in mine]


def _tokenize(tokenizer: Any, part: Sequence[_Rendered]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Token ids and the characters they stand for."""
    encoded = tokenizer(
        [rendered.text for rendered in part],
        add_special_tokens=not tokenizer.chat_template,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=False,
    )
    return encoded["input_ids"], encoded["offset_mapping"]


def pad_token_of(tokenizer: Any) -> int:
    """The token that fills rows up, where nothing looks: any will do for a tokenizer without one of its own."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)


@dataclass(frozen=True)
class _Rendered:
    """An example as text, and where in it, in characters, its question and its answer begin and end."""

    text: str
    question: tuple[int, int]
    answer: tuple[int, int]


def _render(tokenizer: Any, example: Example) -> _Rendered:
    prompt = render_chat(tokenizer, example.messages, add_generation_prompt=True)
    whole = render_chat(tokenizer, [*example.messages, Message("assistant", example.answer)], False)
    if not tokenizer.chat_template:
        whole = prompt + example.answer + (tokenizer.eos_token or "")
    answer_start, answer_end = _place_of_answer(tokenizer, example, prompt, whole)
    whole = whole[:answer_end] + whole[answer_end:].rstrip()  # the line break behind the end mark teaches nothing
    last_user = example.messages[-1].content.strip()
    question_start = whole.rfind(last_user, 0, answer_start) if last_user else -1
    question = (question_start, question_start + len(last_user)) if question_start >= 0 else (0, 0)
    return _Rendered(whole, question, (answer_start, answer_end))


def _place_of_answer(tokenizer: Any, example: Example, prompt: str, whole: str) -> tuple[int, int]:
    """Where in ``whole`` the answer begins and ends, in characters.

    Mostly right behind the prompt, but for what templates strip. Those that add or drop thinking are asked where they
    put another answer: what stands between the same neighbours is this one's.
    """
    if whole.startswith(prompt):
        behind = whole[len(prompt) :]
        for answer in (example.answer, example.answer.strip()):
            for skipped in range(len(behind) - len(behind.lstrip()) + 1):
                if behind.startswith(answer, skipped):
                    start = len(prompt) + skipped
                    return start, start + len(answer)
    other = render_chat(tokenizer, [*example.messages, Message("assistant", ANOTHER_ANSWER)], False)
    before, found, after = other.rpartition(ANOTHER_ANSWER)
    start = _num_common(whole, before)
    if found and whole.endswith(after) and start <= len(whole) - len(after):
        return start, len(whole) - len(after)
    return _num_common(whole, prompt), len(whole)


def _num_common(text: str, other: str) -> int:
    """Characters from the front that both share."""
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _marked(
    rendered: _Rendered, input_ids: list[int], offsets: Sequence[tuple[int, int]], max_length: int
) -> tuple[EncodedExample, slice]:
    """The example, and which of all its tokens are kept."""
    (question_start, question_end), (answer_start, answer_end) = rendered.question, rendered.answer
    start, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    # A token that reaches into the answer is the answer's: with the space that many templates put before it, its first
    # word is one token. An empty token (a special one put in front) is nobody's.
    is_answer = (end > np.maximum(start, answer_start)).tolist()
    is_text = ((start < answer_end) & (end > np.maximum(start, answer_start))).tolist()
    is_question = ((start < question_end) & (end > np.maximum(start, question_start))).tolist()
    keep = _kept_window(is_answer, max_length)
    return EncodedExample(input_ids[keep], is_question[keep], is_answer[keep], is_text[keep]), keep


def _kept_window(is_answer: list[bool], max_length: int) -> slice:
    """The ``max_length`` tokens to keep: the last ones, unless that would leave no prompt before the answer."""
    if len(is_answer) <= max_length:
        return slice(0, len(is_answer))
    first_answer = is_answer.index(True) if True in is_answer else len(is_answer)
    start = min(len(is_answer) - max_length, max(first_answer - max_length // 4, 0))
    return slice(start, start + max_length)


def labels_of(encoded: EncodedExample, train_on: TrainOn) -> list[int]:
    """Token ids where the loss looks, -100 elsewhere: the answers, or everything. Nothing predicts a first token."""
    supervised = [train_on == "all" or of_answer for of_answer in encoded.is_answer]
    labels = [t if wanted else IGNORE_INDEX for t, wanted in zip(encoded.input_ids, supervised, strict=True)]
    return [IGNORE_INDEX, *labels[1:]]


def lengths_of(examples: Sequence[EncodedExample]) -> Sequence[int]:
    """Tokens of each example; none is read from disk for it."""
    return examples.lengths if isinstance(examples, StoredEncoded) else [len(e) for e in examples]


def supervised_counts(examples: Sequence[EncodedExample], train_on: TrainOn) -> list[int]:
    """How many tokens of each example the loss looks at."""
    if isinstance(examples, StoredEncoded):
        return examples.supervised_counts(train_on)
    return [sum(t != IGNORE_INDEX for t in labels_of(e, train_on)) for e in examples]


class StoredEncoded(Sequence[EncodedExample]):
    """Encoded examples packed as bytes, in memory while they are few and on disk where they are many.

    A token takes five bytes: its id, and what it is of.
    """

    def __init__(self, examples: Iterable[EncodedExample]) -> None:
        """Raises UserError where the disk is full."""
        self._spool = DiskList()
        self._lengths = array("i")
        self._num_answer = array("i")
        for e in examples:
            marks = np.array([e.is_question, e.is_answer, e.is_answer_text], dtype=np.uint8)  # (3, T)
            packed = marks[0] | marks[1] << 1 | marks[2] << 2
            self._spool.append(np.array(e.input_ids, dtype="<i4").tobytes() + packed.astype(np.uint8).tobytes())
            self._lengths.append(len(e))
            self._num_answer.append(int(marks[1, 1:].sum()))

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each example, known without reading it."""
        return self._lengths

    def supervised_counts(self, train_on: TrainOn) -> list[int]:
        if train_on == "all":
            return [max(length - 1, 0) for length in self._lengths]
        return self._num_answer.tolist()

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, index: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedExample]: ...
    def __getitem__(self, index: int | slice) -> EncodedExample | list[EncodedExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        data, length = self._spool[number], self._lengths[number]
        marks = np.frombuffer(data, dtype=np.uint8, offset=4 * length)
        parts = [(marks & bit).astype(bool).tolist() for bit in (1, 2, 4)]
        return EncodedExample(np.frombuffer(data, dtype="<i4", count=length).tolist(), *parts)
