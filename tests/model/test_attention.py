"""Attention of packed rows, behind prefixes too, is that of each text alone, in every way of computing it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raylora.data.minibatch import Blocks
from raylora.model import attention
from raylora.model.attention import attend_at_once, attend_in_blocks
from raylora.model.kept_keys import Behind, KeptKeys


def varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), return_aux=None, **options
):
    """What torch's ``varlen_attn`` computes on a GPU, plainly: query (T, heads, D), one block after another."""
    if options.pop("enable_gqa", False):
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    assert not options
    assert max_q >= int(cu_seq_q.diff().max())
    assert max_k >= int(cu_seq_k.diff().max())
    outputs, sums = [], []
    pairs = zip(itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True)
    for (a, b), (c, d) in pairs:
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) * (scale or query.shape[-1] ** -0.5)
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)[None]
        seen = (distance >= 0) | (window_size[1] < 0)
        seen &= (distance <= window_size[0]) | (window_size[0] < 0)
        scores = scores.masked_fill(~seen, -math.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[c:d]))
        sums.append(scores.logsumexp(-1))
    output = torch.cat(outputs)
    return (output, torch.cat(sums, 1)) if return_aux is not None and return_aux.lse else output


def varlen_with_gqa(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    """With the arguments of torch 2.13; the sums as its documentation has them."""
    found = varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size,
        enable_gqa=enable_gqa, return_aux=return_aux,
    )  # fmt: skip
    return (found[0], found[1].t()) if return_aux is not None else found


def varlen_of_old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """With the arguments of torch 2.10."""
    window = (-1, 0 if is_causal else -1)
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window, return_aux=return_aux)


KERNELS = [varlen, varlen_with_gqa, varlen_of_old]


def module_of(num_groups: int = 2) -> torch.nn.Module:
    module = torch.nn.Module()
    module.num_key_value_groups = num_groups
    return module


