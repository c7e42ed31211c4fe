"""Measures the steps of a probe: losses, gradient norms and sparsities, and how much the gradients agree.

It keeps a few numbers a step and two running sums of gradients, but no step's gradient itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from raylora.training.gradients import Step

SPARSE_GRADIENT_BELOW = 0.01
"""A gradient's entry counts as sparse if its absolute value is below this share of its tensor's root mean square."""


class ProbeObserver:
    """The training loop's ``Observer`` of a probe.

    ``losses``, ``grad_norms`` and ``sparsities`` have a number a step. Of the micro-batches' gradients, each divided by
    its norm, only the sum is kept: their mean pairwise cosine follows from it.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.sparsities: list[float] = []
        self._sum = [torch.zeros_like(p) for p in parameters]
        self._num_units = 0
        # The current step's own sum, so that nothing is counted twice where memory runs out and the step begins again.
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
        for total, step_total in zip(self._sum, self._step_sum, strict=True):
            total += step_total
        self._num_units += self._num_step_units
        sparsity = gradient_sparsity([p.grad for p in self.parameters if p.grad is not None])
        if sparsity is not None:
            self.sparsities.append(sparsity)

    def after_step(self, step: Step) -> None:
        self.losses.append(step.loss)
        self.grad_norms.append(step.grad_norm)

    def gradient_consistency(self) -> float | None:
        """Mean cosine of all pairs of the n micro-batches' gradients; None for n below 2.

        The squared length of the n unit vectors' sum is n plus the cosines of all n (n - 1) ordered pairs.
        """
        n = self._num_units
        return float((global_norm(self._sum) ** 2 - n) / (n * (n - 1))) if n > 1 else None

    def features(self) -> dict[str, float | None]:
        """The features by column name; None where there were too few steps or no gradient to measure."""
        return {
            "loss_stability": loss_stability(self.losses),
            "avg_grad_norm": float(np.mean(self.grad_norms)) if self.grad_norms else None,
            "gradient_consistency": self.gradient_consistency(),
            "avg_grad_sparsity": float(np.mean(self.sparsities)) if self.sparsities else None,
        }


def global_norm(tensors: Sequence[torch.Tensor]) -> float:
    """L2 norm of all entries of all tensors, summed in float64. The CPU waits for a GPU once, not once a tensor."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return float(torch.linalg.vector_norm(_stack_scalars(norms))) if norms else 0.0


def _stack_scalars(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """N tensors of one number each, which may be on different devices, as one of shape (N,)."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


def gradient_sparsity(gradients: Sequence[torch.Tensor]) -> float | None:
    """Share of entries below 1% of their tensor's root mean square.

    Tensors that are all zero are left out: in a fresh adapter B is zero, and so A's gradient is. None where all are.
    """
    if not gradients:
        return None
    rms = [torch.linalg.vector_norm(g, dtype=torch.float32) / math.sqrt(g.numel()) for g in gradients]
    num_sparse = _stack_scalars(
        [(g.abs() < SPARSE_GRADIENT_BELOW * r).sum() for g, r in zip(gradients, rms, strict=True)]
    )
    is_counted = _stack_scalars(rms) > 0
    num_entries = (is_counted * torch.tensor([g.numel() for g in gradients], device=is_counted.device)).sum()
    return float((num_sparse * is_counted).sum() / num_entries) if num_entries else None


def loss_stability(losses: Sequence[float]) -> float | None:
    """1 / (1 + standard deviation of the losses around the line fitted to them); None for fewer than three."""
    if len(losses) < 3:
        return None
    steps = np.arange(len(losses))
    residuals = np.asarray(losses) - np.polyval(np.polyfit(steps, losses, 1), steps)
    return float(1 / (1 + residuals.std()))
