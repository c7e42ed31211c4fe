"""A row's change of accuracy: its intervals, what is called significant, and a favourite letter that moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.simulations.rate import Rate
from raylora.mmlu.paired import ALPHA, balanced_change, change_interval, holm, mcnemar, verdicts

LETTER_SHARES = np.array([3222, 3462, 3582, 3776]) / 14042
"""How often A to D are right in MMLU's test questions."""
NUM_DRAWS = 20_000
"""Simulated rows a setting: a rate of 0.95 is then known to 0.003, two standard errors."""


@dataclass(frozen=True)
class Pairs:
    """Simulated answers of base and adapter to the same questions, (runs, letters): of each right letter."""

    gained: np.ndarray
    lost: np.ndarray
    num: np.ndarray
    balanced_truth: float
    truth: float

    def covered(self) -> tuple[float, float]:
        """How often the interval of accuracy's change holds the truth, and that of balanced accuracy's change."""
        low, high = change_interval(self.gained.sum(axis=1), self.lost.sum(axis=1), self.num.sum(axis=1))
        _, balanced_low, balanced_high = balanced_change(self.gained, self.lost, self.num)
        of_row = (low <= self.truth) & (self.truth <= high)
        of_balanced = (balanced_low <= self.balanced_truth) & (self.balanced_truth <= balanced_high)
        return float(of_row.mean()), float(of_balanced.mean())

    def verdicts(self, rows: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Whether McNemar's test is significant, Holm-adjusted over runs of so many rows, and the verdict; (runs,)."""
        gained, lost = self.gained.sum(axis=1), self.lost.sum(axis=1)
        p_values = mcnemar(gained, lost)
        values = np.stack([p_values, gained - lost, *balanced_change(self.gained, self.lost, self.num)])
        chunks = np.split(values, len(p_values) // rows, axis=1)
        adjusted = np.concatenate([holm(chunk[0]) for chunk in chunks])
        return adjusted < ALPHA, np.concatenate([verdicts(*chunk) for chunk in chunks])


def draw_pairs(seed: int, num: int, gains: list[float], losses: list[float]) -> Pairs:
    """``num`` questions a run, whose right letters are drawn too; probabilities to gain and to lose one by letter."""
    rng = np.random.default_rng([seed, num])
    sizes = rng.multinomial(num, LETTER_SHARES, NUM_DRAWS)
    counts = rng.multinomial(sizes, np.stack([gains, losses, 1 - np.add(gains, losses)], axis=-1))
    changes = np.subtract(gains, losses)
    return Pairs(counts[..., 0], counts[..., 1], sizes, float(changes.mean()), float(changes @ LETTER_SHARES))


def accuracy() -> list[Rate]:
    """Of a row's change of accuracy: its intervals, and what is called significant."""
    rates = []
    for num in (57, 114, 570, 14042):
        pairs = [draw_pairs(1, num, [d / 2] * 4, [d / 2] * 4) for d in (0.02, 0.1, 0.4)]
        pairs += [draw_pairs(2, num, [0.3] * 4, [0.1] * 4)]
        rows, balanced = zip(*(p.covered() for p in pairs), strict=True)
        setting = f"{num} questions; lowest of 2, 10, 40% differing, half of them gained, and 40%, three of four gained"
        rates.append(Rate("interval of the change covers it", setting, min(rows), "0.95 or more"))
        rates.append(Rate("balanced interval covers it", setting, min(balanced), "0.95 or more"))
    for num in (57, 570, 14042):
        significant, found = draw_pairs(3, num, [0.1] * 4, [0.1] * 4).verdicts()
        setting = f"{num} questions; 20% differ, as often gained as lost"
        rates.append(Rate("significant by McNemar", setting, float(significant.mean()), "0.05 or less"))
        rates.append(Rate("called significant", setting, float(is_real(found).mean()), "0.05 or less"))
    # Half of the answers A become D; a few others change by chance.
    moved = [0.02, 0.02, 0.02, 0.5], [0.5, 0.02, 0.02, 0.02]
    for num in (57, 570, 14042):
        pairs_of_letter = draw_pairs(4, num, *moved)
        significant, found = pairs_of_letter.verdicts()
        setting = f"{num} questions; half of the answers A become D"
        covered = pairs_of_letter.covered()[1]
        rates.append(Rate("balanced interval covers it", setting, covered, "0.95 or more"))
        rates.append(
            Rate("significant by McNemar", setting, float(significant.mean()), "no limit: accuracy did change")
        )
        rates.append(Rate("called significant", setting, float(is_real(found).mean()), "0.05 or less"))
    # Runs of 40 rows: of these 20,000 draws 500.
    for what, num, probabilities in (
        ("in none anything changed", 570, ([0.1] * 4, [0.1] * 4)),
        ("in all, half of the answers A become D", 14042, moved),
    ):
        _, found = draw_pairs(5, num, *probabilities).verdicts(rows=40)
        any_real = is_real(found).reshape(-1, 40).any(axis=1).mean()
        rates.append(
            Rate("any of 40 rows called significant", f"{num} questions; {what}", float(any_real), "0.05 or less")
        )
    for num, gain in ((57, 0.24), (570, 0.09), (14042, 0.054)):
        _, found = draw_pairs(6, num, [gain] * 4, [0.04] * 4).verdicts()
        setting = f"{num} questions; a true gain of {100 * (gain - 0.04):.1f} points, the same for each right letter"
        rates.append(Rate("called significant", setting, float(is_real(found).mean()), "much"))
        rates.append(Rate("called a moved letter", setting, float((found == "letter").mean()), "little"))
    return rates


def is_real(found: np.ndarray) -> np.ndarray:
    return np.isin(found, ["gain", "loss"])
