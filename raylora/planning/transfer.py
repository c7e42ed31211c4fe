"""What ``--transfer`` adds to a plan: which datasets every adapter is scored on, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raylora.config.run import Config, method_of
from raylora.data.held_out import LEFT_OUT_SHARE, MAX_LEFT_OUT, count_left_out
from raylora.experiment.held_out import Column
from raylora.planning.estimate import Estimator
from raylora.records import Experiment, digest


def left_out_key(config: Config) -> str:
    """Identity of the way in which trainings leave examples out."""
    return digest([LEFT_OUT_SHARE, MAX_LEFT_OUT, config.seed])


def with_transfer(
    experiments: Sequence[Experiment], config: Config, model_key: str, estimator: Estimator
) -> tuple[list[Experiment], tuple[Column, ...]]:
    """The experiments with their stage ``transfer``, and the datasets that it scores adapters on: those of the plan.

    All examples are measured with the run's own ``--train-on``, and as many tokens as its longest training takes,
    whatever else a grid trains with, so that losses of one dataset compare. What a row depends on has all datasets in
    it.

    Args:
        model_key: identity of the base, and how it is loaded.
    """
    by_path = {e.path: e for e in sorted(experiments, key=lambda e: (e.dataset, e.path)) if not e.error}
    columns = tuple(
        Column(
            e.dataset,
            e.path,
            e.data_hash,
            digest(
                [e.origins["train"]["data"], left_out_key(config), config.longest_example, config.train_on, model_key]
            ),
        )
        for e in by_path.values()
    )
    if not columns:
        return list(experiments), ()
    key = digest([(c.name, c.key) for c in columns])
    num_tokens = sum(count_left_out(e.num_examples) * e.num_tokens / e.num_examples for e in by_path.values())
    return [_with_stage(e, key, num_tokens, estimator) for e in experiments], columns


def _with_stage(experiment: Experiment, key: str, num_tokens: float, estimator: Estimator) -> Experiment:
    own, more = experiment, estimator.of_losses(method_of(experiment), num_tokens)
    seconds, peak = own.estimated_seconds, own.estimated_peak_memory_bytes
    return replace(
        own,
        identity=digest([own.identity, "transfer", key]),
        origins={**own.origins, "transfer": {**own.origins["train"], "datasets": key}},
        transfer_key=key,
        estimated_seconds=None if seconds is None or more.seconds is None else seconds + more.seconds,
        estimated_peak_memory_bytes=None if peak is None else max(peak, more.peak_memory_bytes or 0),
    )
