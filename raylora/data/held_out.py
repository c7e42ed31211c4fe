"""Which examples are kept out of a training, by whole conversations: a probe's, and those of ``--transfer``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from raylora.data.datasets import sample_examples
from raylora.data.examples import Chosen
from raylora.records import Dataset, Example, digests_of

LEFT_OUT_SHARE = 0.1
"""Of a dataset's examples, what a training leaves out with ``--transfer``; at most ``MAX_LEFT_OUT``."""
MAX_LEFT_OUT = 50
"""A mean over 50 is known to a seventh of the examples' own spread, and 500 datasets have 25,000 in all."""


class Split(NamedTuple):
    """Indices of examples, in their order. ``held_out`` is empty where there are no two conversations."""

    held_out: list[int]
    training: list[int]


def split_conversations(conversations: Sequence[Hashable], most: int) -> Split:
    """Which examples are held out, ``most`` of them at most, and which are trained on, by whole conversations.

    Conversations are taken in the order of their first examples where they fit: of single turns the first ones. Where
    none fits, the smallest is taken.

    Args:
        conversations: of each example, what tells its conversation from others.
    """
    of_conversation: dict[Hashable, list[int]] = {}
    for i, conversation in enumerate(conversations):
        of_conversation.setdefault(conversation, []).append(i)
    if len(of_conversation) < 2:
        return Split([], list(range(len(conversations))))
    held_out: list[int] = []
    for members in of_conversation.values():
        if len(held_out) + len(members) <= most:
            held_out += members
    if not held_out:
        held_out = min(of_conversation.values(), key=len)
    is_held_out = set(held_out)
    return Split(sorted(held_out), [i for i in range(len(conversations)) if i not in is_held_out])


def count_left_out(num_examples: int) -> int:
    """How many examples a training leaves out with ``--transfer``: a tenth, 1 to 50; 0 where there is only one."""
    return min(MAX_LEFT_OUT, max(1, round(num_examples * LEFT_OUT_SHARE))) if num_examples > 1 else 0


def leave_out(dataset: Dataset, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """The examples that trainings leave out with ``--transfer``, and those that they train on.

    They are drawn in the order in which a probe's sample is drawn with the same seed, so that of single turns the fewer
    of the two held-out sets are among the others. Equal examples stay together, as turns of a conversation do: none
    that is left out is trained on. Nothing is left out where all are one conversation, or equal.
    """
    ordered = sample_examples(dataset.examples, 0, dataset.seed ^ seed)
    digests = digests_of(ordered)
    conversations = [e.conversation or digest.tobytes() for e, digest in zip(ordered, digests, strict=True)]
    split = split_conversations(conversations, count_left_out(len(ordered)))
    held_out, training = (Chosen(ordered, np.array(part, dtype=np.int64)) for part in split)
    return held_out, training
