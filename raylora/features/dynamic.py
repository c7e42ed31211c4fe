"""Features of a probe: a few optimizer steps from a fresh adapter, which is then thrown away.

The steps are those of ``raylora.train``; an observer keeps a few numbers a step and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raylora.config import Method
from raylora.encoding import EncodedExample
from raylora.features.columns import PROBE_NAMES
from raylora.features.static import FeatureResult
from raylora.model import LoadedModel
from raylora.records import Progress, UserError, ignore_progress
from raylora.train import Step, example_losses, train_adapter

HELD_OUT_SHARE = 0.2
MAX_HELD_OUT = 32


class ProbeObserver:
    """Loss and gradient norm of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []

    def after_step(self, step: Step) -> None:
        self.losses.append(step.loss)
        self.grad_norms.append(step.grad_norm)


def run_probe(
    loaded: LoadedModel,
    sample: Sequence[EncodedExample],
    method: Method,
    probe_steps: int,
    seed: int,
    progress: Progress = ignore_progress,
) -> FeatureResult:
    """Train ``probe_steps`` steps on most of the sample and measure what it did to the rest.

    Args:
        sample: encoded examples in an order that does not depend on the file's; the first fifth, at most 32, is held
            out.

    Returns:
        The features of ``PROBE_NAMES``; null with a note where the probe cannot be run.
    """
    if probe_steps == 0:
        return _nothing("the probe is off (--probe-steps 0)")
    num_held_out = min(MAX_HELD_OUT, max(1, round(len(sample) * HELD_OUT_SHARE)))
    held_out, training = sample[:num_held_out], sample[num_held_out:]
    if not training:
        return _nothing("the probe needs two examples, one of them held out")
    observer = ProbeObserver()
    parameters = loaded.attach(method, seed, name="probe")
    try:
        before = example_losses(loaded, held_out, method.train_on)
        train_adapter(
            loaded,
            parameters,
            training,
            method,
            seed,
            num_steps=probe_steps,
            observer=observer,
            progress=lambda _, done, total: progress("probe", done, total),
        )
        after = example_losses(loaded, held_out, method.train_on)
    except UserError as error:
        return _nothing(str(error))
    finally:
        loaded.detach("probe")
    return _measure(before, after, observer)


def _measure(before: list[tuple[float, int]], after: list[tuple[float, int]], observer: ProbeObserver) -> FeatureResult:
    initial, final = _mean(before), _mean(after)
    values: dict[str, float | None] = {
        "perplexity_change_rate": _perplexity(after) / _perplexity(before) - 1 if any(c for _, c in before) else None,
        "initial_loss": initial,
        "loss_decay_rate": (initial - final) / initial if initial else None,
        "loss_stability": loss_stability(observer.losses),
        "avg_grad_norm": float(np.mean(observer.grad_norms)),
    }
    values = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
    reasons = {
        "loss_stability": "a trend needs three steps",
    }
    default = "the held-out examples have no supervised token"
    return FeatureResult(values, {k: reasons.get(k, default) for k, v in values.items() if v is None})


def _mean(losses: list[tuple[float, int]]) -> float:
    count = sum(c for _, c in losses)
    return sum(total for total, _ in losses) / count if count else math.nan


def _perplexity(losses: list[tuple[float, int]]) -> float:
    """Mean over examples of exp(mean token loss), as ``base_model_perplexity`` has it."""
    return float(np.mean([math.exp(min(total / count, 700)) for total, count in losses if count]))


def loss_stability(losses: Sequence[float]) -> float | None:
    """1 / (1 + standard deviation of the losses around their straight line); None for fewer than three."""
    if len(losses) < 3:
        return None
    steps = np.arange(len(losses))
    residuals = np.asarray(losses) - np.polyval(np.polyfit(steps, losses, 1), steps)
    return float(1 / (1 + residuals.std()))


def _nothing(reason: str) -> FeatureResult:
    return FeatureResult(dict.fromkeys(PROBE_NAMES), dict.fromkeys(PROBE_NAMES, reason))
