"""Packing: several examples in one row, without padding, none of which attends to another.

    tokens      a a a a a b b b c c c c
    positions   0 1 2 3 4 0 1 2 0 1 2 3

Attention is computed for each block (example) by itself: no mask is needed, and no score between two examples is
computed. One attention over the whole row, with a mask, takes 17 ms in place of 2.7 at 1024 tokens
(benchmarks/NOTES.md). A GPU computes all blocks in one call, in half precision. Whether a model can be run like this is
found out by running it (``can_pack``), not by its name.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raylora.data.minibatch import Blocks, Minibatch, pack_rows, pad_left
from raylora.model.adapters import LoadedModel
from raylora.model.fp8 import Fp8Linear
from raylora.model.loading import is_4bit_layer, uses_llm_int8

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

BLOCKS = "raylora_blocks"
"""The name of this attention in transformers' registry."""
REFUSALS = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError)
"""What a model may raise that cannot be run in another way than its own code expects."""


def attend_in_blocks(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    blocks: Blocks | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each block; its signature is that of transformers' attention functions.

    Args:
        query: (1, heads, T, D); ``key`` and ``value`` too, possibly with fewer heads.
        blocks: of T tokens in all.
        sliding_window: how many tokens, itself included, a token attends to at most.

    Returns:
        (1, T, heads, D), and None in place of attention weights.

    Raises:
        ValueError: the model did not pass ``blocks`` on, or has a mask of its own.
    """
    if blocks is None or attention_mask is not None:
        raise ValueError("this model's attention cannot be run in blocks")
    if _is_flash(query, value) and not kwargs.get("dropout"):
        return attend_at_once(varlen_attn, query, key, value, blocks, sliding_window, kwargs.get("scaling")), None
    if blocks.lengths is None:
        over_row = _blocks_mask(blocks.ends, query.shape[2], sliding_window)
        # Another block counts 0 times. That would be NaN where it holds one, as those of an adapter that diverged do.
        finite = [_finite(t) for t in (query, key, value)]
        output = sdpa_attention_forward(module, *finite, over_row, **kwargs)[0]
        if output.requires_grad:
            output.register_hook(_finite)
        return output, None
    lengths = list(blocks.lengths)
    if query.shape[2] != sum(lengths):
        raise ValueError("this model's attention does not get all tokens of a row")
    kwargs["is_causal"] = True
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        is_longer = sliding_window is not None and q.shape[2] > sliding_window
        mask = _window_mask(q.shape[2], sliding_window or 0, q.device) if is_longer else None
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(outputs, 1), None


def _is_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's attention of packed rows takes these: flash attention, of half precision, from Ampere on."""
    if varlen_attn is None or not query.is_cuda or query.element_size() != 2:
        return False
    width = query.shape[-1]
    fits = width == value.shape[-1] and width % 8 == 0 and width <= 256
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_at_once(
    varlen: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: Blocks,
    sliding_window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """The same by one call for all blocks: a loop over them launches several kernels for each, in every layer.

    Args:
        varlen: ``torch.nn.attention.varlen.varlen_attn``, of a torch from 2.10 on. The device alone reads ``blocks``'
            ends, so that a captured pass can be run on others.

    Returns:
        (1, T, heads, D).
    """
    known = inspect.signature(varlen).parameters
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (T, heads, D)
    options: dict[str, Any] = {"scale": scale} if "scale" in known else {}
    if "window_size" in known:  # tokens before and behind, itself not counted; -1: all
        options["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    elif sliding_window is None:
        options["is_causal"] = True
    else:
        raise ValueError("this version of torch has no sliding window for packed rows")
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    if scale is not None and "scale" not in known:
        q = q * (scale * math.sqrt(q.shape[-1]))  # it divides by the root
    output: torch.Tensor = varlen(q, k, v, blocks.ends, blocks.ends, blocks.longest, blocks.longest, **options)
    return output[None]


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.nan_to_num(0, 0, 0)


def _blocks_mask(ends: torch.Tensor, num_tokens: int, window: int | None) -> torch.Tensor:
    """bool (1, 1, T, T): True where a token attends, within its block; made by the device alone, for captured passes.

    Args:
        ends: as of ``Blocks``.
    """
    places = torch.arange(num_tokens, device=ends.device, dtype=ends.dtype)
    block = torch.searchsorted(ends, places, right=True)
    same = block[:, None] == block[None]
    causal = torch.ones_like(same).tril()
    return (same & (causal if window is None else causal.triu(1 - window)))[None, None]


def _window_mask(num_tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """bool (1, 1, T, T): True where a token attends, to itself and to the ``window`` - 1 tokens before it."""
    ones = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device)
    return (ones.tril() & ones.triu(1 - window))[None, None]


# Without an entry in AttentionMaskInterface: transformers then makes no mask. With one it would look for packed rows in
# the position ids before each pass, for which the CPU waits until the GPU has done all passes before.
AttentionInterface.register(BLOCKS, attend_in_blocks)


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
    return _agrees_packed(model, 17)


def may_pack(loaded: LoadedModel, longest: int) -> bool:
    """Whether examples of up to ``longest`` tokens may share a row; each trial is run once in the life of the model."""
    return loaded.allows(can_pack) and (longest <= window_of(loaded.model) or loaded.allows(can_pack_beyond_window))


def can_pack_beyond_window(model: Any) -> bool:
    """The same for an example that is longer than the model's window (``window_of``), by as many tokens."""
    return _agrees_packed(model, window_of(model) + 17)


def _agrees_packed(model: Any, num_tokens: int) -> bool:
    """Whether an example of ``num_tokens`` has the same logits alone and packed behind others, float noise apart.

    What shares a minibatch moves a quantized model's numbers, LLM.int8's by 5% of SmolLM2's logits. So two things are
    measured: this noise, with the example beside the others in padded rows, and what a wrong mask would do, with the
    others before it in one text: 30 to 50%.
    """
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    vocabulary = int(model.config.get_text_config().vocab_size)
    lengths = ((9, 1), (9, 5), (num_tokens, 3))
    first, other, row = ([(7919 * i + k) % vocabulary for i in range(n)] for n, k in lengths)

    def logits(batch: Minibatch) -> torch.Tensor:
        """Of the last ``num_tokens`` positions, which are the example's: (num_tokens, V)."""
        found: torch.Tensor = model(**batch.model_inputs(), use_cache=False).logits
        return found[-1, -num_tokens:].float()

    with torch.inference_mode():
        alone = logits(pad_left([row], 0, model.device))
        distance = functools.partial(_distance, alone)
        tolerance = 1e-4 * float(alone.norm())
        if not is_exact(model):
            noise = distance([logits(pad_left([before, row], 0, model.device)) for before in (first, other)])
            # In reduced precision the shape of a product alone changes its result by some percent.
            tolerance = max(500 * tolerance, 2 * noise)
            if tolerance > distance([logits(pad_left([first + row], 0, model.device))]) / 2:
                return False  # a wrong mask could not be seen
        try:
            with attention_in_blocks(model):
                packed = [logits(pack_rows([before, row], model.device)) for before in (first, other)]
        except REFUSALS:
            return False
    return distance(packed) <= tolerance


def _distance(alone: torch.Tensor, others: Sequence[torch.Tensor]) -> float:
    """The largest norm of a difference from ``alone``; NaN where one is, which is within no tolerance."""
    return float(torch.stack([(other - alone).norm() for other in others]).max())


def is_exact(model: Any) -> bool:
    """Whether what shares a minibatch with a row changes the row's numbers by float32's rounding alone.

    True for float32, and for weights of 4 or 8 bits that are multiplied as float32. False for half precision, for
    LLM.int8, and for quantizations that are not raylora's own. False for fp8 too: there a row depends on itself alone,
    but float32's rounding before it decides to which of two fp8 numbers, 6% apart, an activation is rounded.
    """
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        return False
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
    """Tokens that an attention sees at most, as the configuration says: a sliding window or a chunk; else 2**62."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((int(limit) for limit in limits if limit), default=2**62)
