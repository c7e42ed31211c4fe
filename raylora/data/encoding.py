"""Examples as token ids: the chat template, truncation, and which tokens are supervised (get a loss).

``minibatch.py`` makes tensors of them.
"""

from __future__ import annotations

import copy
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, overload

import numpy as np

from raylora.data.disk_list import DiskList
from raylora.data.long_texts import Tokens, is_long, tokenize_around
from raylora.data.rendered import Rendered, TemplateCounts, render_each, render_example
from raylora.data.rendering import special_tokens_of
from raylora.records import Example

IGNORE_INDEX = -100
ENCODED_TOGETHER = 512
"""Examples in one call of the tokenizer. Together, with marks set by arrays, an example takes 399 microseconds; one by
one, with loops, it took 603 (benchmarks/NOTES.md)."""
CHARS_TOGETHER = 2_000_000
"""Characters of them, about: a tokenizer takes 400 bytes for each."""
T = TypeVar("T")
TrainOn = Literal["answer", "all"]


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example, and whether each token belongs to the question or to the answer: lists of one length.

    Tokens of the chat template and of earlier turns belong to neither.
    """

    input_ids: list[int]
    is_question: list[bool]
    is_answer: list[bool]
    """The answer, and what the template puts behind it: the end-of-turn token."""
    is_answer_text: list[bool] = field(repr=False)
    """The answer without the end-of-turn token."""
    num_repeated: int = 0
    """Tokens at the front that an earlier example of the conversation supervises where ``train_on`` is ``all``."""
    is_untrained: list[bool] = field(default_factory=list, repr=False)
    """The tokens of which nothing is to be learned, not even where ``train_on`` is ``all``: of turns with ``weight: 0``
    and the like. Empty where there are none."""

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_example(tokenizer: Any, example: Example, max_length: int) -> EncodedExample:
    """Tokenise an example's whole conversation, and mark tokens as question or answer by the characters they cover.

    What is longer than ``max_length`` tokens loses its front, as the answer and the words just before it matter most.
    An answer that fills more than three quarters of ``max_length`` loses its end instead.
    """
    return next(encode_each(tokenizer, [example], max_length))


def encode_each(
    tokenizer: Any, examples: Iterable[Example], max_length: int, counts: TemplateCounts | None = None
) -> Iterator[EncodedExample]:
    """``encode_example`` of each, tokenised ``ENCODED_TOGETHER`` at a time.

    Args:
        counts: examples are counted here, and those that the chat template refuses are left out.

    Raises:
        UserError: the chat template refuses an example, and there are no ``counts``.
    """
    remaining = render_each(tokenizer, examples, counts)
    while group := _next_group(remaining):
        for rendered, ids, offsets in zip(group, *_tokenize_rendered(tokenizer, group, max_length), strict=True):
            yield _mark_tokens(rendered, ids, offsets, max_length)[0]


def _next_group(remaining: Iterator[Rendered]) -> list[Rendered]:
    """The next texts that are tokenized together: fewer where they are long."""
    group: list[Rendered] = []
    num_chars = 0
    for rendered in itertools.islice(remaining, ENCODED_TOGETHER):
        group.append(rendered)
        num_chars += len(rendered.text)
        if num_chars > CHARS_TOGETHER:
            break
    return group


def encode_with_offsets(
    tokenizer: Any, example: Example, max_length: int
) -> tuple[EncodedExample, str, list[tuple[int, int]]]:
    """``encode_example``, with the place of each answer token in the answer's text.

    Returns:
        The encoded example, the answer as the template renders it, and (start, end) of each of its tokens that was kept
        (``is_answer_text``), in characters of that answer.
    """
    rendered = render_example(tokenizer, example)
    (ids,), (offsets,) = _tokenize_rendered(tokenizer, [rendered], max_length)
    encoded, kept = _mark_tokens(rendered, ids, offsets, max_length)
    start, end = rendered.answer
    answer_tokens = [pair for pair, of_answer in zip(offsets[kept], encoded.is_answer_text, strict=True) if of_answer]
    return encoded, rendered.text[start:end], [(max(a - start, 0), min(b, end) - start) for a, b in answer_tokens]


def _tokenize_rendered(
    tokenizer: Any, group: Sequence[Rendered], max_length: int
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Of each text its token ids, and (start, end) of each in characters; of a long one those that can be kept."""
    ids: list[list[int]] = [[] for _ in group]
    offsets: list[list[tuple[int, int]]] = [[] for _ in group]
    # What a chat template renders has its special tokens already.
    kinds = [(r.is_plain or not tokenizer.chat_template, r.has_special_text) for r in group]
    for kind in dict.fromkeys(kinds):
        of_kind = [i for i, its_kind in enumerate(kinds) if its_kind == kind]
        numbers = [i for i in of_kind if not is_long(group[i].text, max_length)]
        for i in set(of_kind).difference(numbers):

            def tokenize(part: str, kind: tuple[bool, bool] = kind) -> Tokens:
                (its_ids,), (its_offsets,) = _tokenize(tokenizer, [part], *kind)
                return its_ids, its_offsets

            ids[i], offsets[i] = tokenize_around(group[i].text, group[i].answer[0], max_length, tokenize)
        if not numbers:
            continue
        for i, its_ids, its_offsets in zip(
            numbers, *_tokenize(tokenizer, [group[i].text for i in numbers], *kind), strict=True
        ):
            ids[i], offsets[i] = its_ids, its_offsets
    return ids, offsets


