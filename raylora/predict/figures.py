"""The calibration figure: are predictions right on held-out rows, and intervals as wide as they say?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from raylora.predict.predictor import Predictor, conformal_rank
from raylora.storage.atomic import write_atomically


def draw_calibration(predictor: Predictor, held_out: pd.DataFrame) -> Figure:
    """Left: measured against predicted outcome of held-out rows. Right: coverage of intervals against their level."""
    card = predictor.card
    figure = Figure(figsize=(9.6, 4.4), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    errors = np.sort(np.abs(predictor.residuals))
    width = errors[min(conformal_rank(len(errors), card["coverage"]), len(errors)) - 1]
    ends = [min(held_out[["measured", "predicted"]].min()), max(held_out[["measured", "predicted"]].max())]
    left.fill_between(ends, [e - width for e in ends], [e + width for e in ends], color="#9ecae1", alpha=0.5, lw=0)
    left.plot(ends, ends, color="#555555", lw=1)
    left.scatter(held_out["predicted"], held_out["measured"], s=9, color="#08519c", alpha=0.7, lw=0)
    name = card["target"].replace("_", " ")
    left.set(xlabel=f"predicted {name}", ylabel=f"measured {name}", title=f"held-out rows, RMSE {card['rmse']:.4f}")
    levels = {float(level): share for level, share in card["coverage_by_level"].items()}
    right.plot([0.45, 1], [0.45, 1], color="#555555", lw=1)
    # What n rows can show: two standard errors of a share around its level.
    spread = [2 * np.sqrt(level * (1 - level) / len(errors)) for level in levels]
    right.errorbar(list(levels), list(levels.values()), yerr=spread, fmt="o-", ms=4, color="#08519c", capsize=2)
    right.set(xlabel="level of the interval", ylabel="share of held-out rows inside", title="coverage")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_calibration(path: Path, predictor: Predictor, held_out: pd.DataFrame) -> None:
    figure = draw_calibration(predictor, held_out)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))
