"""What a training leaves out: whole conversations, nothing that it trains on, whatever the file's order."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.data.held_out import MAX_LEFT_OUT, count_left_out, leave_out, split_conversations
from raylora.features.static import split_sample
from raylora.records import Dataset, Example, Message


def example(text: str, conversation: str = "") -> Example:
    return Example((Message("user", text),), f"It is {text}.", text, conversation=conversation)


def dataset_of(examples: list[Example]) -> Dataset:
    return Dataset("", tuple(examples), len(examples), 0)


KEYS = st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["", "", "a", "b", "c"])), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(KEYS, st.integers(0, 3))
def test_nothing_that_is_left_out_is_trained_on(keys, seed):
    examples = [example(str(number), conversation) for number, conversation in keys]
    held_out, training = leave_out(dataset_of(examples), seed)
    assert sorted(e.digest for e in [*held_out, *training]) == sorted(e.digest for e in examples)
    units = [{e.conversation or e.digest for e in part} for part in (held_out, training)]
    assert not units[0] & units[1]
    assert len(training) > 0
    assert (len(held_out) > 0) == (len(units[0] | units[1]) > 1)
    sizes = [[e.conversation or e.digest for e in examples].count(unit) for unit in units[0] | units[1]]
    assert len(held_out) <= max(count_left_out(len(examples)), min(sizes))
    shuffled = random.Random(seed).sample(examples, len(examples))
    again, _ = leave_out(dataset_of(shuffled), seed)
    assert [e.digest for e in again] == [e.digest for e in held_out]


def test_it_is_a_tenth_and_no_more_than_fifty():
    examples = [example(str(i)) for i in range(1000)]
    assert [len(leave_out(dataset_of(examples[:n]), 0)[0]) for n in (1, 2, 30, 1000)] == [0, 1, 3, MAX_LEFT_OUT]
    first, second = (leave_out(dataset_of(examples), seed)[0] for seed in (0, 1))
    assert {e.digest for e in first} != {e.digest for e in second}


def test_of_single_turns_the_fewer_held_out_ones_are_among_the_others():
    """What a probe of the same seed holds out of its sample of 100, and what the training leaves out."""
    from raylora.data.datasets import sample_examples

    for num in (100, 1000):
        dataset = dataset_of([example(str(i)) for i in range(num)])
        sample = sample_examples(dataset.examples, 100, dataset.seed ^ 3)
        of_probe = {sample[i].digest for i in split_sample(sample).held_out}
        left_out = {e.digest for e in leave_out(dataset, 3)[0]}
        assert of_probe < left_out or left_out < of_probe


def test_a_conversation_that_does_not_fit_is_passed_over():
    assert split_conversations(["a", "a", "a", "b", "c", "c"], 2) == ([3], [0, 1, 2, 4, 5])
    assert split_conversations(["a", "a", "a", "b", "b"], 1) == ([3, 4], [0, 1, 2]), "the smallest, if none fits"
    assert split_conversations(["a", "a"], 1) == ([], [0, 1])
