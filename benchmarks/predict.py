"""How good are predictors on the published sample? RMSE of 5 folds, and coverage of intervals in repeated splits.

    python -m benchmarks.predict [--repeats 2] [--table ../shared/data/tuneahead_metadataset_sample.csv]

A split fits a predictor to four fifths of the rows alone, and counts those of the last fifth that lie in its intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from sklearn.model_selection import RepeatedKFold

from raylora.predict.tables import known_from_table
from raylora.predict.uncertainty import scores
from raylora.predict.validation import fit_predictor
from raylora.rows import read_table

SHARED = Path(os.environ.get("RAYLORA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
SAMPLE = SHARED / "tuneahead_metadataset_sample.csv"
TARGET = "overall_accuracy"


def coverage_in_splits(path: Path, repeats: int, coverage: float = 0.9) -> dict[str, list[float]]:
    """``coverage``, ``width`` and ``rmse`` on the held-out fifth of each split; a repeat holds every row out once.

    Fifths drawn freely meet some rows often and others never: eight such splits gave 94%, and forty 91.8%.
    """
    table = read_table(path)
    found: dict[str, list[float]] = {"coverage": [], "width": [], "rmse": []}
    folds = RepeatedKFold(n_splits=5, n_repeats=repeats, random_state=0)
    for split, (train, rest) in enumerate(folds.split(table)):
        known = known_from_table(table.iloc[train], TARGET)
        predictor, _ = fit_predictor(known, TARGET, coverage, seed=split, explain=False)
        held_out = table.iloc[rest]
        predicted = predictor.predict(held_out)
        measured = held_out[TARGET]
        found["coverage"].append(float(measured.between(predicted["low"], predicted["high"]).mean()))
        found["width"].append(float((predicted["high"] - predicted["low"]).mean()))
        found["rmse"].append(scores(measured.to_numpy(), predicted["prediction"].to_numpy())["rmse"])
        print(json.dumps({"split": split, **{name: values[-1] for name, values in found.items()}}), flush=True)
    return found


def five_fold_rmse(path: Path, seeds: int) -> list[float]:
    """Nested: what a fold is predicted with has not seen it, the choice of the model included."""
    known = known_from_table(read_table(path), TARGET)
    return [fit_predictor(known, TARGET, seed=seed, explain=False)[0].card["rmse"] for seed in range(seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, default=SAMPLE)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    started = time.monotonic()
    rmse = five_fold_rmse(arguments.table, arguments.seeds)
    print(
        json.dumps({"five_fold_rmse": [round(r, 5) for r in rmse], "seconds": time.monotonic() - started}), flush=True
    )
    found = coverage_in_splits(arguments.table, arguments.repeats)
    means = {f"mean_{name}": float(np.mean(values)) for name, values in found.items() if values}
    print(json.dumps({**means, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
