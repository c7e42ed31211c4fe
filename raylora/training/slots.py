"""How many adapters are best trained at once."""

from __future__ import annotations

from collections.abc import Sequence

from raylora.model.adapters import LoadedModel
from raylora.model.memory import MINIBATCH_MEMORY_SHARE
from raylora.training.gradients import Job
from raylora.training.loop import count_tokens

TRAINED_PARAMETER_BYTES = 18
"""Of a parameter in training on a GPU: four each for itself, its gradient and AdamW's two moments, and two for the copy
in half precision that is multiplied with."""


def adapters_a_pass(loaded: LoadedModel, jobs: Sequence[Job], free_bytes: float) -> int:
    """How many adapters like those of ``jobs``, which are attached, are best trained at once.

    On a GPU as many as fill a minibatch with a step's tokens each. How large that may be is known after the first step
    of enough tokens, so that more may be found to pay then. On a CPU one: matrix products over its tokens alone are as
    fast (benchmarks/NOTES.md).

    Args:
        free_bytes: GPU memory that was free before any of them was attached.
    """
    if loaded.device.type != "cuda" or not jobs:
        return 1
    tokens = sum(count_tokens(job, num_steps=1) for job in jobs) / len(jobs)
    size = TRAINED_PARAMETER_BYTES * sum(p.numel() for job in jobs for p in job.parameters) / len(jobs)
    return adapters_that_fit(tokens, loaded.training_token_budget, size, free_bytes)


def adapters_that_fit(tokens: float, token_budget: int, adapter_bytes: float, free_bytes: float) -> int:
    """How many adapters fill a minibatch of ``token_budget`` tokens with ``tokens`` each; at least one.

    A full minibatch takes ``MINIBATCH_MEMORY_SHARE`` of the free memory. Where K adapters have their ``adapter_bytes``
    from that, K (tokens / token_budget + adapter_bytes / share) = 1. Nor may they take more than half of what is free.
    """
    share = MINIBATCH_MEMORY_SHARE * free_bytes
    filling = 1 / (tokens / token_budget + adapter_bytes / share)
    return max(1, int(min(filling, free_bytes / 2 / adapter_bytes)))
