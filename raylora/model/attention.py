"""Attention of packed rows: each row to its own tokens, and to those of the prefix that it stands behind.

    tokens      a a a a a b b b c c c c         rows a and b stand behind prefix P, row c behind Q
    positions   9 ...     9 ..  6 ...           counted from the beginning of the prefix
    kept        P P P P P P P P P Q Q Q Q Q Q   keys and values of an earlier pass, of each layer

Attention is computed for each block (row) by itself: no mask is needed, and no score between two rows is computed. One
attention over the whole row, with a mask, takes 17 ms in place of 2.7 at 1024 tokens (benchmarks/NOTES.md). A GPU
computes all blocks in one call, in half precision.

A prefix that several rows begin with is run once, and its keys and values are kept. A row's attention to the prefix and
that to its own tokens are computed apart and put together by the logarithms of their sums of exponentials (as
FlashDecoding does, Dao et al. 2023): no key is copied, but for those of a few tokens on a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raylora.data.minibatch import Blocks
from raylora.model.kept_keys import Behind, KeptKeys, Within

try:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = AuxRequest = None  # type: ignore[assignment,misc]

FLASH_ON_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""What torch's attention runs on a CPU; it alone returns the sums as well."""
BLOCKS = "raylora_blocks"
"""The name of this attention in transformers' registry."""
REFUSALS = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError)
"""What a model may raise that cannot be run in another way than its own code expects."""
SHORT_PREFIX = 32
"""Tokens of a prefix whose keys are copied before each row's on a CPU: of 11, 1.7 ms a layer in place of 2.2, of 80 the
other way about (benchmarks/NOTES.md)."""
MOST_SCORES = 2**26
"""Scores that are in memory at once where plain products make them: 256 MB in float32."""
Varlen = Callable[..., Any]


def attend_in_blocks(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    blocks: Blocks | None = None,
    keep: KeptKeys | None = None,
    behind: Behind | None = None,
    within: Within | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each block; its signature is that of transformers' attention functions.

    Args:
        query: (1, heads, T, D); ``key`` and ``value`` too, possibly with fewer heads.
        blocks: of T tokens in all.
        keep: where keys and values are kept, of rows that others will stand behind.
        behind: the prefixes that the blocks stand behind.
        within: the blocks of this pass that others of it stand behind.
        sliding_window: how many tokens, itself included, a token attends to at most.

    Returns:
        (1, T, heads, D), and None in place of attention weights.

    Raises:
        ValueError: the model did not pass ``blocks`` on, or has a mask of its own.
    """
    if blocks is None or attention_mask is not None:
        raise ValueError("this model's attention cannot be run in blocks")
    if keep is not None:
        keep.put(module, key, value)
    longest = max((texts.longest_text for texts in (behind, within) if texts is not None), default=0)
    if sliding_window is not None and 0 < longest <= sliding_window:
        sliding_window = None  # no window ends within a text
    is_plain = behind is None and within is None
    may_be_at_once = sliding_window is None or (is_plain and _knows(varlen_attn, "window_size"))
    if may_be_at_once and _is_flash(query, value) and not kwargs.get("dropout"):
        given = module, query, key, value, blocks, behind, within, sliding_window, kwargs
        return attend_at_once(varlen_attn, *given), None
    if within is not None and (blocks.lengths is None or sliding_window is not None):
        raise ValueError("texts behind others of a pass have no sliding window, and are not captured")
    if blocks.lengths is None:
        return _attend_by_mask(module, query, key, value, blocks, behind, sliding_window, kwargs), None
    lengths = list(blocks.lengths)
    if query.shape[2] != sum(lengths):
        raise ValueError("this model's attention does not get all tokens of a row")
    is_long = behind is not None and sliding_window is None and behind.longest > SHORT_PREFIX
    if within is not None or is_long:
        return _attend_apart(module, query, key, value, lengths, behind, within, kwargs.get("scaling")), None
    kwargs["is_causal"] = True
    return _attend_row_by_row(module, query, key, value, lengths, behind, sliding_window, kwargs), None


def _attend_row_by_row(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    behind: Behind | None,
    window: int | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """One text after another, the keys of a row's prefix copied before its own: (1, T, heads, D)."""
    rows = zip(*(t.split(lengths, 2) for t in (query, key, value)), strict=True)
    if behind is None:
        return torch.cat([_attend_causally(module, q, k, v, window, kwargs) for q, k, v in rows], 1)
    kept, outputs = behind.keys.of(module), []
    for (start, end), (q, *own) in zip(behind.prefixes or (), rows, strict=True):
        k, v = (torch.cat([before[:, :, start:end], new], 2) for before, new in zip(kept, own, strict=True))
        outputs.append(_attend_causally(module, q, k, v, window, kwargs))
    return torch.cat(outputs, 1)


def _attend_causally(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, kwargs: dict[str, Any]
) -> torch.Tensor:
    """The attention (1, T, heads, D) of one text's last T tokens to the text."""
    num_keys, num_before = k.shape[2], k.shape[2] - q.shape[2]
    if num_before:
        # The tokens before attend as well, by no query: a short prefix costs less than a mask for those behind it.
        q = F.pad(q, (0, 0, num_before, 0))
    mask = _window_mask(num_keys, window, q.device) if window is not None and num_keys > window else None
    output: torch.Tensor = sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0]
    return output[:, num_before:]


