"""Several examples in one row, without padding and without seeing each other.

    tokens      a a a a a b b b c c c c
    positions   0 1 2 3 4 0 1 2 0 1 2 3

Attention runs block by block: no mask is made, and no work is done between two examples. A mask over the whole row
costs 6 times as much at 1024 tokens (benchmarks/NOTES.md). Whether a model allows this is tried on it, not looked up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raylora.data.minibatch import pack_rows, pad_left

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
