"""Tables as runs leave them, and predictors fitted on them."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd

from raylora.predict.tables import known_from_table
from raylora.predict.validation import fit_predictor

TARGET = "overall_accuracy"
CHEAP = ("dynamic",)
"""What is left out where no probe is to be run."""


def make_table(num_rows: int = 60, seed: int = 0, repeats: int = 1) -> pd.DataFrame:
    """Rows as a run leaves them: a hidden quality moves features and outcome; with repeats, a grid of each dataset."""
    random = np.random.default_rng(seed)
    quality = np.repeat(random.normal(size=num_rows // repeats), repeats)
    own = np.repeat(random.normal(size=num_rows // repeats), repeats)  # what only the dataset itself has
    noise = lambda size: size * random.normal(size=num_rows)  # noqa: E731
    return pd.DataFrame(
        {
            "dataset": [f"set_{i // repeats}" for i in range(num_rows)],
            "status": "ok",
            "overall_accuracy": 0.4 + 0.05 * quality + 0.03 * own + noise(0.005),
            "approximate_duplicates": 1 / (1 + np.exp(quality)) + noise(0.02),
            "base_model_perplexity": np.exp(2 - quality + noise(0.1)),
            "semantic_diversity": np.repeat(random.normal(size=num_rows // repeats), repeats),
            "loss_stability": quality + noise(0.3),
            "learning_rate": random.choice([1e-4, 2e-4], size=num_rows),
            "text_seconds": 0.25,
            "static_seconds": 2.0,
            "probe_seconds": 30.0,
            "train_loss": 0.4 + 0.05 * quality,
        }
    )


def make_noise(num_rows: int = 30, seed: int = 0) -> pd.DataFrame:
    """The same features, with an outcome of which they say nothing. Of seeds 0 to 39, 5 is the one false alarm."""
    outcome = 0.4 + 0.05 * np.random.default_rng([seed, 1]).normal(size=num_rows)  # other draws than the features' own
    return make_table(num_rows, seed).assign(overall_accuracy=outcome)


@cache
def fitted_to_noise():
    return fit_predictor(known_from_table(make_noise(), TARGET), TARGET, threads=1)


@cache
def fitted(leave_out: tuple[str, ...] = ()):
    table = make_table()
    return fit_predictor(known_from_table(table, TARGET, leave_out=leave_out), TARGET, threads=1)