# Of a GPU: all blocks in one call


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's attention of packed rows runs there: flash attention, of half precision, from Ampere on."""
    if varlen_attn is None or device.type != "cuda" or dtype.itemsize != 2:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _is_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's attention of packed rows takes these."""
    width = query.shape[-1]
    fits = width == value.shape[-1] and width % 8 == 0 and width <= 256
    return fits and has_flash(query.device, query.dtype)


@functools.cache
def _parameters_of(varlen: Varlen) -> frozenset[str]:
    return frozenset(inspect.signature(varlen).parameters)


def _knows(varlen: Varlen | None, option: str) -> bool:
    """Whether this version of torch's attention of packed rows has a parameter."""
    return varlen is not None and option in _parameters_of(varlen)


def attend_at_once(
    varlen: Varlen,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: Blocks,
    behind: Behind | None,
    within: Within | None,
    sliding_window: int | None,
    kwargs: Mapping[str, Any],
) -> torch.Tensor:
    """The same by one call for all blocks: a loop over them launches several kernels for each, in every layer.

    Args:
        varlen: ``torch.nn.attention.varlen.varlen_attn``, of a torch from 2.10 on. The device alone reads ``blocks``'
            ends, so that a captured pass can be run on others.

    Returns:
        (1, T, heads, D).
    """
    scale = kwargs.get("scaling")
    # Tokens before and behind, itself not counted; -1: all.
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    ends = (blocks.ends, blocks.ends, blocks.longest, blocks.longest)
    own = _varlen(varlen, query, key, value, ends, window, scale, behind is not None or within is not None)
    before = texts = None
    # From here on some rows may be empty. Where no row has more than one token, torch's kernel takes each to have one:
    # hence 2.
    if behind is not None:
        ends = (behind.row_ends, behind.prefix_ends, max(2, query.shape[2]), behind.longest)
        before = _varlen(varlen, query, *behind.keys.of(module), ends, (-1, -1), scale, True)
    if within is not None:
        start = within.start
        ends = (within.branch_ends, within.text_ends, max(2, query.shape[2] - start), within.longest)
        given = query[:, :, start:], key[:, :, :start], value[:, :, :start]
        texts = _varlen(varlen, *given, ends, (-1, -1), scale, True)
    return _put_together(own, before, texts, within)


