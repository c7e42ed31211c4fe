"""A fitted predictor: predictions with conformal intervals, saved and loaded without pickle.

The file has skops' format: weights as arrays, and the types of the objects that hold them. A type that is not on our
list is refused before any object is created, so that a predictor from elsewhere cannot run code.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sklearn

from raylora.errors import UserError
from raylora.predict.conformal import cv_plus
from raylora.predict.novelty import Novelty
from raylora.predict.sentences import doubt_of, summary_of, verdict_of, why_unmeasured
from raylora.predict.tables import numbers_of
from raylora.rows import name_of_first
from raylora.storage.atomic import write_atomically

FILE_NAME = "predictor.skops"
TRUSTED_TYPES = ["numpy.dtype", "sklearn.tree._tree.Tree", "sklearn.utils._bunch.Bunch"]
"""Types that are trusted beyond skops' own list (numpy arrays, scikit-learn's estimators). None of them runs code."""
FORMAT = 2
"""2 since there is a verdict; a predictor of format 1 was never compared with the mean row by row, and is refused."""
REQUIRED_CARD_KEYS = {
    "target", "columns", "ranges", "needs_probe", "coverage", "num_rows", "group_column", "num_groups", "scikit_learn",
    "kind", "kinds_of_folds", "num_folds", "coverage_by_level", "coverage_intervals", "baselines", "rmse", "mae", "r2",
    "rank_correlation", "intervals", "verdict",
}  # fmt: skip
"""Keys of a card that are read without a check: a file that lacks one is refused."""
FIT_COMMAND = "python -m raylora.predict fit TABLE"
MAX_BYTES = 2**31
"""A file that is larger than this when unpacked is refused: one fitted on 450 rows has 30 MB."""


@dataclass(frozen=True)
class Predictor:
    """A model fitted on all rows; and, for the intervals, each fold's model with its errors on held-out rows.

    Where no regression was better than guessing the mean, the models are means. The names of the fields are keys of the
    file.
    """

    card: dict[str, Any]
    """What it was fitted on and how well it did, in plain values: ``target``, ``columns``, ``rmse`` and so on."""
    model: Any
    fold_models: list[Any]
    fold_of: np.ndarray
    """(n,): the fold in which each row was held out, from 0."""
    residuals: np.ndarray
    """(n,): measured minus predicted outcome of each row, by the model of the fold that held it out."""
    novelty: Novelty | None
    """Finds rows that are unlike those of the fit; None where predictions use no features."""

    def __repr__(self) -> str:
        return f"Predictor: {summary_of(self.card)}"

    @property
    def columns(self) -> list[str]:
        """The features that predictions are made of: none where every prediction is the mean."""
        return list(self.card["columns"]) if self.is_better_than_mean else []

    @property
    def is_better_than_mean(self) -> bool:
        return bool(self.card["verdict"]["better"])

    @property
    def verdict(self) -> str:
        """One line: is it better than guessing the mean?"""
        return verdict_of(self.card)

    @property
    def notes(self) -> list[str]:
        """Warnings: figures that are too good, and another scikit-learn, of which nobody promises the same numbers."""
        version, notes = self.card["scikit_learn"], [doubt_of(self.card)]
        if version != sklearn.__version__:
            notes.append(
                f"the predictor was made with scikit-learn {version}, this is {sklearn.__version__}: "
                "fit it again to be sure"
            )
        return [note for note in notes if note]

    def features_of(self, table: pd.DataFrame, place: str = "TABLE") -> pd.DataFrame:
        """The columns that the predictor uses, as floats, (rows, columns); NaN where null.

        Args:
            place: the table's name in error messages.

        Raises:
            UserError: a column is missing, or holds what is no number. Null values are no error.
        """
        missing = [name for name in self.columns if name not in table]
        if missing:
            raise UserError(
                f"{place}: the predictor uses {len(missing)} columns that are not there: {', '.join(missing)}; "
                f"measure them (python -m raylora.features), or fit without: --leave-out {' '.join(missing)}"
            )
        return numbers_of(table, self.columns, place)

    def unmeasured(self, table: pd.DataFrame, place: str = "TABLE") -> list[str]:
        """For each row the features that are null, but never were in the fit, as "name, name"; "" where none is.

        Raises:
            UserError: a column is missing, or holds what is no number.
        """
        return self._unmeasured(self.features_of(table, place))

    def _unmeasured(self, features: pd.DataFrame) -> list[str]:
        never_null = features.drop(columns=self.card.get("columns_with_nulls", []), errors="ignore")
        return [", ".join(never_null.columns[is_null]) for is_null in never_null.isna().to_numpy()]

    def predict(self, table: pd.DataFrame, coverage: float | None = None, place: str = "TABLE") -> pd.DataFrame:
        """The outcome of each of the table's rows, with an interval.

        The interval is CV+ (Barber et al. 2021, "Predictive inference with the jackknife+"): split conformal whose
        calibration rows are those that each fold held out. With n rows and miscoverage rate a, ``high`` is the
        ceil((1 - a)(n + 1))-th smallest of prediction(model of row i's fold) + |residual i|; ``low`` mirrors it.

        A row gets no prediction (NaN) if a feature is null in it that never was in the fit. With the fit's median in
        place of a group of features, 90% intervals held 16 to 56% of the outcomes (benchmarks/NOTES.md).

        Args:
            coverage: share of outcomes that intervals are to hold, 0 to 1; None: what the predictor was fitted with.
            place: the table's name in error messages.

        Returns:
            ``prediction``, ``low`` and ``high`` in the target's unit; ``outside``: the features that are unlike those
            of the fit, the farthest first (5% of rows from the same distribution have one), or, where there is no
            prediction, those that were not measured.

        Raises:
            UserError: a column is missing, no row has all features, or the predictor was fitted on too few rows for
                ``coverage``.
        """
        features = self.features_of(table, place)
        unmeasured = self._unmeasured(features)
        if all(unmeasured):
            raise UserError(f"{place}: {why_unmeasured(table, unmeasured)}" if len(unmeasured) else f"{place}: empty")
        clipped = self._clip_to_fit(features)
        outside = self.novelty.unusual(features) if self.novelty else [""] * len(features)
        level = coverage or self.card["coverage"]
        ends = cv_plus(self._predict_by_fold(clipped), self.fold_of, np.abs(self.residuals), level)
        low, high = (self._clip_outcome(end) for end in ends)
        prediction = self._clip_outcome(self.model.predict(clipped))
        # All fold models may predict more (or less) than the final one. At a low coverage the interval would then miss
        # its own prediction, so it is widened up to it.
        values = {"prediction": prediction, "low": np.minimum(low, prediction), "high": np.maximum(high, prediction)}
        predictions = pd.DataFrame(values, index=table.index)
        predictions[[bool(names) for names in unmeasured]] = np.nan
        return predictions.assign(
            outside=[
                f"not measured: {null_names}" if null_names else far_names
                for null_names, far_names in zip(unmeasured, outside, strict=True)
            ]
        )

    def draw(self, table: pd.DataFrame, num_draws: int, seed: int, place: str = "TABLE") -> np.ndarray:
        """Draws of the rows' outcomes, (num_draws, rows): predictions of one fold's model, plus residuals.

        Where the folds' models disagree, the rows of a draw move together, as they are predicted by one model. The
        residuals, those of held-out rows, are drawn for each row independently.

        Raises:
            UserError: a column is missing, or holds what is no number.
        """
        random = np.random.default_rng(seed)
        by_fold = self._predict_by_fold(self._clip_to_fit(self.features_of(table, place)))
        # A fold is drawn by its rows: one that held out more of them is drawn more often.
        drawn = by_fold[self.fold_of[random.integers(len(self.fold_of), size=num_draws)]]
        return self._clip_outcome(drawn + random.choice(self.residuals, size=drawn.shape))

    def _predict_by_fold(self, features: pd.DataFrame) -> np.ndarray:
        """Each fold model's predictions, (folds, rows)."""
        return np.stack([model.predict(features) for model in self.fold_models])

    def _clip_outcome(self, values: np.ndarray) -> np.ndarray:
        """An accuracy is between 0 and 1, and its change between -1 and 1."""
        return np.clip(values, 0.0 if name_of_first(self.card["target"]) == "overall_accuracy" else -1.0, 1.0)

    def _clip_to_fit(self, features: pd.DataFrame) -> pd.DataFrame:
        """Features clipped to the range of the fit: a linear model's extrapolation beyond it is a guess."""
        low, high = (np.array([self.card["ranges"][c][i] for c in self.columns]) for i in (0, 1))
        return features.clip(low, high, axis=1) if self.columns else features

    def save(self, folder: Path) -> Path:
        """Write ``predictor.skops`` into ``folder``; returns its path."""
        import skops.io  # which imports torch and takes 3 s: not at the top, where fitting and tables would wait for it

        content = {"format": FORMAT, **vars(self), "novelty": vars(self.novelty) if self.novelty else None}
        path = folder / FILE_NAME

        def write(partial: Path) -> None:
            skops.io.dump(content, partial, compression=zipfile.ZIP_DEFLATED, compresslevel=1)

        write_atomically(path, write)
        return path


def load_predictor(path: Path) -> Predictor:
    """Read a predictor from its file or folder.

    Raises:
        UserError: it is not there, is no predictor, or holds types that are not on our list.
    """
    import skops.io

    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such predictor; make one: {FIT_COMMAND}")
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise UserError(f"{file}: {size / 2**30:.1f} GiB unpacked is more than any predictor; it is not opened")
            if damaged := archive.testzip():  # who reads a part of it does not always come to its checksum
                raise UserError(f"{file}: damaged ({damaged}): fit it again: {FIT_COMMAND}")
        untrusted = sorted(set(skops.io.get_untrusted_types(file=file)) - set(TRUSTED_TYPES))
        if untrusted:
            raise UserError(f"{file}: holds types that no predictor needs, and is not opened: {', '.join(untrusted)}")
        content = skops.io.load(file, trusted=TRUSTED_TYPES)
        if isinstance(content, dict) and content.get("format") in range(1, FORMAT):
            raise UserError(f"{file}: fitted by an older raylora, which kept no verdict; fit it again: {FIT_COMMAND}")
        return _checked_content(content)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 anyone may have written the file: it can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{file}: no predictor that scikit-learn {sklearn.__version__} can read ({reason}); "
            f"fit it again: {FIT_COMMAND}"
        ) from None


