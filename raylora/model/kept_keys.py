"""What rows of a packed pass attend to before their own tokens: prefixes of earlier passes, texts of the same one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


class KeptKeys:
    """Keys and values (1, heads, P, D) of the tokens of prefixes, P in all, of each of a model's attention modules.

    Args:
        capacity: at least P. Keys and values then lie in tensors of this length, the same ones for each new prefix, as
            captured passes need them; None: where the prefix's own pass put them.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self._of: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._is_new: set[int] = set()

    def begin(self) -> None:
        """Expect the keys of other prefixes."""
        self._is_new = set()

    def put(self, module: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a module's keys and values.

        Raises:
            ValueError: it has put some already: layers share the module.
        """
        if id(module) in self._is_new:
            raise ValueError("layers of this model share an attention module")
        self._is_new.add(id(module))
        if self.capacity is None:
            self._of[id(module)] = key, value
            return
        if id(module) not in self._of:
            shapes = ((*t.shape[:2], self.capacity, t.shape[3]) for t in (key, value))
            first, second = (key.new_zeros(shape) for shape in shapes)
            self._of[id(module)] = first, second
        for mine, new in zip(self._of[id(module)], (key, value), strict=True):
            mine[:, :, : new.shape[2]] = new

    def of(self, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A module's keys and values."""
        return self._of[id(module)]


@dataclass(frozen=True)
class Behind:
    """Which prefix each row of a packed pass stands behind: G prefixes, none empty, the rows of each side by side."""

    keys: KeptKeys
    prefix_ends: torch.Tensor
    """int32 (G + 1,): 0, then where each prefix ends among the tokens that are kept."""
    row_ends: torch.Tensor
    """int32 (G + 1,): 0, then where the rows behind each prefix end."""
    longest: int
    """Tokens that no prefix has more of."""
    longest_text: int
    """Tokens that no row has more of, its prefix counted with it."""
    prefixes: tuple[tuple[int, int], ...] | None
    """Start and end, among the tokens that are kept, of the prefix of each row; None where only the device knows it."""


@dataclass(frozen=True)
class Within:
    """Texts of a packed pass that others of it stand behind: R texts, then behind each the blocks of its branches."""

    start: int
    """Where the branches begin: tokens of all texts before them."""
    text_ends: torch.Tensor
    """int32 (R + 1,): 0, then where each text ends."""
    branch_ends: torch.Tensor
    """int32 (R + 1,): 0, then where the branches of each text end, counted from ``start``. A text may have none."""
    longest: int
    """Tokens that no text has more of."""
    longest_text: int
    """Tokens that no text has more of, its prefix and a branch counted with it."""
    spans: tuple[tuple[int, int, int, int], ...]
    """Of each text that has branches its start and end, and theirs, counted as in the tensors."""
