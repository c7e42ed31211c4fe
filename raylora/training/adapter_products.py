"""The matrix products of LoRA adapters in training: several adapters in one forward pass, and cheap dropout.

The parameters are PEFT's own and PEFT saves them. While a training runs, this replaces PEFT's forward pass:

- Every token belongs to one adapter, and a minibatch holds the tokens of an adapter side by side, so that an adapter
  multiplies one slice of the minibatch. (PEFT can mix adapters in a batch for inference only.)
- Dropout is a hash of the example's seed, the module, and the token's and the feature's index. So it does not depend
  on how a step is cut into minibatches, on gradient checkpointing, on the device, or on adapters trained beside it.
- On a CPU torch's dropout of 1024 tokens takes 3.9 ms, as long as a 576 x 576 product, and each layer of SmolLM2-135M
  has 7 of them; the hash takes 0.4 ms (benchmarks/NOTES.md). It has 16 bits a number; the mask that is saved for the
  backward pass takes a byte a number.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raylora.data.minibatch import send
from raylora.errors import ErrorKind, UserError
from raylora.model.adapters import LoadedModel
from raylora.model.kernels import scramble, signed, spread_numbers

_64_BITS = 2**64 - 1
LINEAR = {"Linear", "Linear8bitLt", "Linear4bit"}
"""PEFT's modules around a matrix, which compute base(x) + scaling * B A dropout(x)."""


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``stop`` of a minibatch: one example, for ``adapter``, with dropout by ``seed``."""

    start: int
    stop: int
    adapter: str
    seed: int


@dataclass(frozen=True)
class _Slice:
    """The tokens of one adapter in a minibatch, N of them, and how one module multiplies them."""

    start: int
    stop: int
    scale: float
    """LoRA's scaling, divided by the share of numbers that dropout keeps."""
    keep: torch.Tensor | None
    """uint8 (N, in): 0 where the input is dropped, else 1; None without dropout."""


def mix(*numbers: int) -> int:
    """A 64-bit hash of numbers, by the finalizer of SplitMix64 (Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _64_BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _64_BITS
        state ^= state >> 31
    return state


class AdapterProducts:
    """The adapters ``names`` of a model, in training. ``expect`` is called before each forward pass.

    Raises:
        UserError: there are several adapters, and some adapted modules are not linear.
    """

    def __init__(self, loaded: LoadedModel, names: Sequence[str]) -> None:
        self._spans: list[Span] = []
        self._num_tokens = 0
        self._names = list(names)
        self._device = loaded.device
        self._rows = torch.zeros(0, dtype=torch.int32)
        self._columns: dict[tuple[int, torch.device], torch.Tensor] = {}
        adapted = [m for _, m in loaded.lora_modules() if any(n in m.lora_A or n in m.lora_embedding_A for n in names)]
        self._modules = [m for m in adapted if type(m).__name__ in LINEAR and not m.lora_variant]
        if len(names) > 1 and len(self._modules) < len(adapted):
            text = "--target-modules: adapters of modules other than linear ones cannot share a pass"
            raise UserError(text, kind=ErrorKind.TARGET_MODULES)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the adapted modules run this class's forward pass."""
        for index, module in enumerate(self._modules):
            module.forward = functools.partial(self._forward, module, index)
        try:
            yield
        finally:
            for module in self._modules:
                del module.forward

    def expect(self, spans: Sequence[Span], num_tokens: int) -> None:
        """Say what the next forward pass holds: ``num_tokens`` with padding, of these examples.

        Examples of one adapter are side by side.
        """
        self._spans, self._num_tokens = list(spans), num_tokens
        rows = torch.zeros(num_tokens, dtype=torch.int32)
        for span in spans:
            rows[span.start : span.stop] = spread_numbers(span.stop - span.start) + signed(span.seed >> 32)
        self._rows = send(scramble(rows), self._device)

    def _forward(self, module: Any, index: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) != self._num_tokens:
            # An expert gets a part of the tokens and does not say which: PEFT's own forward pass, for one adapter only.
            if len(self._names) > 1:
                text = "--target-modules: experts' adapters cannot share a pass"
                raise UserError(text, kind=ErrorKind.TARGET_MODULES)
            return type(module).forward(module, x, *args, **kwargs)
        result = module.base_layer(x, *args, **kwargs)
        slices, weights = [], []
        for name in self._names:
            spans = [s for s in self._spans if s.adapter == name]
            if not spans or name not in module.lora_A:
                continue
            dropout = getattr(module.lora_dropout[name], "p", 0.0)
            slices.append(self.slice_of(rows, spans, index, dropout, module.scaling[name]))
            weights += [module.lora_A[name].weight, module.lora_B[name].weight]
        if not slices:
            return result
        flat = result.reshape(-1, result.shape[-1])
        return _AddProducts.apply(flat, rows, slices, *weights).view(result.shape)

    def slice_of(self, rows: torch.Tensor, spans: list[Span], index: int, dropout: float, scaling: float) -> _Slice:
        """The tokens of ``spans``, which are one adapter's, and what dropout keeps of them in module ``index``.

        Args:
            rows: the module's input of the whole minibatch, (tokens, width).
        """
        first, last = spans[0].start, spans[-1].stop
        if dropout == 0:
            return _Slice(first, last, scaling, None)
        threshold = round(dropout * 2**16)
        token_hashes = self._rows[first:last].to(rows.device) + signed(mix(index))
        words = scramble(scramble(token_hashes)[:, None] + self._column_hashes(rows.shape[1], rows.device))
        # Each int32 is two int16, one for each of two columns: those below the threshold drop their number.
        keep = words.view(torch.int16)[:, : rows.shape[1]] >= threshold - 2**15
        return _Slice(first, last, scaling / (1 - threshold / 2**16), keep.view(torch.uint8))

    def _column_hashes(self, width: int, device: torch.device) -> torch.Tensor:
        """A hash for every two columns, int32 (1, width / 2 rounded up)."""
        if (width, device) not in self._columns:
            self._columns[width, device] = scramble(spread_numbers(math.ceil(width / 2)))[None].to(device)
        return self._columns[width, device]


