"""The stage ``transfer``: an adapter's losses on the held-out examples of every dataset of the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raylora.experiment.held_out import held_out_sets, losses_of, read_columns, read_parquet
from raylora.experiment.workbench import Workbench
from raylora.mmlu.paired import ALPHA, false_discovery, mean_change
from raylora.model.adapter_files import adapter_hash
from raylora.records import Experiment, ProgressCallback, ProgressStage, digest
from raylora.rows import CELL_VALUES
from raylora.storage.atomic import write_atomically
from raylora.storage.digests import write_parquet
from raylora.training.losses import ExampleLoss

SAME_LOSS = 1e-6
"""Nats a token. Differences below it are float32 noise: all there is of an adapter that changes nothing."""


def measure_transfer(bench: Workbench, experiment: Experiment, progress: ProgressCallback) -> dict[str, Any]:
    """Measure what is not measured yet, and store it piece by piece: a killed stage resumes where it stopped.

    Returns:
        The row's columns: ``transfer_values``, and ``num_held_out_examples``.

    Raises:
        MachineError: this machine cannot read which datasets there are.
        torch.OutOfMemoryError: a single example does not fit with the adapter.
    """
    columns = read_columns(bench.store, experiment.transfer_key)
    progress(ProgressStage.TRANSFER, 0, len(columns))
    sets, reasons = held_out_sets(bench, columns)
    bench.store.forget_stage(experiment, "transfer")
    folder, path = bench.store.adapter_folder(experiment), bench.store.cells_path(experiment.experiment_id)
    weights = adapter_hash(folder)
    keys = {column.name: digest([column.key, weights], 32) for column in columns if column.name in sets}
    own = next((column.name for column in columns if column.path == experiment.path), "")
    done = _read_cells(path, keys)
    bench.loaded.attach_saved(folder)
    try:
        for names in _pieces(bench, {name: table for name, table in sets.items() if name not in done}):
            losses = iter(losses_of(bench, [sets[name] for name in names]))
            for name in names:
                part = [next(losses) for _ in range(len(sets[name]))]
                done[name] = {"key": keys[name], "on_dataset": name, "is_own": name == own, **cell_of(sets[name], part)}
            _write_cells(path, done)
            progress(ProgressStage.TRANSFER, len(done), len(columns))
    finally:
        bench.loaded.detach()
    _write_cells(path, done)
    return _values(own, sets, reasons, done)


def _write_cells(path: Path, cells: Mapping[str, Mapping[str, Any]]) -> None:
    table = pd.DataFrame(list(cells.values()), columns=["key", "on_dataset", *CELL_VALUES])
    write_atomically(path, lambda partial: write_parquet(table, partial))


def _read_cells(path: Path, keys: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By dataset, what was measured of this adapter on the same examples before."""
    table = read_parquet(path)
    if table is None:
        return {}
    cells = table.astype(object).where(table.notna(), None).to_dict("records")
    return {
        str(c["on_dataset"]): {str(k): v for k, v in c.items()} for c in cells if keys.get(c["on_dataset"]) == c["key"]
    }


def _pieces(bench: Workbench, sets: Mapping[str, pd.DataFrame]) -> Iterator[list[str]]:
    """Names of datasets that are measured together: as many as fill a pass, so that small ones do not take one each.

    LLM.int8's losses depend on what shares their batch: there each has its own, as for the base.
    """
    piece: list[str] = []
    num_tokens = 0
    for name, table in sets.items():
        piece.append(name)
        num_tokens += sum(map(len, table["input_ids"]))
        if num_tokens >= bench.loaded.feature_token_budget or bench.config.int8_activations:
            yield piece
            piece, num_tokens = [], 0
    if piece:
        yield piece


def cell_of(held_out: pd.DataFrame, losses: Sequence[ExampleLoss]) -> dict[str, Any]:
    """What an adapter does to a dataset's held-out examples.

    A loss is the mean over an example's supervised tokens, and of these the mean over its conversation's examples. A
    conversation counts once, however long: that is what was drawn, so the interval, the paired t-test's, is over
    conversations.

    Args:
        held_out: a table of ``held_out_sets``.
        losses: the adapter's, of its rows.

    Returns:
        ``num_examples`` and ``num_tokens`` (those with a supervised token, and these); ``base_loss``, ``loss``,
        ``loss_change`` (adapter - base), ``low`` and ``high`` (its 95% interval), in nats per token; ``p_value``. None
        where there is nothing to measure, or a loss is not finite; no interval for one conversation.
    """
    table = held_out.assign(loss=[loss.total for loss in losses])[held_out["num_supervised"] > 0]
    means = table[["base_loss", "loss"]].div(table["num_supervised"], axis=0).groupby(table["conversation"]).mean()
    differences = (means["loss"] - means["base_loss"]).to_numpy()
    differences = np.where(np.isfinite(differences), differences, np.nan)
    change, low, high, p_value = mean_change(np.where(np.abs(differences) < SAME_LOSS, 0, differences), math.inf)
    measured = (means["base_loss"].mean(), means["loss"].mean(), change, low, high, p_value)
    counts = (len(table), int(table["num_supervised"].sum()))
    return dict(zip(CELL_VALUES[1:], (*counts, *map(_finite, measured)), strict=True))


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _values(
    own: str,
    sets: Mapping[str, pd.DataFrame],
    reasons: Mapping[str, str],
    cells: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    notes = [] if len(sets.get(own, ())) else ["nothing of the dataset is left out: it is one conversation"]
    notes = [] if own in reasons else notes
    notes += [f"{name}: not measured: {reason}" for name, reason in list(reasons.items())[:3]]
    notes += [f"and {len(reasons) - 3} more"] if len(reasons) > 3 else []
    return {
        "num_held_out_examples": len(sets[own]) if own in sets else None,
        "transfer_note": "; ".join(notes),
        **transfer_values(cells, own),
    }


def transfer_values(cells: Mapping[str, Mapping[str, Any]], own: str) -> dict[str, Any]:
    """The row's columns: its own dataset's cell, the mean change of the others, how many became significantly worse.

    Significantly: the p-value is below 5% by the false-discovery rate over the adapter's other datasets, as those of
    the table are over all cells.

    Args:
        cells: of ``cell_of``, by dataset.
        own: the adapter's dataset.
    """
    others = [c for name, c in cells.items() if name != own and c["loss_change"] is not None]
    changes = np.array([c["loss_change"] for c in others])
    adjusted = false_discovery([math.nan if c["p_value"] is None else c["p_value"] for c in others])
    mine = cells.get(own, {})
    return {
        "held_out_loss": mine.get("loss"),
        "base_held_out_loss": mine.get("base_loss"),
        "held_out_loss_change": mine.get("loss_change"),
        "transfer_mean_change": float(changes.mean()) if others else None,
        "num_forgotten": int(((adjusted < ALPHA) & (changes > 0)).sum()) if others else None,
    }
