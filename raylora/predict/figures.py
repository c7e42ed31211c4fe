"""The calibration figure: predicted against measured outcomes of held-out rows, and the coverage of the intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from raylora.predict.conformal import conformal_rank
from raylora.predict.predictor import Predictor
from raylora.storage.atomic import write_atomically


def draw_calibration(predictor: Predictor, held_out: pd.DataFrame) -> Figure:
    """Left: measured against predicted outcomes. Right: the coverage of intervals against their nominal level.

    Args:
        held_out: a row for each held-out row, with columns ``measured`` and ``predicted``: by the regression, also
            where it is no better than the mean.
    """
    card = predictor.card
    figure = Figure(figsize=(9.6, 4.4), layout="constrained", dpi=150)
    outcomes, coverage = figure.subplots(1, 2)
    errors = np.sort(np.abs(held_out["measured"].to_numpy() - held_out["predicted"].to_numpy()))
    # The band has one width, the conformal quantile of all errors: the intervals of ``predict`` differ a little by row.
    width = errors[min(conformal_rank(len(errors), card["coverage"]), len(errors)) - 1]
    span = [min(held_out[["measured", "predicted"]].min()), max(held_out[["measured", "predicted"]].max())]
    outcomes.fill_between(span, [x - width for x in span], [x + width for x in span], color="#9ecae1", alpha=0.5, lw=0)
    outcomes.plot(span, span, color="#555555", lw=1)
    outcomes.scatter(held_out["predicted"], held_out["measured"], s=9, color="#08519c", alpha=0.7, lw=0)
    name = card["target"].replace("_", " ")
    outcomes.set(xlabel=f"predicted {name}", ylabel=f"measured {name}", title=f"held-out rows, RMSE {card['rmse']:.4f}")
    shares = {float(level): share for level, share in card["coverage_by_level"].items()}
    coverage.plot([0.45, 1], [0.45, 1], color="#555555", lw=1)
    spread = np.abs(np.array([*card["coverage_intervals"].values()]).T - [*shares.values()])
    coverage.errorbar(list(shares), list(shares.values()), yerr=spread, fmt="o-", ms=4, color="#08519c", capsize=2)
    coverage.set(xlabel="level of the interval", ylabel="share of held-out rows inside", title="coverage")
    for axes in (outcomes, coverage):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_calibration(path: Path, predictor: Predictor, held_out: pd.DataFrame) -> None:
    """Write ``draw_calibration``'s figure as a PNG file."""
    figure = draw_calibration(predictor, held_out)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))
