"""Cross entropy of each example's supervised tokens, outside training: before and after the probe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from raylora.data.encoding import IGNORE_INDEX, EncodedExample, TrainOn, labels_of
from raylora.model.adapters import LoadedModel
from raylora.model.fetching import Fetched, one_late
from raylora.model.forward import Output, forward_rows
from raylora.model.memory import TokenBudget
from raylora.model.packing import may_pack


class ExampleLoss(NamedTuple):
    """The losses of one example, in nats."""

    total: float
    """Summed over its supervised tokens."""
    num_supervised: int
    answer: float
    """Mean over the tokens of its answer's text, without those of the chat template."""


def example_losses(
    loaded: LoadedModel,
    examples: Sequence[EncodedExample],
    train_on: TrainOn,
    token_budget: int,
    with_gradient: bool = False,
) -> list[ExampleLoss]:
    """The losses of each example, in their order; (0, 0, NaN) for one without a supervised token.

    Args:
        token_budget: most tokens in a minibatch, padding included; where memory runs out, smaller ones are tried.
        with_gradient: leave the gradient of the mean loss over all supervised tokens in the trainable parameters.

    Raises:
        torch.OutOfMemoryError: a single example does not fit (MemoryError or RuntimeError on a CPU).
    """
    all_labels = [labels_of(e, train_on) for e in examples]
    usable = [i for i, row in enumerate(all_labels) if any(label != IGNORE_INDEX for label in row)]
    rows, labels = [examples[i].input_ids for i in usable], [all_labels[i] for i in usable]
    num_supervised = sum(label != IGNORE_INDEX for row in labels for label in row)

    def use(part: list[int], output: Output) -> Fetched:
        if with_gradient:
            (output.losses.sum() / num_supervised).backward()
        return Fetched(output.losses, output.num_losses)

    results = [ExampleLoss(0.0, 0, math.nan)] * len(examples)
    # Gradients add up over minibatches: from the first one again where a backward pass ended half-way, out of memory.
    start_over = loaded.model.zero_grad if with_gradient else None
    budget = TokenBudget(token_budget)
    packed = may_pack(loaded, max(map(len, rows), default=0))
    with torch.inference_mode(not with_gradient), loaded.autocast():
        passes = forward_rows(loaded, rows, labels, budget, use, start_over=start_over, packed=packed)
        for part, fetched in one_late(passes):
            for k, losses in zip(part, fetched.rows(), strict=True):
                results[usable[k]] = _example_loss(examples[usable[k]], labels[k], losses.double())
    return results


def _example_loss(encoded: EncodedExample, labels: Sequence[int], losses: torch.Tensor) -> ExampleLoss:
    """The losses of one example from those of its labels, (N,), on the CPU."""
    is_text = [a for a, label in zip(encoded.is_answer_text, labels, strict=True) if label != IGNORE_INDEX]
    answer = losses[torch.tensor(is_text)].mean()
    return ExampleLoss(float(losses.sum()), len(losses), float(answer))
