"""How many questions each outcome needs to show a change: of stored scores, and whether its interval holds.

    python -m benchmarks.outcomes results/chunk_001        # a table of the run's adapters
    python -m benchmarks.outcomes --coverage               # simulated: the interval of the probability's change

A change of mean m and standard deviation s over questions is found, at 5% and with a power of 80%, by
((1.96 + 0.84) s / m)^2 questions.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import softmax
from scipy.stats import norm, t

from raylora.errors import UserError
from raylora.mmlu.probabilities import question_probabilities
from raylora.mmlu.scoring import load_score
from raylora.records import Score
from raylora.report.read_run import load_run

POWER = 0.8


def questions_needed(differences: np.ndarray) -> float:
    """Questions like these that show the change; infinite where its mean is 0."""
    mean, variance = differences.mean(), differences.var(ddof=1)
    return float((norm.ppf(0.975) + norm.ppf(POWER)) ** 2 * variance / mean**2) if mean else np.inf


def differences_of(score: Score, base: Score) -> pd.DataFrame:
    """Adapter - base by question: ``accuracy``, ``correct_probability`` and ``brier``."""
    ours, theirs = (
        question_probabilities(s).assign(accuracy=s.questions.set_index("question_id")["correct"].astype(float))
        for s in (score, base)
    )
    return (ours - theirs)[["accuracy", "correct_probability", "brier"]]


def table_of(root: Path) -> pd.DataFrame:
    """By adapter of a run and outcome, the change and how many questions show it."""
    run = load_run(root)
    base = load_score(root / "base" / str(run.manifest.get("base_key")) / "scores.parquet")
    rows = []
    for row in np.flatnonzero(run.ok).tolist():
        folder = run.folder(row)
        if folder is None or not (folder / "scores.parquet").is_file():
            continue
        values: dict[str, object] = {"dataset": run.labels[row]}
        for name, differences in differences_of(load_score(folder / "scores.parquet"), base).items():
            needed = questions_needed(differences.to_numpy())
            values |= {f"{name} change": differences.mean(), f"{name} questions": needed}
        rows.append(values)
    return pd.DataFrame(rows)


def coverage(num: int, shares: list[float], knows: tuple[float, float], rounds: int, seed: int = 0) -> float:
    """How often the interval holds the true change, with letters calibrated by the same ``num`` questions.

    Args:
        shares: how often each letter is right.
        knows: nats that the right letter has more, in the new model and the old one; they prefer different letters.
    """
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, int]) -> np.ndarray:
        answers = rng.choice(4, shape, p=shares)
        text = rng.normal(0, 1, (*shape, 4))  # what both models make of the question
        probabilities = []
        for lead, preference in zip(knows, ([0, 0, 0, 3.0], [2.0, 0, 0, 0]), strict=True):
            logprobs = text + np.array(preference) + lead * np.eye(4)[answers] + rng.normal(0, 0.5, text.shape)
            calibrated = softmax(logprobs - logprobs.mean(axis=1, keepdims=True), axis=2)
            probabilities.append(np.take_along_axis(calibrated, answers[..., None], 2)[..., 0])
        return probabilities[0] - probabilities[1]

    true, drawn = draw((1, 100_000)).mean(), draw((rounds, num))
    half_width = t.ppf(0.975, num - 1) * drawn.std(axis=1, ddof=1) / np.sqrt(num)
    return float((np.abs(drawn.mean(axis=1) - true) <= half_width).mean())


def main() -> None:
    if sys.argv[1:] == ["--coverage"]:
        for shares in ([0.25] * 4, [0.23, 0.25, 0.25, 0.27], [0.2, 0.1, 0.1, 0.6]):
            for num, rounds in ((20, 3000), (57, 2000), (570, 400)):
                found = [coverage(num, shares, knows, rounds) for knows in ((0.5, 0.5), (1.0, 0.5), (3.0, 1.0))]
                print(shares, num, "questions:", ", ".join(f"{value:.3f}" for value in found))
        return
    if len(sys.argv) != 2:
        raise UserError("give the folder of a run, or --coverage")
    table = table_of(Path(sys.argv[1]))
    print(table.to_string(index=False, float_format="{:.4g}".format))
    needed = table.filter(like=" questions").median()
    medians = [f"{str(name).removesuffix(' questions')} {value:.0f}" for name, value in needed.items()]
    print("median questions needed:", ", ".join(medians))


if __name__ == "__main__":
    main()
