"""Which questions share a batch, and which process asks which batch.

The prompts of a subject begin with the same tokens (its description and solved questions). Where that saves enough, the
keys and values of those tokens are computed once, and the subject's questions are asked together behind them. All other
questions are asked together, longest first: if memory runs out, it does at the first batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from raylora.data.rendered import common_prefix_length
from raylora.mmlu.journal import Journal
from raylora.mmlu.prompts import EncodedQuestion


@dataclass(frozen=True)
class Part:
    """Questions, by index and longest first, that begin with the same ``prefix_length`` tokens."""

    indices: list[int]
    prefix_length: int = 0


def divide(encoded: Sequence[EncodedQuestion], least_saving: float) -> list[Part]:
    """Divide questions into parts: one for each subject whose shared prefix is worth it, and one of all others.

    The part with the longest prompt comes first.

    Args:
        least_saving: tokens that a shared prefix must spare, over all questions behind it; infinity: no prefix is
            shared.
    """

    def longest_first(indices: Iterable[int]) -> list[int]:
        return sorted(indices, key=lambda i: (-len(encoded[i]), i))

    by_subject: dict[str, list[int]] = defaultdict(list)
    for i, e in enumerate(encoded):
        by_subject[e.question.subject].append(i)
    parts, others = [], []
    for indices in by_subject.values():
        length = common_prefix([encoded[i] for i in indices])
        if length * (len(indices) - 1) >= least_saving:
            parts.append(Part(longest_first(indices), length))
        else:
            others += indices
    if others:
        # Prompts of different subjects begin with the same dozen words too, which pays if there are many questions.
        length = common_prefix([encoded[i] for i in others])
        saves_enough = length * (len(others) - 1) >= least_saving
        parts.append(Part(longest_first(others), length if saves_enough else 0))
    return sorted(parts, key=lambda part: (-len(encoded[part.indices[0]]), part.indices[0]))


def common_prefix(encoded: Sequence[EncodedQuestion]) -> int:
    """How many tokens all prompts have in common at their beginning.

    It is less than the shortest prompt's length, as each row needs a token of its own to compute logits at.
    """
    if len(encoded) < 2:
        return 0
    # In lexicographic order: what the first and the last have in common, all between them have too.
    first, last = min(e.context_ids for e in encoded), max(e.context_ids for e in encoded)
    return min(common_prefix_length(first, last), min(len(e) for e in encoded) - 1)


def batches_of(
    encoded: Sequence[EncodedQuestion], part: Part, budget: int, width: Callable[[EncodedQuestion], int], packed: bool
) -> Iterator[Part]:
    """A part cut into batches of at most ``budget`` tokens, the prefix left out; of one question at least.

    Args:
        width: tokens that a question takes.
        packed: a batch takes what its questions do together; else as if all were as long as its first, which is the
            longest.
    """
    batch: list[int] = []
    used = 0
    for index in part.indices:
        of_this = max(1, width(encoded[index]) - part.prefix_length)
        used += of_this if packed or not batch else used // len(batch)
        if batch and used > budget:
            yield Part(batch, part.prefix_length)
            batch, used = [], of_this
        batch.append(index)
    if batch:
        yield Part(batch, part.prefix_length)


def in_turn(batches: Sequence[Part], journal: Journal) -> Iterator[Part]:
    """The batches that this process is to ask, one by one.

    First those that no process has begun. The owner then also asks those that a helper has begun and not finished, as
    that helper may have died.
    """
    numbers, asked = range(len(batches)), set()  # the answers to a batch come while the next one is asked
    # Helpers begin at the end: they and the owner claim the same batches only when few are left.
    for number in reversed(numbers) if journal.is_helper else numbers:
        if not journal.knows(batches[number].indices) and journal.claim(number):
            asked.add(number)
            yield batches[number]
    if journal.is_helper:
        return
    journal.read_others()
    for number in reversed(numbers):
        if number not in asked and not journal.knows(batches[number].indices):
            journal.read_others()  # again: a helper may have finished it while the batch before was asked
            if not journal.knows(batches[number].indices):
                yield batches[number]
