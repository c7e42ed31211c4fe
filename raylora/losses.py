"""Cross entropy of the supervised tokens, and of them alone.

The output head sees the positions before a label and no others, a chunk at a time: the logits of a whole minibatch are
never there at once. A chunk's gradient is taken while its logits are at hand, so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from raylora.encoding import IGNORE_INDEX, EncodedExample, Minibatch, TrainOn, batches_by_budget, labels_of, pad_left
from raylora.model import LoadedModel, at_output_head, is_out_of_memory
from raylora.packing import REFUSALS
from raylora.tally import tally

CPU_LOGITS = 2**22
"""Logits held at once: 16 MB in float32, which stay in the caches (benchmarks/NOTES.md)."""
GPU_LOGITS = 2**28


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


def token_losses(loaded: LoadedModel, batch: Minibatch) -> torch.Tensor:
    """Cross entropy of each label of a minibatch, (N,) in float32, example after example."""
    assert batch.labels is not None
    model, wanted = loaded.model, batch.labels != IGNORE_INDEX
    before = wanted.roll(-1, dims=1)  # where a label is predicted; no example's first token has one
    targets = batch.labels[wanted]
    seen: list[torch.Tensor] = []

    def select(states: torch.Tensor) -> torch.Tensor:
        seen.append(states[before.to(states.device)])
        return seen[0][:1][None] if chunked else seen[0][None]

    head = model.get_output_embeddings()
    chunked = loaded.allows(head_is_plain) and not any(p.requires_grad for p in head.parameters())
    with at_output_head(model, select) as named:
        logits = model(**batch.model_inputs(), use_cache=False).logits
    if chunked:
        budget = GPU_LOGITS if loaded.device.type == "cuda" else CPU_LOGITS
        chunk = max(1, budget // int(head.weight.shape[0]))
        return _HeadLosses.apply(seen[0], head, targets.to(seen[0].device), chunk)
    logits = logits[0] if named else logits[before.to(logits.device)]
    return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")


def example_losses(
    loaded: LoadedModel,
    examples: Sequence[EncodedExample],
    train_on: TrainOn,
    token_budget: int,
    with_gradient: bool = False,
) -> list[tuple[float, int]]:
    """Each example's summed loss and its number of supervised tokens, without dropout.

    With ``with_gradient`` that of the mean loss over all supervised tokens is added to the trainable parameters'.
    """
    labels = [labels_of(e, train_on) for e in examples]
    counts = [sum(t != IGNORE_INDEX for t in row) for row in labels]
    results: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    left = [i for i, count in enumerate(counts) if count]
    with torch.inference_mode(not with_gradient), loaded.autocast():
        while left:
            part = next(batches_by_budget(left, lambda i: len(examples[i]), token_budget))
            try:
                rows = [examples[i].input_ids for i in part]
                batch = pad_left(rows, loaded.tokenizer.pad_token_id, loaded.device, [labels[i] for i in part])
                losses = token_losses(loaded, batch)
                if with_gradient:
                    (losses.sum() / sum(counts)).backward()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                tally.oom_backoffs += 1
                token_budget = len(part) * max(len(examples[i]) for i in part) // 2
                continue
            for i, own in zip(part, losses.detach().double().split([counts[i] for i in part]), strict=True):
                results[i] = (float(own.sum()), counts[i])
            done = set(part)
            left = [i for i in left if i not in done]
    return results