def _varlen(
    varlen: Varlen,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor, int, int],
    window: tuple[int, int],
    scale: float | None,
    with_sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call: (1, heads, T, D), and the logarithms (1, heads, T) of the sums; without ``with_sums`` none."""
    known = _parameters_of(varlen)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (T, heads, D)
    of_queries, of_keys, *longest = ends
    ends_there = of_queries.to(q.device), of_keys.to(q.device)  # another, where a model lies on several
    options: dict[str, Any] = {"scale": scale} if "scale" in known else {}
    if "window_size" in known:
        options["window_size"] = window
    elif window[0] == -1:
        options["is_causal"] = window[1] == 0
    else:
        raise ValueError("this version of torch has no sliding window for packed rows")
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    if scale is not None and "scale" not in known:
        q = q * (scale * math.sqrt(q.shape[-1]))  # it divides by the root
    if not with_sums:
        output = varlen(q, k, v, *ends_there, *longest, **options)
        return output.transpose(0, 1)[None], output.new_empty(0)
    output, sums = varlen(q, k, v, *ends_there, *longest, return_aux=AuxRequest(lse=True), **options)
    # torch 2.13 says (T, heads) in its documentation and returns (heads, T), as its kernels do.
    return output.transpose(0, 1)[None], (sums if sums.shape[0] == q.shape[1] else sums.t())[None]


def _put_together(
    own: tuple[torch.Tensor, torch.Tensor],
    before: tuple[torch.Tensor, torch.Tensor] | None,
    texts: tuple[torch.Tensor, torch.Tensor] | None,
    within: Within | None,
) -> torch.Tensor:
    """Attention to a row's own tokens, to its prefix, and of branches to their text, as one: (1, T, heads, D)."""
    output, sums = own if before is None else _join(own, before, with_sums=texts is not None)
    if texts is not None and within is not None:
        joined, _ = _join((output[:, :, within.start :], sums[..., within.start :]), texts)
        output = torch.cat([output[:, :, : within.start], joined], 2)
    return output.transpose(1, 2)


def _join(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], with_sums: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to two sets of keys as attention to both: (..., T, D), and logarithms of sums, (..., T), each.

    Without ``with_sums`` the sums are a's.
    """
    (of_a, sums_a), (of_b, sums_b) = a, b
    weights = torch.sigmoid(sums_a - sums_b)[..., None].to(of_a.dtype)
    return torch.lerp(of_b, of_a, weights), torch.logaddexp(sums_a, sums_b) if with_sums else sums_a


# Of a captured pass without flash attention: one attention over the whole row


def _attend_by_mask(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: Blocks,
    behind: Behind | None,
    window: int | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    mask = _blocks_mask(blocks.ends.to(query.device), query.shape[2], window)
    if behind is not None:
        if window is not None:
            raise ValueError("a captured pass has no sliding windows behind a prefix")
        kept = behind.keys.of(module)
        mask = torch.cat([_prefix_mask(behind, kept[0].shape[2], query.shape[2]).to(query.device), mask], 3)
        key, value = (torch.cat(pair, 2) for pair in zip(kept, (key, value), strict=True))
    # Another block counts 0 times. That would be NaN where it holds one, as those of an adapter that diverged do.
    finite = [_finite(t) for t in (query, key, value)]
    output: torch.Tensor = sdpa_attention_forward(module, *finite, mask, **kwargs)[0]
    if output.requires_grad:
        output.register_hook(_finite)
    return output


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.nan_to_num(0, 0, 0)


def _blocks_mask(ends: torch.Tensor, num_tokens: int, window: int | None) -> torch.Tensor:
    """bool (1, 1, T, T): True where a token attends, within its block; made by the device alone, for captured passes.

    Args:
        ends: as of ``Blocks``.
    """
    block = _parts(ends, num_tokens)
    same = block[:, None] == block[None]
    causal = torch.ones_like(same).tril()
    return (same & (causal if window is None else causal.triu(1 - window)))[None, None]


def _prefix_mask(behind: Behind, num_kept: int, num_tokens: int) -> torch.Tensor:
    """bool (1, 1, T, num_kept): True where a token attends to one of its prefix; those behind all prefixes are none."""
    of_kept, of_row = _parts(behind.prefix_ends, num_kept), _parts(behind.row_ends, num_tokens)
    return (of_row[:, None] == of_kept[None])[None, None]


def _parts(ends: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Which part each token is in, (T,), given where parts end, 0 before them."""
    places = torch.arange(num_tokens, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, places, right=True)


