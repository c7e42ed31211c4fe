"""Which questions are asked together, and whose turn it is to ask them.

Questions of a subject that begin with the same tokens (its description and solved questions) are asked together, behind
the keys and values of those tokens. All others are asked together, longest first: memory runs out at once or never.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from raylora.mmlu.journal import Journal
from raylora.mmlu.prompts import EncodedQuestion


@dataclass(frozen=True)
class Part:
    """Questions, by index and longest first, that begin with the same ``prefix_length`` tokens."""

    indices: list[int]
    prefix_length: int = 0


def divide(encoded: Sequence[EncodedQuestion], least_saving: float) -> list[Part]:
    """Subjects whose shared prefix saves at least so many tokens, each by itself, and one part of all others.

    The part with the longest prompt comes first.
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
        # Even prompts of different subjects begin with the same dozen words.
        length = common_prefix([encoded[i] for i in others])
        worth = length * (len(others) - 1) >= least_saving
        parts.append(Part(longest_first(others), length if worth else 0))
    return sorted(parts, key=lambda part: (-len(encoded[part.indices[0]]), part.indices[0]))


def common_prefix(encoded: Sequence[EncodedQuestion]) -> int:
    """Tokens that all prompts begin with, at least one less than the shortest has. 0 where choices are long."""
    if len(encoded) < 2 or not all(e.single_token for e in encoded):
        return 0
    first, last = min(e.context_ids for e in encoded), max(e.context_ids for e in encoded)
    length = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(length, min(len(e) for e in encoded) - 1)


def batches_of(encoded: Sequence[EncodedQuestion], part: Part, budget: int) -> Iterator[Part]:
    """A part cut into batches, each as large as the budget allows."""
    left = part.indices
    while left:
        width = max(1, len(encoded[left[0]]) - part.prefix_length)
        num = max(1, budget // width)
        yield Part(left[:num], part.prefix_length)
        left = left[num:]


def in_turn(batches: Sequence[Part], journal: Journal) -> Iterator[Part]:
    """Batches for this process to ask: those nobody has begun, then, for the owner, those somebody left unfinished."""
    numbers = range(len(batches))
    for number in reversed(numbers) if journal.is_helper else numbers:
        if not journal.knows(batches[number].indices) and journal.claim(number):
            yield batches[number]
    if journal.is_helper:
        return
    journal.read_others()
    for number in reversed(numbers):
        if not journal.knows(batches[number].indices):
            journal.read_others()
            if not journal.knows(batches[number].indices):
                yield batches[number]
