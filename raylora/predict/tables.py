"""Tables of finished runs: checked by column name, and cut into what was known before training and what came out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from raylora.config import Method
from raylora.errors import UserError
from raylora.rows import PROBE_NAMES, STATIC_COLUMNS, STATIC_NAMES

Target = Literal["overall_accuracy", "accuracy_change"]
TARGETS: tuple[str, ...] = get_args(Target)
HYPERPARAMETERS = tuple(
    name for name, field in Method.model_fields.items() if field.annotation is int or field.annotation is float
)
"""Those that are numbers. The others are words: rows that differ in them cannot be told apart by a predictor."""
NAME_COLUMNS = ("dataset", "dataset_name", "experiment_id")
MIN_ROWS = 10
MAX_NUMBER = 1e30
"""Beyond it forests, which count in float32, and squares break down."""


def _groups() -> dict[str, tuple[str, ...]]:
    by_name: dict[str, list[str]] = {}
    for column in STATIC_COLUMNS:
        by_name.setdefault("text" if column.group == "size and text" else column.group, []).append(column.name)
    by_name["dynamic"] += PROBE_NAMES
    return {**{name: tuple(columns) for name, columns in by_name.items()}, "hyperparameters": HYPERPARAMETERS}


FEATURE_GROUPS = _groups()
"""Feature columns by what it takes to have them: reading text, a forward pass, a probe, nothing (hyperparameters)."""
GROUP_ALIASES = {"static": (*FEATURE_GROUPS["text"], *FEATURE_GROUPS["semantic"], *FEATURE_GROUPS["perplexity"])}
KNOWN_COLUMNS = (*STATIC_NAMES, *PROBE_NAMES, *HYPERPARAMETERS)
"""What is known before a training. Anything else (losses, seconds, scores) comes out of it, or names a row."""


@dataclass(frozen=True)
class Known:
    """What a table says about trainings: ``features`` (rows x columns, NaN where null), ``target``, ``groups``."""

    features: pd.DataFrame
    target: np.ndarray
    groups: np.ndarray | None
    """A number for each row: rows of one group never stand on both sides of a fold. None: each row is its own."""
    group_column: str | None
    names: list[str]
    notes: list[str]
    """What was left out, and why."""
    seconds: dict[str, float]
    """Mean seconds a dataset by ``text`` (part of ``static``), ``static`` and ``probe``, where the table has them."""
    base_models: list[str]


def known_from_table(
    table: pd.DataFrame, target: str, group: str | None = None, leave_out: Sequence[str] = (), place: str = "TABLE"
) -> Known:
    """What a table says about trainings that ended well, for a predictor to learn from.

    Args:
        group: column whose values are kept together in validation; ``none`` for no such column. Without one, rows of
            the same data are kept together where a table has several (a grid of hyperparameters).
        leave_out: feature groups (``text``, ``semantic``, ``perplexity``, ``dynamic``, ``static``,
            ``hyperparameters``) and columns that must not be used.

    Raises:
        UserError: a column is missing or holds no numbers, or too few rows are left.
    """
    notes: list[str] = []
    if target not in table:
        there = [name for name in TARGETS if name in table]
        fix = f"it has {there[0]}: --target {there[0]}" if there else _closest_column(target, table.columns)
        raise UserError(f"{place}: no column {target}; {fix}")
    good = table[numbers_of(table, [target], place)[target].notna()]
    if "status" in good:
        good = good[good["status"] == "ok"]
    if left_out := len(table) - len(good):
        notes.append(f"{left_out} of {len(table)} rows are left out: they failed, or have no {target}")
    if len(good) < MIN_ROWS:
        raise UserError(f"{place}: {len(good)} good rows with {target}; a predictor needs {MIN_ROWS} at least")
    features = _features_of(good, set(columns_left_out(leave_out)), place, notes)
    group_column, groups = _groups_of(good, group, place, notes)
    outcome = numbers_of(good, [target], place)[target]
    _check_shares(outcome, target, place)
    seconds = {
        kind: float(pd.to_numeric(good[f"{kind}_seconds"], errors="coerce").mean())
        for kind in ("text", "static", "probe")
        if f"{kind}_seconds" in good and good[f"{kind}_seconds"].notna().any()
    }
    models = sorted({str(v) for v in good["model"].dropna()}) if "model" in good else []
    if len(models) > 1:
        notes.append(f"rows of {len(models)} base models are mixed ({', '.join(models)}): outcomes may not compare")
    return Known(features, outcome.to_numpy(), groups, group_column, names_of(good), notes, seconds, models)


def _check_shares(outcome: pd.Series, target: str, place: str) -> None:
    """Raises UserError where an outcome cannot be: in percent, most of the time."""
    least = 0 if target == "overall_accuracy" else -1
    strange = ~outcome.between(least, 1)
    if strange.any():
        at = int(strange.to_numpy().argmax())
        raise UserError(
            f"{place}: column {target}, row {_row_number(outcome, at)}: {outcome.iloc[at]:g} is not between {least} "
            "and 1; give shares (0.45), not percent"
        )


def _row_number(table: pd.DataFrame | pd.Series, at: int) -> Any:
    """The row at a position as it stands in the table that it was taken from, from 1."""
    label = table.index[at]
    return int(label) + 1 if isinstance(label, int | np.integer) else at + 1


def _features_of(good: pd.DataFrame, left_out: set[str], place: str, notes: list[str]) -> pd.DataFrame:
    wanted = [name for name in KNOWN_COLUMNS if name in good and name not in left_out]
    features = numbers_of(good, wanted, place)
    empty = [name for name in wanted if features[name].isna().all()]
    constant = [name for name in wanted if name not in empty and features[name].nunique() == 1]
    if empty:
        notes.append(f"null in every row, and not used: {', '.join(empty)}")
    if constant:
        notes.append(f"the same in every row, and not used: {', '.join(constant)}")
    features = features.drop(columns=[*empty, *constant])
    if features.columns.empty:
        raise UserError(f"{place}: no feature column is left that differs between rows (see --describe of features)")
    words = [k for k in Method.model_fields if k not in HYPERPARAMETERS and k in good and good[k].nunique() > 1]
    if words:
        notes.append(f"rows differ in {', '.join(words)}, which no predictor here can use")
    return features


def _groups_of(
    good: pd.DataFrame, group: str | None, place: str, notes: list[str]
) -> tuple[str | None, np.ndarray | None]:
    """The column whose rows stay together, and a number for each row."""
    if group == "none":
        return None, None
    if group is None:
        repeated = [
            name for name in ("data_hash", *NAME_COLUMNS[:2]) if name in good and good[name].dropna().duplicated().any()
        ]
        if not repeated:
            return None, None
        group = repeated[0]
        notes.append(f"rows with the same {group} are kept together in validation (--group none: they are not)")
    if group not in good:
        raise UserError(f"--group {group}: {place} has no such column; {_closest_column(group, good.columns)}")
    codes, found = pd.factorize(good[group])
    unnamed = codes == -1  # each a group of its own: nothing says that they belong together
    codes[unnamed] = len(found) + np.arange(unnamed.sum())
    num_groups = len(np.unique(codes))
    if num_groups < 3:
        raise UserError(
            f"--group {group}: {num_groups} groups in {place}; validation needs 3 at least (or --group none)"
        )
    return group, codes


def columns_left_out(leave_out: Sequence[str]) -> list[str]:
    """The columns that words of ``--leave-out`` stand for.

    Raises:
        UserError: a word is neither a group nor a column.
    """
    choices = {**FEATURE_GROUPS, **GROUP_ALIASES, **{name: (name,) for name in KNOWN_COLUMNS}}
    for word in leave_out:
        if word not in choices:
            groups = ", ".join((*FEATURE_GROUPS, *GROUP_ALIASES))
            raise UserError(
                f"--leave-out {word}: no such group or column; {_closest_column(word, choices)} (groups: {groups})"
            )
    return [column for word in leave_out for column in choices[word]]


def numbers_of(table: pd.DataFrame, columns: Sequence[str], place: str) -> pd.DataFrame:
    """These columns as floats; null and infinite values as NaN.

    Raises:
        UserError: a column is not there, or holds what is no number; the line names it, and its first such row.
    """
    missing = [name for name in columns if name not in table]
    if missing:
        raise UserError(f"{place}: {len(missing)} columns are missing: {', '.join(missing)}")
    found = {}
    for name in columns:
        values = pd.to_numeric(table[name], errors="coerce").astype("float64")
        bad = values.isna() & table[name].notna()
        if bad.any():
            at = int(bad.to_numpy().argmax())
            shown = f"{place}: column {name}, row {_row_number(table, at)}: {str(table[name].iloc[at])[:40]!r}"
            raise UserError(f"{shown} is no number")
        huge = values.abs().gt(MAX_NUMBER) & np.isfinite(values)
        if huge.any():
            at = int(huge.to_numpy().argmax())
            raise UserError(f"{place}: column {name}, row {_row_number(table, at)}: {values.iloc[at]:g} is too large")
        found[name] = values
    return pd.DataFrame(found, index=table.index).replace([np.inf, -np.inf], np.nan)


def names_of(table: pd.DataFrame) -> list[str]:
    """What rows are called: the dataset, or the experiment where datasets repeat, or a number."""
    named = [name for name in NAME_COLUMNS if name in table]
    unique = [name for name in named if not table[name].duplicated().any()] or named
    return [str(v) for v in table[unique[0]]] if unique else [f"row {i + 1}" for i in range(len(table))]


def group_of(column: str) -> str:
    return next(group for group, columns in FEATURE_GROUPS.items() if column in columns)


def needs_probe(columns: Iterable[str]) -> bool:
    """Whether one of these columns is only known after a probe."""
    return not set(PROBE_NAMES).isdisjoint(columns)


def _closest_column(name: str, there: Iterable[Any]) -> str:
    names = [str(column) for column in there]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    shown = [n for n in names if re.fullmatch(r"\w{1,40}", n)][:8]
    return f"its columns are {', '.join(shown)}{', ...' if len(names) > len(shown) else ''}"
