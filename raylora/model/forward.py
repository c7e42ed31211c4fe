"""Several examples in one row, without padding and without seeing each other.

    tokens      a a a a a b b b c c c c
    positions   0 1 2 3 4 0 1 2 0 1 2 3

Attention runs block by block: no mask is made, and no work is done between two examples. A mask over the whole row
costs 6 times as much at 1024 tokens (benchmarks/NOTES.md). Whether a model allows this is tried on it, not looked up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raylora.data.minibatch import Minibatch, pack_rows, pad_left
from raylora.model.adapters import LoadedModel

BLOCKS = "raylora_blocks"
REFUSALS = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError)
"""What a model raises that cannot be run in another way than its own."""


def _attend_in_blocks(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    block_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each block to itself; query (1, heads, T, D), the blocks' lengths make T.

    Raises:
        ValueError: the model did not hand on the lengths, or looks further than a causal block.
    """
    if block_lengths is None or attention_mask is not None or query.shape[2] != sum(block_lengths):
        raise ValueError("this model's attention cannot be run in blocks")
    if sliding_window is not None and max(block_lengths) > sliding_window:
        raise ValueError("a block is longer than the attention's window")
    lengths = list(block_lengths)
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    kwargs["is_causal"] = True
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in parts], 1), None


AttentionInterface.register(BLOCKS, _attend_in_blocks)
AttentionMaskInterface.register(BLOCKS, lambda *args, **kwargs: None)


@contextlib.contextmanager
def attention_in_blocks(model: Any) -> Iterator[None]:
    """Inside, ``model`` takes packed minibatches and no others. Backward passes belong inside as well: with
    checkpoints they run the forward pass again."""
    config, before = model.config, model.config._attn_implementation
    config._attn_implementation = BLOCKS
    try:
        yield
    finally:
        config._attn_implementation = before


def can_pack(model: Any) -> bool:
    """Whether ``model``, in eval mode, says the same of an example in a packed row as of it alone.

    Only models whose attention is torch's own (sdpa) are asked; recurrent layers, positions that are counted in
    some other way, and attention that looks at more than its block show themselves in the numbers.
    """
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    vocabulary = int(model.config.get_text_config().vocab_size)
    first, other, second = ([(7919 * i + k) % vocabulary for i in range(n)] for n, k in ((9, 1), (9, 5), (17, 3)))
    exact = next(model.parameters()).dtype in {torch.float32, torch.float64} and not _is_quantized(model)
    with torch.inference_mode():
        alone = model(**pad_left([second], 0, model.device).model_inputs(), use_cache=False).logits[0].float()
        try:
            with attention_in_blocks(model):
                a, b = (
                    model(**pack_rows([row, second], model.device).model_inputs(), use_cache=False)
                    .logits[0, 9:]
                    .float()
                    for row in (first, other)
                )
        except REFUSALS:
            return False
    # With reduced precision the shape of a product moves its result: percents of it, where a wrong mask moves it all.
    tolerance = float(alone.norm()) * (1e-4 if exact else 5e-2)
    return bool((a - alone).norm() <= tolerance and (b - a).norm() <= tolerance)


def _is_quantized(model: Any) -> bool:
    return getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)


def window_of(model: Any) -> int:
    """Tokens of the longest example that may be packed: those of the sliding window, if the model has one."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return int(window) if window else 2**62


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


@contextlib.contextmanager
def at_output_head(model: Any, select: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[bool]:
    """Inside, ``select`` takes the last hidden states (B, T, H) and returns those that the output head is to see.

    Yields:
        False where the model does not name its head: its logits are then those of all positions.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield False
        return
    hook = head.register_forward_pre_hook(lambda _, args: (select(args[0]), *args[1:]))
    try:
        yield True
    finally:
        hook.remove()
