"""Log-likelihoods of the four choices from one forward pass a question.

    prefix (once a subject)                  | question        | padding
    description, solved questions ...        | c0 c1 ...    cn | 0 0 0
    keys and values, lent to every batch     |              ^ the output head runs here alone

Rows are padded on the right: positions are then indices of the cache, which sliding windows count by, and a causal mask
needs no other to keep the padding out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from raylora.data.minibatch import pad_left
from raylora.mmlu.prompts import EncodedQuestion
from raylora.model.forward import at_output_head


class _LentLayer(DynamicLayer):
    """One layer's keys and values of a prefix, (1, heads, P, D), in front of any batch's own, and never changed.

    What is put together is not kept: at any moment one layer's copy is in memory, not that of all layers.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(key_states), -1, -1, -1)
        keys = torch.cat([self.keys.expand(shape), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(shape), value_states], dim=-2)


class SharedPrefix:
    """The keys and values of tokens that many prompts begin with, for one state of one model (its adapter included)."""

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self.length = len(ids)
        # Without the model's configuration every layer keeps all it saw, sliding ones too; the masks do the sliding.
        cache = DynamicCache()
        with _head_at(model, torch.tensor([0])):  # its logits are of no use
            model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
        layers = []
        for layer in cache.layers:
            lent = _LentLayer()
            lent.lazy_initialization(layer.keys, layer.values)
            lent.keys, lent.values = layer.keys, layer.values
            layers.append(lent)
        self.cache = Cache(layers=layers)


def why_no_prefix(model: Any) -> str:
    """Why keys and values of a prefix cannot be shared in this model; empty where they can."""
    if getattr(model, "_is_stateful", False):
        return "the model keeps a running state instead of keys and values"
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception as error:  # noqa: BLE001 - configurations of models that know no such cache fail in many ways
        return f"the model's cache cannot be made ({type(error).__name__})"
    kinds = {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    return f"the model's cache has layers of another kind ({', '.join(sorted(kinds))})" if kinds else ""


def choice_logprobs(
    model: Any, batch: Sequence[EncodedQuestion], pad: int, prefix: SharedPrefix | None = None
) -> list[list[float]]:
    """Natural-log likelihoods of the four choices of each question, (B, 4)."""
    if not all(e.single_token for e in batch):
        return [_whole_logprobs(model, e, pad) for e in batch]
    skip = prefix.length if prefix else 0
    lengths = [len(e) - skip for e in batch]
    width = max(lengths)
    ids = torch.full((len(batch), width), pad, dtype=torch.long)
    for row, e in enumerate(batch):
        ids[row, : lengths[row]] = torch.tensor(e.context_ids[skip:], dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids.to(model.device), "use_cache": False}
    if prefix:
        positions = torch.arange(skip, skip + width, device=model.device)
        inputs |= {"past_key_values": prefix.cache, "use_cache": True, "position_ids": positions[None]}
    last = torch.tensor(lengths) - 1
    with _head_at(model, last) as selected:
        logits = model(**inputs).logits
    logits = logits[:, 0] if selected else logits[torch.arange(len(batch)), last]  # (B, V)
    choices = torch.tensor([[c[0] for c in e.continuations] for e in batch], device=logits.device)
    return F.log_softmax(logits.float(), dim=-1).gather(1, choices).tolist()


def _head_at(model: Any, last: torch.Tensor) -> contextlib.AbstractContextManager[bool]:
    """Inside, the output head sees one position of each row, ``last`` (B,), and nothing else is multiplied with it."""
    return at_output_head(model, lambda states: states[torch.arange(len(states)), last][:, None])


def _whole_logprobs(model: Any, encoded: EncodedQuestion, pad: int) -> list[float]:
    """Each choice's tokens scored one after another, for tokenizers that make more than one of a letter."""
    rows = [encoded.context_ids + c[:-1] for c in encoded.continuations]
    inputs = pad_left(rows, pad, model.device)
    keep = max(len(c) for c in encoded.continuations)
    logits = model(**inputs.model_inputs(), logits_to_keep=keep, use_cache=False).logits
    logprobs = F.log_softmax(logits.float(), dim=-1)
    return [
        float(logprobs[i, -len(c) :].gather(1, torch.tensor(c, device=logits.device)[:, None]).sum())
        for i, c in enumerate(encoded.continuations)
    ]
