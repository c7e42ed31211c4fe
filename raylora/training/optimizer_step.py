"""One optimizer step of an adapter, whose numbers are read once the next one is launched: nothing waits for a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from raylora.config.method import Method
from raylora.errors import TrainingDivergedError
from raylora.model.fetching import Fetched
from raylora.training.gradients import Observer, Step, StepGradient


class LaunchedStep:
    """An optimizer step whose loss and norm may still be on their way from a GPU to the CPU."""

    def __init__(
        self, k: int, gradient: StepGradient, norm: torch.Tensor, learning_rate: float, observer: Observer | None
    ) -> None:
        self._k, self._gradient, self._rate, self._observer = k, gradient, learning_rate, observer
        self._numbers = Fetched(torch.stack([gradient.loss, norm.to(gradient.loss.device, gradient.loss.dtype)]))

    def read(self) -> Step:
        """Wait for the step's numbers. Call it when the next step is launched: the GPU then has work meanwhile.

        Raises:
            TrainingDivergedError: the loss or the gradient became infinite or NaN; the parameters are ruined.
        """
        loss, norm = self._numbers.read().tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingDivergedError(f"the loss became {loss} at step {self._k + 1}: lower --learning-rate")
        gradient = self._gradient
        step = Step(self._k + 1, loss, norm, self._rate, gradient.num_tokens, gradient.num_supervised)
        if self._observer:
            self._observer.after_step(step)
        return step


def take_step(
    k: int,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    gradient: StepGradient,
    max_grad_norm: float,
    learning_rate: float | None = None,
    observer: Observer | None = None,
) -> LaunchedStep:
    """Optimizer step ``k``, from 0, with the gradient that is in the parameters: clip it, update, and reset it.

    Nothing here waits for a GPU.

    Args:
        gradient: the loss and the token counts of that gradient.
        learning_rate: by default the optimizer's own.

    Returns:
        What to read once the next step is launched: ``LaunchedStep.read`` says then whether the training diverged.
    """
    if observer:
        observer.before_clipping()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if learning_rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return LaunchedStep(k, gradient, norm, float(optimizer.param_groups[0]["lr"]), observer)


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], method: Method, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW, as ``method`` says."""
    return torch.optim.AdamW(
        parameters,
        lr=method.learning_rate,
        betas=(method.adam_beta1, method.adam_beta2),
        weight_decay=method.weight_decay,
        fused=device.type == "cuda",
    )
