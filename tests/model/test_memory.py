"""Work that does not fit the memory, tried again in smaller pieces."""

from __future__ import annotations

import subprocess
import sys
import weakref

import pytest
import torch

from raylora.model.memory import ENOUGH_TOKENS, Attempt, TokenBudget, is_out_of_memory, next_attempt
from raylora.work_counts import work_counts

OUT = torch.OutOfMemoryError("CUDA out of memory")
LENGTHS = [30, 10, 20, 40, 10, 20]


def length(i: int) -> int:
    return LENGTHS[i]


def test_a_training_halves_what_is_large_then_checkpoints_then_halves_what_is_small():
    tried, attempt = [], Attempt(4 * ENOUGH_TOKENS)
    while attempt is not None:
        tried.append(attempt)
        attempt = next_attempt(attempt, attempt.tokens, attempt.tokens <= ENOUGH_TOKENS // 2, may_checkpoint=True)
    assert tried == [(8192, False), (4096, False), (2048, False), (2048, True), (1024, True)]


def test_half_of_what_did_not_fit_is_tried_next_not_half_of_what_was_allowed():
    assert next_attempt(Attempt(10_000), held=300, is_single=False) == Attempt(150)
    assert next_attempt(Attempt(10_000), held=300, is_single=True) is None


def test_pieces_go_on_where_memory_ran_out():
    ran, before, budget = [], work_counts.oom_backoffs, TokenBudget(1000)

    def run(part: list[int]) -> list[int]:
        ran.append(part)
        if len(part) > 2:
            raise OUT
        return [10 * i for i in part]

    found = list(budget.pieces(range(6), length, run))
    assert ran == [[3, 0, 2, 5, 1, 4], [3, 0, 2], [3], [0, 2], [5, 1, 4], [5], [1, 4]]
    assert found == [([3], [30]), ([0, 2], [0, 20]), ([5], [50]), ([1, 4], [10, 40])]
    assert (budget.tokens, budget.num_backoffs) == (30, 3)
    assert work_counts.oom_backoffs - before == 3


def test_work_that_adds_up_starts_over():
    total, started = 0, 0

    def start_over() -> None:
        nonlocal total, started
        total, started = 0, started + 1

    def run(part: list[int]) -> bool:
        nonlocal total
        total += sum(map(length, part))
        if 1 in part and len(part) > 1:
            raise OUT
        return True

    list(TokenBudget(60).pieces(range(6), length, run, start_over))
    assert started > 1
    assert total == sum(LENGTHS)


@pytest.mark.parametrize("error", [OUT, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_one_item_that_does_not_fit_is_an_error(error):
    sizes = []

    def run(part: list[int]) -> bool:
        sizes.append(len(part))
        raise error

    with pytest.raises(type(error)):
        list(TokenBudget(1000).pieces(range(6), length, run))
    assert sizes == [6, 3, 1]


def test_another_error_is_not_tried_again():
    calls = []

    def run(part: list[int]) -> bool:
        calls.append(part)
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        list(TokenBudget(1000).pieces(range(6), length, run))
    assert len(calls) == 1
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_what_failed_is_free_before_less_is_tried():
    """The error holds the frames that held the tensors: nothing would fit beside them."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def run(part: list[int]) -> bool:
        alive.append([ref() is not None for ref in held])
        activations = torch.zeros(10)
        held.append(weakref.ref(activations))
        if len(part) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return True

    list(TokenBudget(1000).pieces([3, 0], length, run))
    assert alive == [[], [False], [False, False]]


def test_numbers_can_be_read_without_torch():
    """By the processes that watch workers: it would take each of them seconds and half a GB."""
    code = "import sys, raylora.model.memory, raylora.cluster.retries; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