def _window_mask(num_tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """bool (1, 1, T, T): True where a token attends, to itself and to the ``window`` - 1 tokens before it."""
    ones = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device)
    return (ones.tril() & ones.triu(1 - window))[None, None]


# Behind prefixes, block by block


def _attend_apart(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    behind: Behind | None,
    within: Within | None,
    scale: float | None,
) -> torch.Tensor:
    """Rows side by side behind the same prefix attend to it together: (1, T, heads, D)."""
    repeats = query.shape[1] // key.shape[1]
    repeated = (t if repeats == 1 else t.repeat_interleave(repeats, 1) for t in (key, value))
    split = zip(*(t.split(lengths, 2) for t in (query, *repeated)), strict=True)
    own = _cat([_with_sums(q, k, v, scale, is_causal=True) for q, k, v in split])
    before = texts = None
    if behind is not None:
        keys, values = behind.keys.of(module)
        found, start = [], 0
        pairs = zip(behind.prefixes or (), lengths, strict=True)
        for (first, last), rows in itertools.groupby(pairs, lambda pair: pair[0]):
            end = start + sum(length for _, length in rows)
            prefix = keys[:, :, first:last], values[:, :, first:last]
            found.append(_with_sums(query[:, :, start:end], *prefix, scale, is_causal=False))
            start = end
        before = _cat(found)
    if within is not None:
        branches = query[:, :, within.start :]
        texts = _cat(
            [
                _with_sums(branches[:, :, c:d], key[:, :, a:b], value[:, :, a:b], scale, is_causal=False)
                for a, b, c, d in within.spans
            ]
        )
    return _put_together(own, before, texts, within)


def _cat(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows one after another, and their sums."""
    return torch.cat([output for output, _ in pairs], 2), torch.cat([sums for _, sums in pairs], 2)


def _with_sums(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (1, heads, T, D), and the logarithms (1, heads, T) of its sums of exponentials, float32."""
    shape, repeats = q.shape, q.shape[1] // k.shape[1]
    if repeats > 1:  # heads that share a key are as good as more tokens: of the causal ones, keys are repeated before
        q = q.reshape(1, k.shape[1], -1, shape[3])
    if FLASH_ON_CPU is not None and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        output, sums = FLASH_ON_CPU(q, k, v, is_causal=is_causal, scale=scale)
    else:
        output, sums = _plainly(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, is_causal)
    return output.reshape(*shape[:3], v.shape[-1]), sums.reshape(shape[:3])


def _plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``_with_sums`` of as many heads of keys as of queries, some tokens at a time."""
    outputs, sums = [], []
    step = max(1, MOST_SCORES // (q.shape[1] * k.shape[2]))
    places = torch.arange(k.shape[2], device=q.device)
    with torch.autocast(q.device.type, enabled=False):  # it would lower float32
        for start, part in zip(itertools.count(0, step), q.split(step, 2), strict=False):
            # Scaled first: in float16 the products of some models, as Qwen2's, are infinite without.
            scores = (part * scale @ k.transpose(2, 3)).float()
            if is_causal:
                scores.masked_fill_(places > places[start : start + step, None], -math.inf)
            sums.append(scores.logsumexp(-1))
            outputs.append(scores.sub_(sums[-1][..., None]).exp_().to(v.dtype) @ v)
    return torch.cat(outputs, 2), torch.cat(sums, 2)


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
