"""Cross entropy of the supervised tokens, and of them alone.

The output head sees the positions before a label and no others, a chunk at a time: the logits of a whole minibatch are
never there at once. A chunk's gradient is taken while its logits are at hand, so nothing is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from raylora.encoding import (
    IGNORE_INDEX,
    EncodedExample,
    Minibatch,
    TrainOn,
    batches_by_budget,
    labels_of,
    pad_left,
    pad_token_of,
)
from raylora.model import LoadedModel, at_output_head, is_out_of_memory
from raylora.packing import REFUSALS
from raylora.tally import tally

CPU_LOGITS = 2**22
"""Logits held at once: 16 MB in float32, which stay in the caches (benchmarks/NOTES.md)."""
GPU_LOGITS = 2**28


class ExampleLoss(NamedTuple):
    """Of one example, in nats: summed over its supervised tokens, their number, and the mean over its answer's text."""

    total: float
    num_supervised: int
    answer: float


class _HeadLosses(torch.autograd.Function):
    """Losses (N,) of hidden states (N, H) at a frozen output head. Each depends on its own state alone, so that its
    gradient can be kept, in the states' size, in place of the logits."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, head: Any, targets: torch.Tensor, chunk: int) -> torch.Tensor:
        losses, gradients = [], []
        for part, target in zip(states.split(chunk), targets.split(chunk), strict=True):
            part = part.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                logits = head(part)
            log_probabilities = logits.detach().float().log_softmax(-1)
            losses.append(-log_probabilities.gather(1, target[:, None])[:, 0])
            if ctx.needs_input_grad[0]:
                slope = log_probabilities.exp_()
                slope.scatter_add_(1, target[:, None], slope.new_full((len(target), 1), -1.0))
                gradients.append(torch.autograd.grad(logits, part, slope.to(logits.dtype))[0])
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * slopes[0][:, None].to(gradients.dtype), None, None, None


def head_is_plain(model: Any) -> bool:
    """Whether ``model``'s logits are what its output head makes of the last states: some scale or bend them after."""
    seen: list[torch.Tensor] = []

    def select(states: torch.Tensor) -> torch.Tensor:
        seen.append(states)
        return states

    ids = torch.arange(4, device=model.device)[None] + 3
    with torch.inference_mode():
        try:
            with at_output_head(model, select) as named:
                logits = model(input_ids=ids, use_cache=False).logits
            return named and bool(torch.allclose(logits, model.get_output_embeddings()(seen[0]), rtol=1e-3, atol=1e-5))
        except REFUSALS:
            return False


def head_losses(model: Any, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy (N,) of what a plain, frozen output head makes of states (N, H), a chunk at a time."""
    head = model.get_output_embeddings()
    budget = GPU_LOGITS if states.device.type == "cuda" else CPU_LOGITS
    chunk = max(1, budget // int(head.weight.shape[0]))
    losses: torch.Tensor = _HeadLosses.apply(states, head, targets.to(states.device), chunk)
    return losses


def token_losses(loaded: LoadedModel, batch: Minibatch) -> torch.Tensor:
    """Cross entropy of each label of a minibatch, (N,) in float32, example after example."""
    assert batch.targets is not None
    assert batch.predicting is not None
    model, targets, before = loaded.model, batch.targets, batch.predicting
    seen: list[torch.Tensor] = []

    def select(states: torch.Tensor) -> torch.Tensor:
        seen.append(states.flatten(0, 1)[before.to(states.device)])
        return seen[0][:1][None] if chunked else seen[0][None]

    head = model.get_output_embeddings()
    chunked = loaded.allows(head_is_plain) and not any(p.requires_grad for p in head.parameters())
    with at_output_head(model, select) as named:
        logits = model(**batch.model_inputs(), use_cache=False).logits
    if chunked:
        return head_losses(model, seen[0], targets)
    logits = logits[0] if named else logits.flatten(0, 1)[before.to(logits.device)]
    return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")


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
                tally.oom_backoffs += 1
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
