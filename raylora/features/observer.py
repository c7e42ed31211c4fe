"""Measures the steps of a probe: losses, gradient norms and sparsities, and how much the gradients agree.

It keeps a few numbers a step and two running sums of gradients, but no step's gradient itself. What it computes stays
on the GPU until a feature is asked for: the CPU waits for no step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from raylora.data.minibatch import send
from raylora.training.gradients import Step

SPARSE_GRADIENT_BELOW = 0.01
"""A gradient's entry counts as sparse if its absolute value is below this share of its tensor's root mean square."""


class ProbeObserver:
    """The training loop's ``Observer`` of a probe.

    ``losses``, ``grad_norms`` and ``sparsities`` have a number a step, the last of steps with a gradient only. Of the
    micro-batches' gradients, each divided by its norm, only the sum is kept: their mean pairwise cosine follows from
    it.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self._sparsities: list[torch.Tensor] = []
        self._sum = [torch.zeros_like(p) for p in parameters]
        self._num_units = torch.zeros((), dtype=torch.int64, device=parameters[0].device)
        # The current step's own sum, so that nothing is counted twice where memory runs out and the step begins again.
        self._step_sum = [torch.zeros_like(p) for p in parameters]
        self._num_step_units = torch.zeros_like(self._num_units)

    def begin_step(self) -> None:
        torch._foreach_zero_(self._step_sum)
        self._num_step_units.zero_()

    def after_micro_batch(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            return
        norm = norm_of(gradients)
        # Where it is infinite or NaN the training ends as diverged, one step later.
        scale = torch.where(norm > 0, 1 / norm, 0.0)
        totals = [t for t, p in zip(self._step_sum, self.parameters, strict=True) if p.grad is not None]
        torch._foreach_add_(totals, _scaled(gradients, scale))
        self._num_step_units += (norm > 0).to(self._num_step_units.device)

    def before_clipping(self) -> None:
        torch._foreach_add_(self._sum, self._step_sum)
        self._num_units += self._num_step_units
        if gradients := [p.grad for p in self.parameters if p.grad is not None]:
            self._sparsities.append(gradient_sparsity(gradients))

    def after_step(self, step: Step) -> None:
        self.losses.append(step.loss)
        self.grad_norms.append(step.grad_norm)

    @property
    def sparsities(self) -> list[float]:
        return [s for s in (torch.stack(self._sparsities).tolist() if self._sparsities else []) if not math.isnan(s)]

    def gradient_consistency(self) -> float | None:
        """Mean cosine of all pairs of the n micro-batches' gradients; None for n below 2.

        The squared length of the n unit vectors' sum is n plus the cosines of all n (n - 1) ordered pairs.
        """
        n = int(self._num_units)
        return float((global_norm(self._sum) ** 2 - n) / (n * (n - 1))) if n > 1 else None

    def features(self) -> dict[str, float | None]:
        """The features by column name; None where there were too few steps or no gradient to measure."""
        return {
            "loss_stability": loss_stability(self.losses),
            "avg_grad_norm": float(np.mean(self.grad_norms)) if self.grad_norms else None,
            "gradient_consistency": self.gradient_consistency(),
            "avg_grad_sparsity": float(np.mean(sparsities)) if (sparsities := self.sparsities) else None,
        }


def global_norm(tensors: Sequence[torch.Tensor]) -> float:
    """L2 norm of all entries of all tensors, summed in float64. The CPU waits for a GPU once, not once a tensor."""
    return float(norm_of(tensors)) if tensors else 0.0


def norm_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same of at least one tensor, on its device: a tensor of one float64."""
    return torch.linalg.vector_norm(_stack_scalars(torch._foreach_norm(list(tensors), 2, dtype=torch.float64)))


def _scaled(tensors: Sequence[torch.Tensor], scale: torch.Tensor) -> list[torch.Tensor]:
    """Tensors times one number; in one call where all are on its device."""
    scale = scale.to(tensors[0].dtype)
    if all(t.device == scale.device for t in tensors):
        return list(torch._foreach_mul(list(tensors), scale))
    return [t * scale.to(t.device) for t in tensors]


def _stack_scalars(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """N tensors of one number each, which may be on different devices, as one of shape (N,)."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


def gradient_sparsity(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Share of entries below 1% of their tensor's root mean square: a tensor of one float32, on their device.

    Tensors that are all zero are left out: in a fresh adapter B is zero, and so A's gradient is. NaN where all are.
    """
    rms = [torch.linalg.vector_norm(g, dtype=torch.float32) / math.sqrt(g.numel()) for g in gradients]
    num_sparse = _stack_scalars(
        [(g.abs() < SPARSE_GRADIENT_BELOW * r).sum() for g, r in zip(gradients, rms, strict=True)]
    )
    is_counted = _stack_scalars(rms) > 0
    num_entries = (is_counted * send(torch.tensor([g.numel() for g in gradients]), is_counted.device)).sum()
    return (num_sparse * is_counted).sum() / num_entries


def loss_stability(losses: Sequence[float]) -> float | None:
    """1 / (1 + standard deviation of the losses around the line fitted to them); None for fewer than three."""
    if len(losses) < 3:
        return None
    steps = np.arange(len(losses))
    residuals = np.asarray(losses) - np.polyval(np.polyfit(steps, losses, 1), steps)
    return float(1 / (1 + residuals.std()))
