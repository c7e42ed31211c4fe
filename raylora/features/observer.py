"""What a probe sees of its steps: losses, gradient norms and sparsities, and how much the gradients agree.

A few numbers a step and running sums are kept, no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from raylora.training.gradients import Step

SPARSE_GRADIENT_BELOW = 0.01
"""A gradient entry counts as sparse below this share of its tensor's root mean square."""


class ProbeObserver:
    """Losses, norms and sparsities of the steps, and the running sum of the micro-batches' unit gradients."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.sparsities: list[float] = []
        self._sum = [torch.zeros_like(p) for p in parameters]
        self._num_units = 0
        self._step_sum = [torch.zeros_like(p) for p in parameters]
        self._num_step_units = 0

    def begin_step(self) -> None:
        for total in self._step_sum:
            total.zero_()
        self._num_step_units = 0

    def after_micro_batch(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = global_norm(gradients)
        if norm > 0 and math.isfinite(norm):
            for total, p in zip(self._step_sum, self.parameters, strict=True):
                if p.grad is not None:
                    total.add_(p.grad, alpha=1 / norm)
            self._num_step_units += 1

    def before_clipping(self) -> None:
        for total, of_step in zip(self._sum, self._step_sum, strict=True):
            total += of_step
        self._num_units += self._num_step_units
        sparsity = gradient_sparsity([p.grad for p in self.parameters if p.grad is not None])
        if sparsity is not None:
            self.sparsities.append(sparsity)

    def after_step(self, step: Step) -> None:
        self.losses.append(step.loss)
        self.grad_norms.append(step.grad_norm)

    def gradient_consistency(self) -> float | None:
        """Mean pairwise cosine of the n unit gradients: the squared length of their sum is n plus all the cosines."""
        n = self._num_units
        return float((global_norm(self._sum) ** 2 - n) / (n * (n - 1))) if n > 1 else None

    def features(self) -> dict[str, float | None]:
        """By column name; None where there was too little to see."""
        return {
            "loss_stability": loss_stability(self.losses),
            "avg_grad_norm": float(np.mean(self.grad_norms)) if self.grad_norms else None,
            "gradient_consistency": self.gradient_consistency(),
            "avg_grad_sparsity": float(np.mean(self.sparsities)) if self.sparsities else None,
        }


def global_norm(tensors: Sequence[torch.Tensor]) -> float:
    """L2 norm of all entries together, summed in double precision; a GPU is waited for once."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return float(torch.linalg.vector_norm(_in_a_row(norms))) if norms else 0.0


def _in_a_row(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of one number each, of whatever devices, as one (N,)."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


def gradient_sparsity(gradients: Sequence[torch.Tensor]) -> float | None:
    """Share of entries below 1% of their tensor's root mean square; tensors that are exactly zero are left out."""
    if not gradients:
        return None
    rms = [torch.linalg.vector_norm(g, dtype=torch.float32) / math.sqrt(g.numel()) for g in gradients]
    num_sparse = _in_a_row([(g.abs() < SPARSE_GRADIENT_BELOW * r).sum() for g, r in zip(gradients, rms, strict=True)])
    counted = _in_a_row(rms) > 0
    num_all = (counted * torch.tensor([g.numel() for g in gradients], device=counted.device)).sum()
    return float((num_sparse * counted).sum() / num_all) if num_all else None


def loss_stability(losses: Sequence[float]) -> float | None:
    """1 / (1 + standard deviation of the losses around their straight line); None for fewer than three."""
    if len(losses) < 3:
        return None
    steps = np.arange(len(losses))
    residuals = np.asarray(losses) - np.polyval(np.polyfit(steps, losses, 1), steps)
    return float(1 / (1 + residuals.std()))