class _AddProducts(torch.autograd.Function):
    """base + scale * B A (keep * x), slice by slice. Base (N, out), x (N, in); A (r, in), B (out, r) of each slice.

    Saved for the backward pass are x, which other modules save as well, ``keep`` (a byte a number), and A x.
    """

    @staticmethod
    def forward(
        ctx: Any, base: torch.Tensor, x: torch.Tensor, slices: list[_Slice], *weights: torch.Tensor
    ) -> torch.Tensor:
        out = base if len(slices) == 1 and slices[0].stop - slices[0].start == len(base) else base.clone()
        inner = []
        # In the base's dtype: autocast would lower the precision of some of these products and not of others.
        with torch.autocast(base.device.type, enabled=False):
            for part, a, b in zip(slices, weights[::2], weights[1::2], strict=True):
                tokens = slice(part.start, part.stop)
                h = _after_dropout(x[tokens].to(base.dtype), part) @ a.to(base.dtype).t()
                if out is base:
                    out = torch.addmm(base, h, b.to(base.dtype).t(), alpha=part.scale)
                else:
                    out[tokens].addmm_(h, b.to(base.dtype).t(), alpha=part.scale)
                inner.append(h)
        ctx.slices = [_Slice(p.start, p.stop, p.scale, None) for p in slices]
        ctx.dtype = base.dtype
        keeps = [p.keep for p in slices if p.keep is not None]
        ctx.has_keep = [p.keep is not None for p in slices]
        ctx.save_for_backward(x, *weights, *inner, *keeps)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        n, dtype = len(ctx.slices), ctx.dtype
        weights, inner, keeps = rest[: 2 * n], rest[2 * n : 3 * n], iter(rest[3 * n :])
        is_whole = n == 1 and ctx.slices[0].stop - ctx.slices[0].start == len(x)
        d_x = torch.zeros_like(x) if ctx.needs_input_grad[1] and not is_whole else None
        d_weights: list[torch.Tensor] = []
        for i, part in enumerate(ctx.slices):
            tokens = slice(part.start, part.stop)
            part = _Slice(part.start, part.stop, part.scale, next(keeps) if ctx.has_keep[i] else None)
            a, b, d_out = weights[2 * i], weights[2 * i + 1], gradients[0][tokens].to(dtype)
            d_h = (d_out @ b.to(dtype)) * part.scale
            d_weights.append((d_h.t() @ _after_dropout(x[tokens].to(dtype), part)).to(a.dtype))
            d_weights.append((d_out.t() @ inner[i] * part.scale).to(b.dtype))
            if is_whole and ctx.needs_input_grad[1]:
                d_x = _after_dropout(d_h @ a.to(dtype), part).to(x.dtype)
            elif d_x is not None:
                d_x[tokens] = _after_dropout(d_h @ a.to(dtype), part)
        return gradients[0], d_x, None, *d_weights


def _after_dropout(x: torch.Tensor, part: _Slice) -> torch.Tensor:
    return x if part.keep is None else x * part.keep
