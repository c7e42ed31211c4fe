"""Log-likelihoods of a question's four choices, from one forward pass.

    prefix (once a subject)                  | question        | padding
    description, solved questions ...        | c0 c1 ...    cn | 0 0 0
    keys and values, shared by all batches   |              ^ the output head is applied to this position only

Rows are padded on the right. A token's position is then its index in the cache, by which sliding windows are counted;
and no padding mask is needed, as causal attention never looks to the right.
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


class _SharedLayer(DynamicLayer):
    """A layer's cache that holds the keys and values of a prefix, (1, heads, P, D), and never changes.

    Each forward pass puts a copy of them before each row of its batch. The result is not stored in the cache, so that
    memory holds one layer's copies at a time, not all layers'.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of prefix and batch, (B, heads, P + T, D)."""
        shape = (len(key_states), -1, -1, -1)
        keys = torch.cat([self.keys.expand(shape), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(shape), value_states], dim=-2)


class SharedPrefix:
    """The keys and values of tokens that many prompts begin with.

    They are those of the adapter that is active when they are computed: with another one they must be computed anew.
    """

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self.length = len(ids)
        # Made without the model's configuration, a cache keeps all tokens in every layer, in those with a sliding
        # window too: there the attention masks hide the tokens outside the window.
        cache = DynamicCache()
        with _head_at(model, torch.tensor([0])):  # one position, as the logits are not used
            model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
        layers = []
        for layer in cache.layers:
            shared = _SharedLayer()
            shared.lazy_initialization(layer.keys, layer.values)
            shared.keys, shared.values = layer.keys, layer.values
            layers.append(shared)
        self.cache = Cache(layers=layers)


def why_no_prefix(model: Any) -> str:
    """Why this model cannot share the keys and values of a prefix; empty where it can."""
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
    """Log-likelihoods (B, 4), in nats, of the four choices of each question.

    Args:
        prefix: tokens that all these prompts begin with; they are not run again.
    """
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
    """Inside, the output head is applied to one position of each row only, ``last`` (B,)."""
    return at_output_head(model, lambda states: states[torch.arange(len(states)), last][:, None])


def _whole_logprobs(model: Any, encoded: EncodedQuestion, pad: int) -> list[float]:
    """Log-likelihoods (4,) where a choice has several tokens: the sum over its tokens, from a row for each choice."""
    rows = [encoded.context_ids + c[:-1] for c in encoded.continuations]
    inputs = pad_left(rows, pad, model.device)
    keep = max(len(c) for c in encoded.continuations)
    logits = model(**inputs.model_inputs(), logits_to_keep=keep, use_cache=False).logits
    logprobs = F.log_softmax(logits.float(), dim=-1)
    return [
        float(logprobs[i, -len(c) :].gather(1, torch.tensor(c, device=logits.device)[:, None]).sum())
        for i, c in enumerate(encoded.continuations)
    ]