def _checked_content(content: Any) -> Predictor:
    """The predictor in a file's content, if its parts fit together.

    Trees are checked too: scikit-learn follows their indices without a check, and would read beyond its arrays.

    Raises:
        ValueError: they do not fit.
    """
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"not a raylora predictor of format {FORMAT}")
    novelty = content.pop("novelty", None)
    predictor = Predictor(**content, novelty=Novelty(**novelty) if novelty else None)
    if missing := REQUIRED_CARD_KEYS - {*predictor.card}:
        raise ValueError(f"its card lacks {', '.join(sorted(missing))}")
    # Printed before anything else: they must be there as a whole.
    for sentence in (verdict_of, summary_of, doubt_of):
        sentence(predictor.card)
    num_folds, fold_of = len(predictor.fold_models), predictor.fold_of
    if len(fold_of) != len(predictor.residuals) or not (0 <= fold_of.min() <= fold_of.max() < num_folds):
        raise ValueError("folds and residuals do not fit together")
    if (predictor.novelty is None) == predictor.is_better_than_mean or (
        predictor.novelty and not predictor.novelty.fits(len(predictor.columns))
    ):
        raise ValueError("features and their distribution do not fit together")
    for model in (predictor.model, *predictor.fold_models):
        for tree in trees_of(model):
            _check_tree(tree, len(predictor.columns))
    return predictor


def trees_of(model: Any) -> list[Any]:
    """The trees in a model: of forests, at any depth of pipelines and blends."""
    if hasattr(model, "steps"):
        return [tree for _, step in model.steps for tree in trees_of(step)]
    if hasattr(model, "estimators_"):
        return [tree for part in model.estimators_ for tree in trees_of(part)]
    return [model.tree_] if hasattr(model, "tree_") else []


def _check_tree(tree: Any, num_columns: int) -> None:
    """In scikit-learn's trees children come after their parent, so that there is no cycle; a leaf's are -1.

    Raises:
        ValueError: a child or a feature is outside its array.
    """
    left, right, node = tree.children_left, tree.children_right, np.arange(tree.node_count)
    is_split = left != -1
    for child in (left, right):
        if not ((child[is_split] > node[is_split]).all() and (child < tree.node_count).all() and (child >= -1).all()):
            raise ValueError("a tree's nodes point outside it")
    if (right != -1).sum() != is_split.sum() or not (tree.feature[is_split] < num_columns).all():
        raise ValueError("a tree's nodes point outside it")
    if (tree.feature[is_split] < 0).any() or len(tree.value) != tree.node_count:
        raise ValueError("a tree's nodes point outside it")
