"""A method, examples, and the gradient of one step over them."""

from __future__ import annotations

import pytest
import torch

from raylora.config.method import Method
from raylora.records import Example, Message
from raylora.training.gradients import GradientAccumulator, Job

METHOD = Method(lora_r=8, lora_dropout=0, batch_size=4, gradient_accumulation=2, learning_rate=1e-2, max_grad_norm=1.0)
DROPOUT = METHOD.model_copy(update={"lora_dropout": 0.1})


def make_examples(num: int = 12) -> list[Example]:
    return [
        Example((Message("system", "Be brief."), Message("user", f"What of {i}? " + "so " * i)), f"It is {i * i}.", "q")
        for i in range(num)
    ]


def gradient_of(loaded, encoded, method, packed, budget=10**6):
    """Gradient of one step over all examples, from an adapter that is not zero."""
    parameters = loaded.attach(method, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn_like(p) * 0.1)
    step = GradientAccumulator(loaded, [Job(parameters, encoded, method, 0)], None)
    assert step.packed
    step.packed, step.budget.tokens = packed, budget
    loaded.model.train()
    try:
        with step.ready():
            found = step.backward({0: (0, range(len(encoded)))})[0]
        return float(found.loss), [p.grad.clone() for p in parameters], step.fullest
    finally:
        step.restore()
        loaded.detach()


def assert_packed_agrees(loaded, encoded, of_loss: float, of_gradient: float) -> None:
    """One step packed and padded: the loss and the whole gradient, each within its relative tolerance."""
    loss, gradients, _ = gradient_of(loaded, encoded, DROPOUT, packed=True)
    expected, padded, _ = gradient_of(loaded, encoded, DROPOUT, packed=False)
    assert loss == pytest.approx(expected, rel=of_loss)
    ours, theirs = (torch.cat([g.flatten() for g in gs]) for gs in (gradients, padded))
    assert float((ours - theirs).norm() / theirs.norm()) < of_gradient


class Recorder:
    """An ``Observer`` that keeps the gradient of each micro-batch, all parameters in one tensor."""

    def __init__(self, loaded) -> None:
        self.loaded = loaded
        self.gradients: list[torch.Tensor] = []

    def begin_step(self) -> None: ...

    def after_micro_batch(self) -> None:
        found = [p.grad for p in self.loaded.model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat([g.flatten() for g in found]).clone())

    def before_clipping(self) -> None: ...

    def after_step(self, step) -> None: ...
