"""Training seeds: do intervals hold what a fresh one does, and is a training better than another on the same data?"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from benchmarks import common
from benchmarks.simulations.rate import Rate
from raylora.config import Method
from raylora.data.datasets import read_dataset, sample_examples
from raylora.data.encoding import encode_each
from raylora.mmlu.paired import ALPHA, change_interval, mcnemar
from raylora.mmlu.prompts import encode_questions
from raylora.mmlu.question_set import DEMO_QUESTIONS
from raylora.mmlu.questions import load_questions, select_questions
from raylora.mmlu.scoring import evaluate
from raylora.mmlu.seeds import change_over_seeds
from raylora.planning.plan import DEMO_CHUNK, DEMO_FOLDER
from raylora.training.loop import train_adapter


def simulated_seeds(
    rng: np.random.Generator, num_seeds: int, num_questions: int, of_seeds: float, noise: float
) -> Trial:
    """Trainings that change nothing on average, on questions whose margins are normal with a deviation of 1.

    Args:
        of_seeds: standard deviation of what a seed adds to all margins.
        noise: of what a seed adds to each question's margin by itself.
    """
    margins, effects = rng.normal(0, 1, 20_000), rng.normal(0, 0.3, 20_000)
    base = margins > 0
    of_all = rng.normal(0, of_seeds, num_seeds + 1)
    asked = rng.integers(0, len(margins), num_questions)
    drawn = rng.normal(0, noise, (num_seeds, num_questions))
    right = (margins + effects)[asked] + of_all[:-1, None] + drawn > 0
    fresh = float((norm.cdf((margins + effects + of_all[-1]) / noise) - base).mean())
    return Trial(right.astype(np.int8) - base[asked], fresh)


@dataclass(frozen=True)
class Trial:
    """Trainings with several seeds, and what is true of another one."""

    differences: np.ndarray
    """(seeds, questions), -1, 0 or 1."""
    fresh: float
    """The change that a fresh seed makes on all questions."""


def of_trials(trials: list[Trial], setting: str) -> list[Rate]:
    """How often the interval over seeds, and that of one seed, hold a fresh seed's change."""
    over_seeds = [change_over_seeds(trial.differences) for trial in trials]
    low, high = change_interval(*np.array([_counts(trial.differences[0]) for trial in trials]).T)
    return [
        Rate(
            f"{name} holds a fresh seed's change",
            setting,
            float(np.mean([low <= t.fresh <= high for t, (low, high) in zip(trials, intervals, strict=True)])),
            wanted,
        )
        for name, intervals, wanted in (
            ("interval over seeds", [(c.low, c.high) for c in over_seeds], "0.93 or more"),
            ("one seed's interval", list(zip(low, high, strict=True)), "not promised"),
        )
    ]


def a_a_pairs(trials: list[np.ndarray], setting: str) -> list[Rate]:
    """How often a training counts as better or worse than another one on the same data.

    Args:
        trials: answers that are right, booleans (seeds, questions); the first is taken for the base of the others.
    """
    by_one, by_several = [], []
    for right in trials:
        differences = right[1:].astype(np.int8) - right[0]
        by_one.append(_counts(differences[0])[:2])
        by_several.append(change_over_seeds(differences).p_value < ALPHA)
    return [
        Rate(
            "A/A pair called real by one seed's McNemar test",
            setting,
            float((mcnemar(*np.array(by_one).T) < ALPHA).mean()),
            "not promised",
        ),
        Rate("A/A pair called real by the interval over seeds", setting, float(np.mean(by_several)), "0.05 or less"),
    ]


def _counts(differences: np.ndarray) -> tuple[int, int, int]:
    """Questions gained, lost and asked."""
    return int((differences > 0).sum()), int((differences < 0).sum()), len(differences)


def seeds() -> list[Rate]:
    """Simulated trainings, over sizes and shares of noise."""
    rng, rates = np.random.default_rng(0), []
    for num_questions, num_seeds, of_seeds, noise in itertools.product((114, 1140), (2, 3, 5), (0.02, 0.2), (0.2,)):
        setting = f"{num_questions} questions, {num_seeds} seeds, which move margins by {of_seeds:g} of their spread"
        trials = [simulated_seeds(rng, num_seeds, num_questions, of_seeds, noise) for _ in range(1000)]
        rates += of_trials(trials, setting)
    return rates


def real_seeds() -> list[Rate]:
    """40 trainings of a tiny model on one dataset, each with another seed, drawn again and again."""
    right, base = trained(num_seeds=40, num_questions=1140)
    rng, trials, pairs = np.random.default_rng(0), [], []
    for _ in range(2000):
        of_seeds, of_questions = rng.permutation(len(right))[:6], rng.permutation(len(base))
        asked, others = of_questions[:300], of_questions[300:]
        differences = right[of_seeds].astype(np.int8) - base
        trials.append(Trial(differences[:5][:, asked], float(differences[5, others].mean())))
        pairs.append(right[of_seeds][:, asked])
    changes = (right.mean(axis=1) - base.mean()).round(3)
    setting = f"40 real trainings (changes {changes.min():+.3f} to {changes.max():+.3f}), 5 of them, 300 questions"
    return of_trials(trials, setting) + a_a_pairs(pairs, setting)


def trained(num_seeds: int, num_questions: int) -> tuple[np.ndarray, np.ndarray]:
    """Right answers of adapters of a tiny model trained on a demo dataset, (seeds, questions), and of the base."""
    loaded = common.load("demo", "none", "smallest")
    path = common.SHARED / "mmlu" / "test_all_subjects.json"
    questions = load_questions(path if path.is_file() else DEMO_QUESTIONS)
    asked = select_questions(questions, min(num_questions, len(questions)), seed=0)
    encoded = encode_questions(loaded.tokenizer, asked, {}, "harness", 2048)

    def answers() -> np.ndarray:
        return evaluate(loaded.model, loaded.tokenizer, encoded).questions["correct"].to_numpy().astype(bool)

    method = Method(num_epochs=2, learning_rate=1e-2, max_length=128)
    dataset = read_dataset(DEMO_FOLDER / DEMO_CHUNK / "grounded_final.json")
    base, right = answers(), []
    for seed in range(num_seeds):
        mixed = (dataset.seed ^ seed) % 2**62
        ordered = sample_examples(dataset.examples, 0, mixed)
        examples = list(encode_each(loaded.tokenizer, ordered, method.max_length))
        train_adapter(loaded, loaded.attach(method, mixed), examples, method, mixed)
        right.append(answers())
        loaded.detach()
    return np.array(right), base
