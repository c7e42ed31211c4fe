"""A fitted predictor: predictions with intervals, on disk and back without pickle.

The file is skops': weights as arrays and a list of types. Types that are not on our list are refused before anything
of the file is built, so that a predictor from elsewhere cannot run code.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sklearn
import skops.io

from raylora.errors import UserError
from raylora.predict.tables import numbers_of
from raylora.storage.atomic import write_atomically

FILE_NAME = "predictor.skops"
TRUSTED_TYPES = ["numpy.dtype", "sklearn.tree._tree.Tree", "sklearn.utils._bunch.Bunch"]
"""Beyond what skops trusts by itself (numpy arrays, scikit-learn's estimators). None of them runs code."""
FORMAT = 1
NEEDED = {
    "target", "columns", "ranges", "needs_probe", "coverage", "num_rows", "group_column", "num_groups", "scikit_learn",
    "kind", "kinds_of_folds", "num_folds", "coverage_by_level", "baselines", "rmse", "mae", "r2", "rank_correlation",
}  # fmt: skip
"""What is read of a card without a question whether it is there."""
MAX_BYTES = 2**31
"""A predictor's size unpacked: a file that grows beyond it is no predictor of ours (450 rows: 30 MB)."""


@dataclass(frozen=True)
class Predictor:
    """A model of all rows, and the models of the folds with their errors on rows that they had not seen."""

    card: dict[str, Any]
    """What it is, in plain values: ``target``, ``columns``, ``ranges``, ``coverage``, and how well it did."""
    model: Any
    fold_models: list[Any]
    fold_of: np.ndarray
    """The fold in which each row was held out."""
    residuals: np.ndarray
    """Measured minus predicted outcome of each row, by the model of its fold."""

    @property
    def columns(self) -> list[str]:
        return list(self.card["columns"])

    @property
    def notes(self) -> list[str]:
        """What to know before trusting it here."""
        made = self.card["scikit_learn"]
        if made == sklearn.__version__:
            return []
        return [
            f"the predictor was made with scikit-learn {made}, this is {sklearn.__version__}: fit it again to be sure"
        ]

    def features_of(self, table: pd.DataFrame, place: str = "TABLE") -> pd.DataFrame:
        """The columns it uses, as floats.

        Raises:
            UserError: one is missing, or holds what is no number. Null values are no error.
        """
        missing = [name for name in self.columns if name not in table]
        if missing:
            raise UserError(
                f"{place}: the predictor uses {len(missing)} columns that are not there: {', '.join(missing)}; "
                "measure them (python -m raylora.features), or fit one with --leave-out"
            )
        return numbers_of(table, self.columns, place)

    def unmeasured(self, table: pd.DataFrame, place: str = "TABLE") -> list[str]:
        """For each row the columns that are null there, and in no row that it was fitted on."""
        return self._unmeasured(self.features_of(table, place))

    def _unmeasured(self, features: pd.DataFrame) -> list[str]:
        needed = features.drop(columns=self.card.get("columns_with_nulls", []))
        return [", ".join(needed.columns[row]) for row in needed.isna().to_numpy()]

    def predict(self, table: pd.DataFrame, coverage: float | None = None, place: str = "TABLE") -> pd.DataFrame:
        """``prediction``, ``low``, ``high`` and ``outside``: the features beyond all values it was fitted on.

        All three are NaN where a feature was not measured that always was in the rows it was fitted on: what stood in
        its place would be made up.

        The interval is CV+ (Barber et al. 2021, "Predictive inference with the jackknife+"): split conformal whose
        calibration rows are those that each fold held out. With n rows and miss rate a, ``high`` is the
        ceil((1 - a)(n + 1))-th smallest of prediction(fold of row i) + |residual i|; ``low`` mirrors it.

        Raises:
            UserError: a column is missing, no row has all that is needed, or ``coverage`` needs more rows than it was
                fitted on.
        """
        features = self.features_of(table, place)
        unmeasured = self._unmeasured(features)
        if all(unmeasured):
            raise UserError(
                f"{place}: not measured in any row: {unmeasured[0]}" if len(unmeasured) else f"{place}: empty"
            )
        seen, outside = self._within_range(features)
        ends = cv_plus(self._by_fold(seen), self.fold_of, np.abs(self.residuals), coverage or self.card["coverage"])
        low, high = (self._possible(end) for end in ends)
        prediction = self._possible(self.model.predict(seen))
        # At low levels the folds' predictions may lie all on one side of the final model's: an interval holds its own.
        values = {"prediction": prediction, "low": np.minimum(low, prediction), "high": np.maximum(high, prediction)}
        found = pd.DataFrame(values, index=table.index)
        found[[bool(u) for u in unmeasured]] = np.nan
        return found.assign(
            outside=[f"not measured: {u}" if u else o for u, o in zip(unmeasured, outside, strict=True)]
        )

    def draw(self, table: pd.DataFrame, num_draws: int, seed: int, place: str = "TABLE") -> np.ndarray:
        """Possible outcomes, ``num_draws`` x rows: the model of one fold a draw, and an error of some held-out row.

        What the folds disagree on moves rows together; errors are drawn for each row by itself.
        """
        random = np.random.default_rng(seed)
        by_fold = self._by_fold(self._within_range(self.features_of(table, place))[0])
        drawn = by_fold[self.fold_of[random.integers(len(self.fold_of), size=num_draws)]]
        return self._possible(drawn + random.choice(self.residuals, size=drawn.shape))

    def _by_fold(self, seen: pd.DataFrame) -> np.ndarray:
        return np.stack([model.predict(seen) for model in self.fold_models])

    def _possible(self, values: np.ndarray) -> np.ndarray:
        """An accuracy is between 0 and 1, and its change between -1 and 1."""
        return np.clip(values, 0.0 if self.card["target"] == "overall_accuracy" else -1.0, 1.0)

    def _within_range(self, features: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
        """Values as near as those it was fitted on come (a line through the edge of them is a guess), and a note."""
        low, high = (pd.Series([self.card["ranges"][c][i] for c in self.columns], self.columns) for i in (0, 1))
        beyond = features.lt(low) | features.gt(high)
        notes = [", ".join(features.columns[row]) for row in beyond.to_numpy()]
        return features.clip(low, high, axis=1), notes

    def save(self, folder: Path) -> Path:
        """``predictor.skops`` in a folder."""
        content = {"format": FORMAT, **vars(self)}
        path = folder / FILE_NAME

        def write(partial: Path) -> None:
            skops.io.dump(content, partial, compression=zipfile.ZIP_DEFLATED, compresslevel=1)

        write_atomically(path, write)
        return path


def cv_plus(by_fold: np.ndarray, fold_of: np.ndarray, errors: np.ndarray, coverage: float) -> tuple[Any, Any]:
    """Ends of CV+ intervals; see ``Predictor.predict``.

    Args:
        by_fold: predictions, folds x new rows.
        fold_of: the fold of each calibration row.
        errors: its absolute error.

    Raises:
        UserError: there are too few rows for this coverage.
    """
    rank = conformal_rank(len(errors), coverage)
    if rank > len(errors):
        needed = math.ceil(coverage / (1 - coverage))
        raise UserError(f"--coverage {coverage:g}: needs {needed} rows, the predictor has {len(errors)}")
    per_row = by_fold[fold_of]
    low = np.sort(per_row - errors[:, None], axis=0)[len(errors) - rank]
    high = np.sort(per_row + errors[:, None], axis=0)[rank - 1]
    return low, high


def conformal_rank(num_rows: int, coverage: float) -> int:
    """ceil((n + 1) * coverage): the finite-sample correction (Vovk et al. 2005; Lei et al. 2018)."""
    return math.ceil(round((num_rows + 1) * coverage, 9))  # 0.9 * 10 is not to become 9.000000000000002


def load_predictor(path: Path) -> Predictor:
    """A predictor from its file or folder.

    Raises:
        UserError: it is not there, is no predictor, or holds types that are not on our list.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such predictor; make one: python -m raylora.predict fit TABLE")
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise UserError(f"{file}: {size / 2**30:.1f} GiB unpacked is more than any predictor; it is not opened")
        strange = sorted(set(skops.io.get_untrusted_types(file=file)) - set(TRUSTED_TYPES))
        if strange:
            raise UserError(f"{file}: holds types that no predictor needs, and is not opened: {', '.join(strange)}")
        return _checked_content(skops.io.load(file, trusted=TRUSTED_TYPES))
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 a file that anyone may have written fails in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{file}: no predictor that scikit-learn {sklearn.__version__} can read ({reason}); "
            "fit it again: python -m raylora.predict fit TABLE"
        ) from None


def _checked_content(content: Any) -> Predictor:
    """What was read, if its parts fit together: trees with a wild index would read beyond their arrays."""
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"not a raylora predictor of format {FORMAT}")
    predictor = Predictor(**content)
    if lacking := NEEDED - {*predictor.card}:
        raise ValueError(f"its card lacks {', '.join(sorted(lacking))}")
    folds, rows = len(predictor.fold_models), len(predictor.fold_of)
    if rows != len(predictor.residuals) or not (0 <= predictor.fold_of.min() <= predictor.fold_of.max() < folds):
        raise ValueError("folds and residuals do not fit together")
    for model in (predictor.model, *predictor.fold_models):
        for tree in trees_of(model):
            _check_tree(tree, len(predictor.columns))
    return predictor


def trees_of(model: Any) -> list[Any]:
    """The trees of a model's forests, wherever they are in it."""
    if hasattr(model, "steps"):
        return [tree for _, step in model.steps for tree in trees_of(step)]
    if hasattr(model, "estimators_"):
        return [tree for part in model.estimators_ for tree in trees_of(part)]
    return [model.tree_] if hasattr(model, "tree_") else []


def _check_tree(tree: Any, num_columns: int) -> None:
    """Children come after their parents in scikit-learn's trees, and a leaf has none (-1)."""
    left, right, number = tree.children_left, tree.children_right, np.arange(tree.node_count)
    inner = left != -1
    for child in (left, right):
        if not ((child[inner] > number[inner]).all() and (child < tree.node_count).all() and (child >= -1).all()):
            raise ValueError("a tree's nodes point outside it")
    if (right != -1).sum() != inner.sum() or not (tree.feature[inner] < num_columns).all():
        raise ValueError("a tree's nodes point outside it")
    if (tree.feature[inner] < 0).any() or len(tree.value) != tree.node_count:
        raise ValueError("a tree's nodes point outside it")
