"""Cross entropy of the supervised tokens, and of them alone.

The output head sees the positions before a label and no others, a chunk at a time: the logits of a whole minibatch are
never there at once. A chunk's gradient is taken while its logits are at hand, so nothing is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from raylora.data.encoding import IGNORE_INDEX, EncodedExample, TrainOn, labels_of, pad_token_of
from raylora.data.minibatch import batches_by_budget, pad_left
from raylora.model.adapters import LoadedModel
from raylora.model.forward import token_losses
from raylora.model.memory import is_out_of_memory
from raylora.work_counts import work_counts


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
    """
    labels = [labels_of(e, train_on) for e in examples]
    counts = [sum(t != IGNORE_INDEX for t in row) for row in labels]
    usable = [i for i, count in enumerate(counts) if count]
    results = [ExampleLoss(0.0, 0, math.nan)] * len(examples)
    left = usable
    with torch.inference_mode(not with_gradient), loaded.autocast():
        while left:
            part = next(batches_by_budget(left, lambda i: len(examples[i]), token_budget))
            if with_gradient and left is usable:
                loaded.model.zero_grad()
            try:
                rows = [examples[i].input_ids for i in part]
                batch = pad_left(rows, pad_token_of(loaded.tokenizer), loaded.device, [labels[i] for i in part])
                losses = token_losses(loaded, batch)
                if with_gradient:
                    (losses.sum() / sum(counts)).backward()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                work_counts.oom_backoffs += 1
                token_budget = len(part) * max(len(examples[i]) for i in part) // 2
                left = usable if with_gradient else left  # a backward pass that breaks off leaves half a gradient
                continue
            for i, own in zip(part, losses.detach().double().split([counts[i] for i in part]), strict=True):
                of_text = [a for a, t in zip(examples[i].is_answer_text, labels[i], strict=True) if t != IGNORE_INDEX]
                answer = float(own[torch.tensor(of_text, device=own.device)].mean())
                results[i] = ExampleLoss(float(own.sum()), counts[i], answer)
            done = set(part)
            left = [i for i in left if i not in done]
    return results
