"""Encoded examples as tensors: rows padded on the left, or packed one after another."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raylora.data.encoding import IGNORE_INDEX


@dataclass(frozen=True)
class Minibatch:
    """Tensors of shape (B, T), padded on the left or packed.

    ``targets`` (N,) are the tokens that the loss looks at, example after example; ``predicting`` (N,) are the places
    before them among all B * T. They are found before anything is sent to a GPU, which need not be waited for.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    """None where the row is packed."""
    position_ids: torch.Tensor
    targets: torch.Tensor | None = None
    predicting: torch.Tensor | None = None
    block_lengths: tuple[int, ...] = ()
    """Tokens of each example of a packed row."""

    def model_inputs(self) -> dict[str, Any]:
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        if self.attention_mask is None:
            return {**inputs, "block_lengths": self.block_lengths}
        return {**inputs, "attention_mask": self.attention_mask}

    def spans(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Where each example, of these lengths, begins and ends among all B * T tokens in a row."""
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
    """Rows of token ids as one minibatch. Position ids count from each row's first real token."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    wanted = torch.full_like(ids, IGNORE_INDEX)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
        if labels is not None:
            wanted[i, width - len(row) :] = torch.tensor(labels[i], dtype=torch.long)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    targets, predicting = _supervised(wanted, device) if labels is not None else (None, None)
    return Minibatch(send(ids, device), send(mask, device), send(positions, device), targets, predicting)


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """To a device. From pinned memory a copy to a GPU does not wait for what the GPU is at."""
    on_gpu = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)


def _supervised(labels: torch.Tensor, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """``targets`` and ``predicting`` of a minibatch; nothing predicts an example's first token, which has no label."""
    places = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    return send(labels.flatten()[places], device), send(places - 1, device)


def pack_rows(
    rows: Sequence[Sequence[int]], device: torch.device | str, labels: Sequence[Sequence[int]] | None = None
) -> Minibatch:
    """Rows of token ids one after another in a single one, for a model whose attention runs in blocks."""
    lengths = tuple(len(row) for row in rows)

    def join(parts: Iterable[Iterable[int]]) -> torch.Tensor:
        return torch.tensor([list(itertools.chain.from_iterable(parts))], dtype=torch.long)

    ids, positions = join(rows), join(range(n) for n in lengths)
    targets, predicting = _supervised(join(labels), device) if labels is not None else (None, None)
    return Minibatch(send(ids, device), None, send(positions, device), targets, predicting, lengths)


def collate(
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device,
    packed: bool,
) -> Minibatch:
    """Rows of token ids as one minibatch: a single row without padding, or rows padded on the left."""
    return pack_rows(rows, device, labels) if packed else pad_left(rows, pad_token_id, device, labels)
