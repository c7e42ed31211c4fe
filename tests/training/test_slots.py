"""Adapters that take turns in a few slots: none waits for another, and each becomes what it becomes alone."""

from __future__ import annotations

import heapq

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylora.data.encoding import EncodedExample
from raylora.errors import ErrorKind, TrainingDivergedError, UserError
from raylora.training.gradients import Job
from raylora.training.loop import TrainingResult, train_adapter, train_adapters
from raylora.training.slots import adapters_that_fit
from tests.helpers.training import DROPOUT, METHOD

NUMS_OF_STEPS = (4, 1, 6, 2, 3)


def plans_of(encoded):
    """Method, examples and number of steps of five adapters."""
    methods = [
        DROPOUT,
        DROPOUT.model_copy(update={"lora_r": 3, "learning_rate": 3e-3}),
        DROPOUT.model_copy(update={"batch_size": 2}),
        DROPOUT.model_copy(update={"lora_dropout": 0.0, "target_modules": ("q_proj", "down_proj"), "train_on": "all"}),
        DROPOUT,
    ]
    parts = encoded[:12], encoded[5:], encoded[3:9], encoded[:4], encoded[2:]
    return list(zip(methods, parts, NUMS_OF_STEPS, strict=True))


class Source:
    """Attaches an adapter when it is asked for the next job, and detaches it when it is finished."""

    def __init__(self, loaded, plans):
        self.loaded, self.plans = loaded, plans
        self.attached: list[str] = []
        self.most_attached = 0
        self.finished: list[str] = []
        self.weights: dict[str, list[torch.Tensor]] = {}

    def jobs(self):
        for seed, (method, part, num) in enumerate(self.plans):
            name = f"adapter{seed}"
            self.attached.append(name)
            self.most_attached = max(self.most_attached, len(self.attached))
            yield Job(self.loaded.attach(method, seed, name), part, method, seed, name, num)

    def finish(self, job, outcome):
        assert not self.loaded.model.training
        self.finished.append(job.name)
        self.attached.remove(job.name)
        self.weights[job.name] = [p.detach().clone() for p in job.parameters]
        self.loaded.detach(job.name)


def steps_until_all_are_done(nums: tuple[int, ...], slots: int) -> int:
    """Steps of a training in which each that is done is replaced by the next one at once."""
    free_at = [0] * slots
    for num in nums:
        heapq.heappush(free_at, heapq.heappop(free_at) + num)
    return max(free_at)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [2, 3])
def test_adapters_that_take_turns_become_what_they_become_alone(loaded, encoded, slots):
    plans = plans_of(encoded)
    expected = []
    for seed, (method, part, num) in enumerate(plans):
        parameters = loaded.attach(method, seed)
        result = train_adapter(loaded, parameters, part, method, seed, num)
        expected.append((result, [p.detach().clone() for p in parameters]))
        loaded.detach()
    before = loaded.logits_hash()
    source, told = Source(loaded, plans), []
    results = train_adapters(
        loaded, source.jobs(), lambda _, done, total: told.append((done, total)), lambda _: slots, source.finish
    )
    assert loaded.logits_hash() == before
    assert source.most_attached == slots, "an adapter takes memory only while it is in training"
    assert len(told) == steps_until_all_are_done(NUMS_OF_STEPS, slots), "somebody waited for a straggler"
    assert told[-1][0] == told[-1][1] == len(told)
    for i, (result, (solo, weights)) in enumerate(zip(results, expected, strict=True)):
        assert [s.step for s in result.steps] == [s.step for s in solo.steps]
        assert [s.loss for s in result.steps] == pytest.approx([s.loss for s in solo.steps], abs=1e-6)
        assert [s.learning_rate for s in result.steps] == [s.learning_rate for s in solo.steps]
        assert result.metrics.num_train_examples == solo.metrics.num_train_examples
        assert result.metrics.num_train_tokens == solo.metrics.num_train_tokens
        assert result.metrics.num_adapters == slots, "each was beside others for some of its steps"
        assert result.metrics.train_seconds > 0
        for a, b in zip(source.weights[f"adapter{i}"], weights, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_the_next_one_takes_the_place_of_one_that_ends_early(loaded, encoded):
    """One has no supervised token, one diverges in its last step, one in a step before; all others are unharmed."""
    wild = METHOD.model_copy(update={"learning_rate": 1e37, "lora_alpha": 1e4, "max_grad_norm": 1e30})
    empty = [EncodedExample(encoded[0].input_ids, *[[False] * len(encoded[0])] * 3)]
    plans = [(METHOD, encoded, 5), (wild, encoded, 2), (METHOD, empty, 3), (wild, encoded, 6), (METHOD, encoded, 5)]
    source, told = Source(loaded, plans), []
    outcomes = train_adapters(loaded, source.jobs(), lambda *_: told.append(_), lambda _: 2, source.finish)
    assert [type(o) for o in outcomes] == [
        TrainingResult, TrainingDivergedError, UserError, TrainingDivergedError, TrainingResult
    ]  # fmt: skip
    assert outcomes[2].kind is ErrorKind.NO_SUPERVISED_TOKEN
    for i in (1, 3):
        assert "the loss became nan at step 2: lower --learning-rate" in str(outcomes[i])
    assert source.finished == ["adapter1", "adapter2", "adapter0", "adapter3", "adapter4"]
    # Adapter 3 joins in the third step. It is found out in its third, which is the fifth and last one of adapter 0.
    assert len(told) == 5 + 5
    for i in (0, 4):
        assert len(outcomes[i].steps) == 5
        assert all(bool(weight.isfinite().all()) for weight in source.weights[f"adapter{i}"])


@given(
    tokens=st.floats(1, 1e5),
    budget=st.integers(256, 16384),
    adapter_bytes=st.floats(1e3, 1e11),
    free=st.floats(1e6, 1e12),
)
def test_adapters_never_take_more_memory_than_there_is(tokens, budget, adapter_bytes, free):
    num = adapters_that_fit(tokens, budget, adapter_bytes, free)
    assert num >= 1
    if num > 1:
        assert num * adapter_bytes <= free / 2
        assert num * tokens <= budget
        # A full minibatch takes 0.8 of what is free: with its part of one, all adapters take no more.
        assert num * (adapter_bytes + tokens / budget * 0.8 * free) <= 0.8 * free * 1.000001
    assert adapters_that_fit(tokens, budget, adapter_bytes, 2 * free) >= num
    assert adapters_that_fit(tokens / 2, budget, adapter_bytes, free) >= num


def test_an_8b_model_on_a_large_gpu_trains_eight_at_once():
    """16 examples of 118 tokens a step, rank 16 on all seven matrices, 125 GB free, a pass of 16,384 tokens."""
    assert adapters_that_fit(1885, 16384, 16 * 42e6, 125e9) == 8
    assert adapters_that_fit(1885, 2048, 16 * 42e6, 125e9) == 1, "before it is known what a token takes"
    assert adapters_that_fit(200, 16384, 16 * 42e6, 3e9) == 2
