"""Tables of finished runs, checked by column name and split into features (known before training) and the outcome."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from raylora.config.method import Method
from raylora.config.run import TARGETS
from raylora.errors import UserError
from raylora.rows import PROBE_NAMES, STATIC_COLUMNS, STATIC_NAMES, name_of_first

HYPERPARAMETERS = tuple(
    name
    for name, field in Method.model_fields.items()
    if name != "seed" and (field.annotation is int or field.annotation is float)
)
"""The numeric ones. The others (``lr_scheduler``, ``train_on`` and such) are words, which no model here can use."""
NAME_COLUMNS = ("dataset", "dataset_name", "experiment_id")
MIN_ROWS = 10
ENOUGH_ROWS = 35
"""From about here on a signal as large as the noise is found in half of the tables (docs/prediction.md)."""
MIN_SPREAD = 1e-9
"""Outcomes that differ by less differ by rounding only: a question of MMLU's 14,042 is 7e-5."""
MAX_NUMBER = 1e30
"""A larger value is an error: forests compute in float32 (3.4e38 at most), and sums of squares break down too."""


def _feature_groups() -> dict[str, tuple[str, ...]]:
    by_name: dict[str, list[str]] = {}
    for column in STATIC_COLUMNS:
        by_name.setdefault("text" if column.group == "size and text" else column.group, []).append(column.name)
    by_name["dynamic"] += PROBE_NAMES
    return {**{name: tuple(columns) for name, columns in by_name.items()}, "hyperparameters": HYPERPARAMETERS}


FEATURE_GROUPS = _feature_groups()
"""Feature columns by what they cost: reading the text, a forward pass, a probe, nothing (hyperparameters)."""
GROUP_ALIASES = {"static": (*FEATURE_GROUPS["text"], *FEATURE_GROUPS["semantic"], *FEATURE_GROUPS["perplexity"])}
KNOWN_COLUMNS = (*STATIC_NAMES, *PROBE_NAMES, *HYPERPARAMETERS)
"""What is known before a training: the only columns used as features. Others (losses, seconds, scores) come out of the
training, so that a predictor that reads them would leak, or they name a row."""


@dataclass(frozen=True)
class TrainingTable:
    """The n good rows of a table, for a predictor to be fitted on."""

    features: pd.DataFrame
    """(n, columns), floats; NaN where null."""
    target: np.ndarray
    """(n,): the measured outcome."""
    groups: np.ndarray | None
    """(n,): each row's group, as a number; a fold never splits a group. None: rows are independent."""
    group_column: str | None
    names: list[str]
    """What each row is called."""
    notes: list[str]
    """What was left out, and why; for the user."""
    seconds: dict[str, float]
    """Mean seconds a dataset of ``text`` (part of ``static``), ``static`` and ``probe``, where the table has them."""
    base_models: list[str]


def known_from_table(
    table: pd.DataFrame, target: str, group: str | None = None, leave_out: Sequence[str] = (), place: str = "TABLE"
) -> TrainingTable:
    """The rows of a table that ended well, with their features and outcome.

    Args:
        target: the column of the outcome, one of ``TARGETS``, or that of a further set of questions, such as
            ``accuracy_change[arc]``.
        group: column whose equal values stay in one fold; ``none``: rows are independent. Without one, rows of the
            same data stay together where a table has several (a grid of hyperparameters).
        leave_out: feature groups (``text``, ``semantic``, ``perplexity``, ``dynamic``, ``static``,
            ``hyperparameters``) and columns that must not be used.
        place: the table's name in error messages.

    Raises:
        UserError: a column is missing or holds no numbers, an outcome is no share, all outcomes are equal,
            or fewer than ``MIN_ROWS`` rows, three groups or one feature are left.
    """
    notes: list[str] = []
    if target not in table:
        targets = [name for name in TARGETS if name in table]
        fix = f"it has {targets[0]}: --target {targets[0]}" if targets else _closest_column(target, table.columns)
        raise UserError(f"{place}: no column {target}; {fix}")
    good = table[numbers_of(table, [target], place)[target].notna()]
    if "status" in good:
        good = good[good["status"] == "ok"]
    if num_left_out := len(table) - len(good):
        notes.append(f"{num_left_out} of {len(table)} rows are left out: they failed, or have no {target}")
    if len(good) < MIN_ROWS:
        raise UserError(f"{place}: {len(good)} good rows with {target}; a predictor needs {MIN_ROWS} at least")
    features = _features_of(good, set(columns_left_out(leave_out)), place, notes)
    group_column, groups = _validation_groups(good, group, place, notes)
    outcome = numbers_of(good, [target], place)[target]
    _check_shares(outcome, target, place)
    _check_spread(outcome, target, place)
    seconds = {
        kind: float(pd.to_numeric(good[f"{kind}_seconds"], errors="coerce").mean())
        for kind in ("text", "static", "probe")
        if f"{kind}_seconds" in good and good[f"{kind}_seconds"].notna().any()
    }
    num_units, units = (len(good), "rows") if groups is None else (len(np.unique(groups)), "groups")
    if num_units < ENOUGH_ROWS:
        notes.append(
            f"{num_units} {units} are few: a signal as large as the noise is found in half of the tables of "
            f"{ENOUGH_ROWS} {units}, and in fewer of smaller ones"
        )
    models = sorted({str(v) for v in good["model"].dropna()}) if "model" in good else []
    if len(models) > 1:
        notes.append(f"rows of {len(models)} base models are mixed ({', '.join(models)}): outcomes may not compare")
    return TrainingTable(features, outcome.to_numpy(), groups, group_column, names_of(good), notes, seconds, models)