def _tokenize(
    tokenizer: Any, texts: list[str], add_special_tokens: bool, has_special_text: bool
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    if has_special_text:
        return special_tokens_of(tokenizer).tokenize(texts, add_special_tokens)
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=False,
    )
    return encoded["input_ids"], encoded["offset_mapping"]


def pad_token_of(tokenizer: Any) -> int:
    """The padding token's id. Where a tokenizer has none any other will do: padding is masked and never supervised."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in candidates if token is not None), 0)


def _mark_tokens(
    rendered: Rendered, input_ids: list[int], offsets: Sequence[tuple[int, int]], max_length: int
) -> tuple[EncodedExample, slice]:
    """The example cut to ``max_length`` tokens, and which of its tokens these are."""
    (question_start, question_end), (answer_start, answer_end) = rendered.question, rendered.answer
    start, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    # A token that covers any character of the answer belongs to it: many templates put a space before the answer, which
    # is one token with the first word. A token of no characters (BOS) belongs to neither.
    is_answer = (end > np.maximum(start, answer_start)).tolist()
    is_text = ((start < answer_end) & (end > np.maximum(start, answer_start))).tolist()
    is_question = ((start < question_end) & (end > np.maximum(start, question_start))).tolist()
    keep = _kept_window(is_answer, max_length)
    num_repeated = 0
    if rendered.repeated_end:
        is_new = (end > start) & (start >= rendered.repeated_end)
        num_repeated = max(int(is_new.argmax()) - keep.start, 0)
    marks = is_question[keep], is_answer[keep], is_text[keep]
    is_untrained = _covered(rendered.untrained, start[keep], end[keep]) if rendered.untrained else []
    return EncodedExample(input_ids[keep], *marks, num_repeated, is_untrained if any(is_untrained) else []), keep


def _covered(spans: Sequence[tuple[int, int]], start: np.ndarray, end: np.ndarray) -> list[bool]:
    """Which tokens, from ``start`` to ``end`` (T,), have a character within a span."""
    num_covered = np.zeros(max(int(end.max(initial=0)), *(b for _, b in spans)) + 2, dtype=np.int64)
    for a, b in spans:
        num_covered[a + 1 : b + 1] = 1
    num_covered = num_covered.cumsum()  # of the characters before each
    return (num_covered[end] > num_covered[start]).tolist()


def _kept_window(is_answer: list[bool], max_length: int) -> slice:
    """The ``max_length`` tokens to keep: the last ones, but with up to a quarter of them from before the answer."""
    if len(is_answer) <= max_length:
        return slice(0, len(is_answer))
    first_answer = is_answer.index(True) if True in is_answer else len(is_answer)
    start = min(len(is_answer) - max_length, max(first_answer - max_length // 4, 0))
    return slice(start, start + max_length)


def labels_of(encoded: EncodedExample, train_on: TrainOn) -> list[int]:
    """Labels, as many as tokens: the token's id where it is supervised, else -100. Nothing predicts the first token.

    ``all`` is all that no earlier example of the conversation supervises: over its examples each token counts once.
    """
    supervised = encoded.is_answer
    if train_on == "all":
        untrained = encoded.is_untrained or [False] * len(encoded)
        supervised = [i >= encoded.num_repeated and not untrained[i] for i in range(len(encoded))]
    labels = [t if wanted else IGNORE_INDEX for t, wanted in zip(encoded.input_ids, supervised, strict=True)]
    return [IGNORE_INDEX, *labels[1:]]


def lengths_of(examples: Sequence[EncodedExample]) -> Sequence[int]:
    """The number of tokens of each example, without reading any from disk."""
    return examples.lengths if isinstance(examples, StoredEncoded) else [len(e) for e in examples]


def supervised_counts(examples: Sequence[EncodedExample], train_on: TrainOn) -> list[int]:
    """The number of supervised tokens of each example, without reading any from disk."""
    if isinstance(examples, StoredEncoded):
        return examples.supervised_counts(train_on)
    return [sum(t != IGNORE_INDEX for t in labels_of(e, train_on)) for e in examples]


class StoredEncoded(Sequence[EncodedExample]):
    """Encoded examples in a ``DiskList``: in memory while they are few, on disk when they are many.

    A token takes five bytes: four for its id, one for its four marks.
    """

    def __init__(self, examples: Iterable[EncodedExample]) -> None:
        """Raises MachineError where the disk is full."""
        self._disk_list = DiskList()
        self._places = array("q")  # in the list
        self._lengths = array("i")
        self._num_answer = array("i")
        self._num_repeated = array("i")
        self._num_untrained = array("i")  # of those that are not repeated
        for e in examples:
            untrained = e.is_untrained or [False] * len(e)
            marks = np.array([e.is_question, e.is_answer, e.is_answer_text, untrained], dtype=np.uint8)  # (4, T)
            bits = marks[0] | marks[1] << 1 | marks[2] << 2 | marks[3] << 3
            self._disk_list.append(np.array(e.input_ids, dtype="<i4").tobytes() + bits.astype(np.uint8).tobytes())
            self._places.append(len(self._places))
            self._lengths.append(len(e))
            self._num_answer.append(int(marks[1, 1:].sum()))
            self._num_repeated.append(e.num_repeated)
            self._num_untrained.append(int(marks[3, max(e.num_repeated, 1) :].sum()))

    @property
    def lengths(self) -> Sequence[int]:
        """See ``lengths_of``."""
        return self._lengths

    def supervised_counts(self, train_on: TrainOn) -> list[int]:
        """See the function of the same name."""
        if train_on == "all":
            counts = zip(self._lengths, self._num_repeated, self._num_untrained, strict=True)
            return [max(length - max(repeated, 1), 0) - untrained for length, repeated, untrained in counts]
        return self._num_answer.tolist()

    def chosen(self, numbers: Sequence[int]) -> StoredEncoded:
        """The examples at ``numbers``, in that order; nothing of their tokens is copied."""
        view = copy.copy(self)
        for name in ("_places", "_lengths", "_num_answer", "_num_repeated", "_num_untrained"):
            values: array[int] = getattr(self, name)
            setattr(view, name, array(values.typecode, [values[i] for i in numbers]))
        return view

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
        data, length = self._disk_list[self._places[number]], self._lengths[number]
        bits = np.frombuffer(data, dtype=np.uint8, offset=4 * length)
        question, answer, text, untrained = ((bits & bit).astype(bool).tolist() for bit in (1, 2, 4, 8))
        ids = np.frombuffer(data, dtype="<i4", count=length).tolist()
        untrained = untrained if any(untrained) else []
        return EncodedExample(ids, question, answer, text, self._num_repeated[number], untrained)
