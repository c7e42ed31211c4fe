"""Packing: several examples in one row, without padding, none of which attends to another.

    tokens      a a a a a b b b c c c c
    positions   0 1 2 3 4 0 1 2 0 1 2 3

Attention is that of ``attention.py``. Whether a model can be run like this is found out by running it (``can_pack``),
not by its name.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from raylora.data.minibatch import Minibatch, pack_rows, pad_left
from raylora.model.adapters import LoadedModel
from raylora.model.attention import REFUSALS, attention_in_blocks
from raylora.model.fp8 import Fp8Linear
from raylora.model.loading import is_4bit_layer, uses_llm_int8


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
        if not is_exact(model) or torch.is_autocast_enabled(model.device.type):
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
