"""Packing: several examples in one row, without padding, none of which attends to another.

    tokens      a a a a a b b b c c c c
    positions   0 1 2 3 4 0 1 2 0 1 2 3

Attention is computed for each block (example) by itself: no mask is needed, and no score between two examples is
computed. One attention over the whole row, with a mask, takes 17 ms in place of 2.7 at 1024 tokens
(benchmarks/NOTES.md). Whether a model can be run like this is found out by running it (``can_pack``), not by its name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raylora.data.minibatch import pack_rows, pad_left
from raylora.model.loading import is_4bit_layer, uses_llm_int8

BLOCKS = "raylora_blocks"
"""The name of this attention in transformers' registry."""
REFUSALS = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError)
"""What a model may raise that cannot be run in another way than its own code expects."""


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
    """Causal attention within each block; its signature is that of transformers' attention functions.

    Args:
        query: (1, heads, T, D); ``key`` and ``value`` too, possibly with fewer heads.
        block_lengths: tokens of each block, T in all.

    Returns:
        (1, T, heads, D), and None in place of attention weights.

    Raises:
        ValueError: the model did not pass ``block_lengths`` on, has a mask of its own, or its sliding window is shorter
            than a block.
    """
    if block_lengths is None or attention_mask is not None or query.shape[2] != sum(block_lengths):
        raise ValueError("this model's attention cannot be run in blocks")
    if sliding_window is not None and max(block_lengths) > sliding_window:
        raise ValueError("a block is longer than the attention's window")
    lengths = list(block_lengths)
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    kwargs["is_causal"] = True
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in parts], 1), None


# Without an entry in AttentionMaskInterface: transformers then makes no mask. With one it would look for packed rows in
# the position ids before each pass, for which the CPU waits until the GPU has done all passes before.
AttentionInterface.register(BLOCKS, _attend_in_blocks)


@contextlib.contextmanager
def attention_in_blocks(model: Any) -> Iterator[None]:
    """Inside, ``model`` takes packed minibatches and no others.

    Backward passes must be inside too: with gradient checkpointing they run the forward pass again.
    """
    config, usual = model.config, model.config._attn_implementation
    config._attn_implementation = BLOCKS
    try:
        yield
    finally:
        config._attn_implementation = usual


def can_pack(model: Any) -> bool:
    """Whether ``model``, in eval mode, computes the same logits for an example in a packed row as for it alone.

    An example of 17 tokens is run alone, and packed behind each of two others of 9. Recurrent layers, positions that
    are counted in another way, and attention beyond the block change its logits. Models whose attention is not torch's
    own (sdpa) are not tried.
    """
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    vocabulary = int(model.config.get_text_config().vocab_size)
    first, other, second = ([(7919 * i + k) % vocabulary for i in range(n)] for n, k in ((9, 1), (9, 5), (17, 3)))
    with torch.inference_mode():
        alone = model(**pad_left([second], 0, model.device).model_inputs(), use_cache=False).logits[0].float()
        try:
            with attention_in_blocks(model):
                behind_first, behind_other = (
                    model(**pack_rows([row, second], model.device).model_inputs(), use_cache=False)
                    .logits[0, 9:]
                    .float()
                    for row in (first, other)
                )
        except REFUSALS:
            return False
    # In reduced precision the shape of a product alone changes its result by some percent; a wrong mask changes all.
    tolerance = float(alone.norm()) * (1e-4 if is_exact(model) else 5e-2)
    return bool((behind_first - alone).norm() <= tolerance and (behind_other - behind_first).norm() <= tolerance)


def is_exact(model: Any) -> bool:
    """Whether what shares a minibatch with a row changes the row's numbers by float32's rounding alone.

    True for float32, and for weights of 4 or 8 bits that are multiplied as float32. False for half precision, for
    LLM.int8, and for quantizations that are not raylora's own.
    """
    if next(p.dtype for p in model.parameters() if p.is_floating_point()) not in {torch.float32, torch.float64}:
        return False
    if getattr(model, "is_loaded_in_4bit", False):
        layers = filter(is_4bit_layer, model.modules())
        # Where the second is True, bitsandbytes multiplies in bfloat16 on a CPU.
        return all(m.compute_dtype in {None, torch.float32} and not m.support_avx512bf16_for_cpu for m in layers)
    if getattr(model, "is_loaded_in_8bit", False):
        return not uses_llm_int8(model)
    return not getattr(model, "is_quantized", False)


def window_of(model: Any) -> int:
    """Tokens of the longest example that may be packed: of the sliding window, or 2**62 (no limit) without one."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return int(window) if window else 2**62