def _check_shares(outcome: pd.Series, target: str, place: str) -> None:
    """Raise UserError where an outcome is out of range: most often it is in percent."""
    minimum = 0 if name_of_first(target) == "overall_accuracy" else -1
    is_bad = ~outcome.between(minimum, 1)
    if is_bad.any():
        at = int(is_bad.to_numpy().argmax())
        raise UserError(
            f"{place}: column {target}, row {_row_number(outcome, at)}: {outcome.iloc[at]:g} is not between {minimum} "
            "and 1; give shares (0.45), not percent"
        )


def _check_spread(outcome: pd.Series, target: str, place: str) -> None:
    """Raise UserError where all outcomes are equal: intervals would have no width, and a ranking no meaning."""
    if outcome.max() - outcome.min() <= MIN_SPREAD:
        raise UserError(
            f"{place}: column {target} is {outcome.iloc[0]:.6g} in all {len(outcome)} good rows: there is nothing to "
            "predict; it needs runs that differ"
        )


def _row_number(table: pd.DataFrame | pd.Series, at: int) -> Any:
    """The number, from 1, that the row at position ``at`` has in the user's table, before rows were left out."""
    label = table.index[at]
    return int(label) + 1 if isinstance(label, int | np.integer) else at + 1


def _features_of(good: pd.DataFrame, left_out: set[str], place: str, notes: list[str]) -> pd.DataFrame:
    """The feature columns that differ between rows; ``notes`` gains a line for each kind of column that is not used."""
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
    words = [
        k for k in Method.model_fields if k not in {*HYPERPARAMETERS, "seed"} and k in good and good[k].nunique() > 1
    ]
    if words:
        notes.append(f"rows differ in {', '.join(words)}, which no predictor here can use")
    return features


def _validation_groups(
    good: pd.DataFrame, group: str | None, place: str, notes: list[str]
) -> tuple[str | None, np.ndarray | None]:
    """The column whose equal values stay in one fold, and each row's group as a number, (n,)."""
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
    codes, names = pd.factorize(good[group])
    is_null = codes == -1  # a row without a name is a group by itself: nothing says that two of them are of one dataset
    codes[is_null] = len(names) + np.arange(is_null.sum())
    num_groups = len(np.unique(codes))
    if num_groups < 3:  # with two, a fold's other rows are one group, which the inner cross-validation cannot split
        raise UserError(
            f"--group {group}: {num_groups} groups in {place}; validation needs 3 at least (or --group none)"
        )
    return group, codes


def columns_left_out(leave_out: Sequence[str]) -> list[str]:
    """The columns named by ``--leave-out``, whose words are feature groups or columns.

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
    """These columns as floats, with the table's index; null and infinite values are NaN.

    Args:
        place: the table's name in error messages.

    Raises:
        UserError: a column is missing, or holds what is no number or is beyond ``MAX_NUMBER``; the message names the
            column and its first such row.
    """
    missing = [name for name in columns if name not in table]
    if missing:
        raise UserError(f"{place}: {len(missing)} columns are missing: {', '.join(missing)}")
    numbers = {}
    for name in columns:
        values = pd.to_numeric(table[name], errors="coerce").astype("float64")
        is_no_number = values.isna() & table[name].notna()
        if is_no_number.any():
            at = int(is_no_number.to_numpy().argmax())
            cell = f"{place}: column {name}, row {_row_number(table, at)}: {str(table[name].iloc[at])[:40]!r}"
            raise UserError(f"{cell} is no number")
        is_huge = values.abs().gt(MAX_NUMBER) & np.isfinite(values)
        if is_huge.any():
            at = int(is_huge.to_numpy().argmax())
            raise UserError(f"{place}: column {name}, row {_row_number(table, at)}: {values.iloc[at]:g} is too large")
        numbers[name] = values
    return pd.DataFrame(numbers, index=table.index).replace([np.inf, -np.inf], np.nan)


def names_of(table: pd.DataFrame) -> list[str]:
    """What rows are called: the dataset, or the experiment where datasets repeat, or a number."""
    present = [name for name in NAME_COLUMNS if name in table]
    columns = [name for name in present if not table[name].duplicated().any()] or present
    return [str(name) for name in table[columns[0]]] if columns else [f"row {i + 1}" for i in range(len(table))]


def group_of(column: str) -> str:
    """The feature group of a column of ``KNOWN_COLUMNS``."""
    return next(group for group, columns in FEATURE_GROUPS.items() if column in columns)


def needs_probe(columns: Iterable[str]) -> bool:
    """Whether one of these columns is measured by a probe."""
    return not set(PROBE_NAMES).isdisjoint(columns)


def _closest_column(name: str, columns: Iterable[Any]) -> str:
    """The end of an error message about a missing column: a name like it, or the columns that there are."""
    names = [str(column) for column in columns]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    shown = [n for n in names if re.fullmatch(r"\w{1,40}", n)][:8]
    return f"its columns are {', '.join(shown)}{', ...' if len(names) > len(shown) else ''}"
