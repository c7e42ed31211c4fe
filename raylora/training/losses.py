"""Cross entropy of examples' supervised tokens, and of them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from raylora.data.encoding import IGNORE_INDEX, EncodedExample, TrainOn, labels_of
from raylora.model.adapters import LoadedModel
from raylora.model.forward import Output, forward_rows
from raylora.model.memory import TokenBudget


class ExampleLoss(NamedTuple):
    """Of one example, in nats: summed over its supervised tokens, their number, and the mean over its answer's text."""

    total: float
    num_supervised: int
    answer: float


def example_losses(
    loaded: LoadedModel,
    examples: Sequence[EncodedExample],
    train_on: TrainOn,
    token_budget: int,
    with_gradient: bool = False,
) -> list[ExampleLoss]:
    """Each example's losses, without dropout; those of one without a supervised token are 0, 0 and NaN.

    With ``with_gradient`` the trainable parameters' gradients become those of the mean loss over all supervised tokens.

    Raises:
        torch.OutOfMemoryError: a single example does not fit.
    """
    all_labels = [labels_of(e, train_on) for e in examples]
    usable = [i for i, row in enumerate(all_labels) if any(label != IGNORE_INDEX for label in row)]
    rows, labels = [examples[i].input_ids for i in usable], [all_labels[i] for i in usable]
    num_supervised = sum(label != IGNORE_INDEX for row in labels for label in row)

    def use(part: list[int], output: Output) -> list[ExampleLoss]:
        if with_gradient:
            (output.losses.sum() / num_supervised).backward()
        losses = output.losses.detach().double().split(output.num_losses)
        return [_example_loss(examples[usable[k]], labels[k], own) for k, own in zip(part, losses, strict=True)]

    results = [ExampleLoss(0.0, 0, math.nan)] * len(examples)
    start_over = loaded.model.zero_grad if with_gradient else None  # a backward pass broken off leaves half a gradient
    with torch.inference_mode(not with_gradient), loaded.autocast():
        for part, found in forward_rows(loaded, rows, labels, TokenBudget(token_budget), use, start_over=start_over):
            for k, loss in zip(part, found, strict=True):
                results[usable[k]] = loss
    return results


def _example_loss(encoded: EncodedExample, labels: Sequence[int], losses: torch.Tensor) -> ExampleLoss:
    """Of the losses (N,) of an example's labels."""
    of_text = [a for a, label in zip(encoded.is_answer_text, labels, strict=True) if label != IGNORE_INDEX]
    answer = losses[torch.tensor(of_text, device=losses.device)].mean()
    return ExampleLoss(float(losses.sum()), len(losses), float(answer))