def tensors(num_tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """Query, key and value of 4 and 2 heads."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, num_tokens, 16, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_at_once_is_that_of_block_by_block(kernel, scale, window):
    """With empty blocks, as captured passes have them; fewer heads of keys than of queries."""
    query, key, value = tensors(20)
    module, kwargs = module_of(), {"scaling": scale}
    ends = torch.tensor([0, 7, 7, 17, 20, 20], dtype=torch.int32)
    expected, _ = attend_in_blocks(
        module, query, key, value, None, blocks=Blocks(ends, 10), sliding_window=window, **kwargs
    )
    if kernel is varlen_of_old and window:
        with pytest.raises(ValueError, match="window"):
            attend_at_once(kernel, module, query, key, value, Blocks(ends, 16), None, None, window, kwargs)
        return
    found = attend_at_once(kernel, module, query, key, value, Blocks(ends, 16), None, None, window, kwargs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# Behind prefixes


def ends_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


class Texts:
    """Texts of a prefix and a row each, several of them behind the same prefix, and what their attention is."""

    def __init__(self, prefixes: list[int], rows: list[list[int]], capacity: int | None = None) -> None:
        self.module = module_of()
        self.kept = KeptKeys(capacity)
        self.rows, num_rows = rows, [sum(group) for group in rows]
        _, *of_prefixes = tensors(sum(prefixes), 1)
        self.kept.put(self.module, *of_prefixes)
        self.query, self.key, self.value = tensors(sum(num_rows))
        starts = ends_of(prefixes).tolist()
        spans = [(starts[g], starts[g + 1]) for g, group in enumerate(rows) for _ in group]
        lengths = [n for group in rows for n in group]
        self.blocks = Blocks(ends_of(lengths), max(lengths), tuple(lengths))
        longest = max(b - a + n for (a, b), n in zip(spans, lengths, strict=True))
        self.behind = Behind(
            self.kept, ends_of(prefixes), ends_of(num_rows), max(prefixes), longest, tuple(spans)
        )  # fmt: skip
        self.of_prefixes, self.spans, self.lengths = of_prefixes, spans, lengths

    def expected(self, window: int | None = None, scale: float | None = None) -> torch.Tensor:
        """One text after another, all of it."""
        outputs, start = [], 0
        for (a, b), n in zip(self.spans, self.lengths, strict=True):
            q = self.query[:, :, start : start + n]
            k, v = (
                torch.cat([old[:, :, a:b], new[:, :, start : start + n]], 2).repeat_interleave(2, 1)
                for old, new in zip(self.of_prefixes, (self.key, self.value), strict=True)
            )
            scores = (q @ k.transpose(2, 3)) * (scale or 0.25)
            distance = torch.arange(b - a, b - a + n)[:, None] - torch.arange(b - a + n)[None]
            seen = (distance >= 0) & ((distance < window) if window else True)
            outputs.append((scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(1, 2))
            start += n
        return torch.cat(outputs, 1)

    def attend(self, blocks: Blocks | None = None, behind: Behind | None = None, **options) -> torch.Tensor:
        return attend_in_blocks(
            self.module, self.query, self.key, self.value, None, blocks=blocks or self.blocks,
            behind=behind or self.behind, **options,
        )[0]  # fmt: skip


def on_device_only(texts: Texts) -> tuple[Blocks, Behind]:
    """As captured passes have them: only tensors say where rows lie."""
    return replace(texts.blocks, lengths=None), replace(texts.behind, prefixes=None)


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=4)
GROUPS = st.lists(st.tuples(st.integers(1, 60), LENGTHS), min_size=1, max_size=3)


@settings(deadline=None, max_examples=25)
@given(GROUPS, st.sampled_from([None, 0.3]), st.booleans())
def test_rows_behind_prefixes_attend_as_if_each_were_one_text_with_its_own(groups, scale, has_room):
    prefixes, rows = [p for p, _ in groups], [r for _, r in groups]
    assume(sum(map(sum, rows)) != 4)  # as many tokens as heads: the sums of two of the kernels look alike
    texts = Texts(prefixes, rows, 200 if has_room else None)
    expected = texts.expected(scale=scale)
    torch.testing.assert_close(texts.attend(scaling=scale), expected, atol=2e-5, rtol=1e-4)
    blocks, behind = on_device_only(texts)
    torch.testing.assert_close(texts.attend(blocks, behind, scaling=scale), expected, atol=2e-5, rtol=1e-4)
    for kernel in KERNELS:
        found = attend_at_once(
            kernel, texts.module, texts.query, texts.key, texts.value, blocks, behind, None, None, {"scaling": scale}
        )
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 3, 8, 25])
def test_a_sliding_window_reaches_into_the_prefix(window):
    texts = Texts([20, 5], [[3, 9], [7]])
    torch.testing.assert_close(texts.attend(sliding_window=window), texts.expected(window), atol=2e-5, rtol=1e-4)


def test_a_window_behind_a_prefix_is_not_captured():
    texts = Texts([20], [[3, 9]])
    with pytest.raises(ValueError, match="sliding windows"):
        texts.attend(*on_device_only(texts), sliding_window=8)
    found = texts.attend(*on_device_only(texts), sliding_window=29)
    torch.testing.assert_close(found, texts.expected(), atol=2e-5, rtol=1e-4)


def test_keys_of_the_next_prefix_lie_where_those_of_the_last_one_did():
    kept, module = KeptKeys(50), module_of()
    _, key, value = tensors(30)
    kept.put(module, key, value)
    before = kept.of(module)
    kept.begin()
    _, shorter, values = tensors(10, 5)
    kept.put(module, shorter, values)
    assert all(a is b for a, b in zip(kept.of(module), before, strict=True))
    assert torch.equal(kept.of(module)[0][:, :, :10], shorter)
    with pytest.raises(ValueError, match="share an attention module"):
        kept.put(module, shorter, values)


def test_a_prefix_that_became_infinite_moves_no_row_behind_another():
    """As that of an adapter that diverged does, in a captured pass."""
    texts = Texts([6, 6], [[3], [4]])
    keys, values = texts.kept.of(texts.module)
    keys[:, :, :6], values[:, :, :6] = math.nan, math.inf
    found = texts.attend(*on_device_only(texts))
    torch.testing.assert_close(found[:, 3:], texts.expected()[:, 3:], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(texts.attend()[:, 3:], texts.expected()[:, 3:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("most_scores", [1, 200, 2**26])
def test_plain_products_come_to_the_same(monkeypatch, most_scores):
    """As on a GPU without flash attention: some tokens at a time, so that memory holds their scores."""
    monkeypatch.setattr(attention, "FLASH_ON_CPU", None)
    monkeypatch.setattr(attention, "MOST_SCORES", most_scores)
    texts = Texts([40, 50], [[3, 9], [7]])
    expected = texts.expected()
    torch.testing.assert_close(texts.attend(), expected, atol=2e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # it does not lower them
        torch.testing.assert_close(texts.attend(), expected, atol=2e-5, rtol=1e-4)


def test_products_that_float16_does_not_hold_are_scaled_before(monkeypatch):
    monkeypatch.setattr(attention, "FLASH_ON_CPU", None)
    texts = Texts([20], [[3]])
    texts.query, texts.key = 120 * texts.query, 120 * texts.key
    keys, values = texts.kept.of(texts.module)
    keys *= 120
    assert float((texts.query @ keys.repeat_interleave(2, 1).mT).abs().max()) > torch.finfo(torch.float16).max
    expected = texts.expected(scale=0.02)
    half = Texts([20], [[3]])
    half.kept.begin()
    half.kept.put(half.module, keys.half(), values.half())
    half.query, half.key, half.value = (t.half() for t in (texts.query, texts.key, texts.value))
    found = half.attend(scaling=0.02)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.float(), expected, atol=5e-2, rtol=5e-2)


def test_one_token_behind_several_prefixes_is_no_row_of_each():
    """Where no row has two tokens, torch's kernel takes each row to have one; most rows here have none."""

    def strict(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        assert max_q > 1 or len(query) == len(cu_seq_q) - 1
        options = {"return_aux": return_aux, "scale": scale, "window_size": window_size}
        return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)

    texts = Texts([5, 8], [[], [1]])
    blocks, behind = on_device_only(texts)
    found = attend_at_once(
        strict, texts.module, texts.query, texts.key, texts.value, blocks, behind, None, None, {"scaling": None}
    )
    torch.testing.assert_close(found, texts.expected(), atol=2e-5, rtol=1e-4)
