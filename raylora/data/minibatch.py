"""Encoded examples as tensors: rows padded on the left, or packed one after another into one row.

Padding is on the left, so that the tokens that are scored stand at the end of every row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raylora.data.encoding import IGNORE_INDEX


@dataclass(frozen=True)
class Blocks:
    """Where the examples of a packed row lie, one after another: no token attends beyond its own."""

    ends: torch.Tensor
    """int32 (blocks + 1,): 0, then where each block ends, on the minibatch's device. Blocks may be empty."""
    longest: int
    """Tokens that no block has more of."""
    lengths: tuple[int, ...] | None = None
    """The tokens of each block; None where only the device knows them, as a captured pass is run on other blocks."""


@dataclass(frozen=True)
class Minibatch:
    """Tensors of shape (B, T), padded on the left or packed (B = 1).

    ``targets`` (N,) are the ids of the supervised tokens, example after example. ``predicting`` (N,) are the positions
    that predict them, one before each, counted over all B * T. Both are computed before anything is sent to a GPU:
    their size N depends on the data, and computing it there would have the CPU wait for the GPU.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    """1 for a token, 0 for padding; None where the row is packed."""
    position_ids: torch.Tensor
    """Counted from 0 in each example."""
    targets: torch.Tensor | None = None
    predicting: torch.Tensor | None = None
    blocks: Blocks | None = None
    """The examples of a packed row; None where rows are padded."""

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of the model's forward pass."""
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        if self.attention_mask is None:
            return {**inputs, "blocks": self.blocks}
        return {**inputs, "attention_mask": self.attention_mask}

    def spans(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Start and end of each example among all B * T positions, given the examples' numbers of tokens."""
        width = self.input_ids.shape[1]
        if self.attention_mask is None:
            ends = list(itertools.accumulate(lengths))
            return [(end - n, end) for n, end in zip(lengths, ends, strict=True)]
        return [((row + 1) * width - n, (row + 1) * width) for row, n in enumerate(lengths)]


def pad_left(
    rows: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device | str,
    labels: Sequence[Sequence[int]] | None = None,
) -> Minibatch:
    """Rows of token ids as one minibatch, padded on the left to the longest.

    Args:
        labels: as ``labels_of`` makes them, a row each; without them there are no ``targets``.
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    label_ids = torch.full_like(ids, IGNORE_INDEX)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
        if labels is not None:
            label_ids[i, width - len(row) :] = torch.tensor(labels[i], dtype=torch.long)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    targets, predicting = _supervised(label_ids, device) if labels is not None else (None, None)
    return Minibatch(send(ids, device), send(mask, device), send(positions, device), targets, predicting)


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor on a device. A copy from pinned memory to a GPU does not wait for the work that the GPU is at."""
    on_gpu = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)


def _supervised(labels: torch.Tensor, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """``targets`` and ``predicting`` of labels (B, T)."""
    positions = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    # The position before is of the same example, as an example's first token has no label.
    return send(labels.flatten()[positions], device), send(positions - 1, device)


def pack_rows(
    rows: Sequence[Sequence[int]],
    device: torch.device | str,
    labels: Sequence[Sequence[int]] | None = None,
    starts: Sequence[int] = (),
) -> Minibatch:
    """Rows of token ids packed into one (1, T), for a model whose attention runs in blocks (``model/attention.py``).

    Args:
        starts: the position of each row's first token, 0 by default: tokens of what the row stands behind.
    """
    lengths = tuple(len(row) for row in rows)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    blocks = Blocks(send(ends, device), max(lengths), lengths)

    def join(parts: Iterable[Iterable[int]]) -> torch.Tensor:
        return torch.tensor([list(itertools.chain.from_iterable(parts))], dtype=torch.long)

    first = starts or [0] * len(lengths)
    ids, positions = join(rows), join(range(a, a + n) for a, n in zip(first, lengths, strict=True))
    targets, predicting = _supervised(join(labels), device) if labels is not None else (None, None)
    return Minibatch(send(ids, device), None, send(positions, device), targets, predicting, blocks)


def collate(
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device,
    packed: bool,
) -> Minibatch:
    """Rows of token ids as one minibatch: a single row without padding, or rows padded on the left."""
    return pack_rows(rows, device, labels) if packed else pad_left(rows, pad_token_id, device, labels)
