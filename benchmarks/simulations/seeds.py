"""Training seeds: do intervals hold what a fresh one does, and is a training better than another on the same data?"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from benchmarks import common
from benchmarks.simulations.rate import Rate
from raylora.config.method import Method
from raylora.data.datasets import read_dataset, sample_examples
from raylora.data.encoding import encode_each
from raylora.mmlu.paired import ALPHA, change_interval, mcnemar
from raylora.mmlu.prompts import encode_questions
from raylora.mmlu.question_set import DEMO_QUESTIONS
from raylora.mmlu.questions import load_questions, select_questions
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


def over_seeds(trials: list[Trial], setting: str) -> list[Rate]:
    """How often the interval over seeds holds a fresh seed's change, and how often a line is called significant."""
    found = [change_over_seeds(trial.differences) for trial in trials]
    held = np.mean([c.low <= t.fresh <= c.high for t, c in zip(trials, found, strict=True)])
    real = np.mean([c.p_value < ALPHA for c in found])
    return [
        Rate("interval over seeds holds a fresh seed's change", setting, float(held), "0.93 or more"),
        Rate("called significant over seeds", setting, float(real), "0.05 or less"),
    ]


def of_one_seed(trials: list[Trial], setting: str) -> list[Rate]:
    """The same of one seed's own interval, which knows the noise of the questions alone."""
    low, high = change_interval(*np.array([_counts(trial.differences[0]) for trial in trials]).T)
    fresh = np.array([trial.fresh for trial in trials])
    held = float(((low <= fresh) & (fresh <= high)).mean())
    return [Rate("one seed's interval holds a fresh seed's change", setting, held, "not promised")]


def a_a_pairs(trials: list[np.ndarray], setting: str) -> list[Rate]:
    """How often a training counts as better or worse than another one on the same data.

    Args:
        trials: answers that are right, or differences from a base, (seeds, questions); the first is taken for the base
            of the others.
    """
    differences = [d[1:].astype(np.int8) - d[0].astype(np.int8) for d in trials]
    by_one = mcnemar(*np.array([_counts(d[0])[:2] for d in differences]).T) < ALPHA
    by_several = [change_over_seeds(d).p_value < ALPHA for d in differences]
    return [
        Rate("A/A pair called significant by one seed's McNemar test", setting, float(by_one.mean()), "not promised"),
        Rate(
            "A/A pair called significant by the interval over seeds",
            setting,
            float(np.mean(by_several)),
            "0.05 or less",
        ),
    ]


def _counts(differences: np.ndarray) -> tuple[int, int, int]:
    """Questions gained, lost and asked."""
    return int((differences > 0).sum()), int((differences < 0).sum()), len(differences)


def seeds() -> list[Rate]:
    """Simulated trainings that change nothing on average, over sizes and shares of noise."""
    rng, rates = np.random.default_rng(0), []
    for num_questions, of_seeds in itertools.product((114, 1140), (0.02, 0.2)):
        setting = f"{num_questions} questions; a seed moves margins by {of_seeds:g} of their spread"
        for num_seeds in (2, 3, 5):
            trials = [simulated_seeds(rng, num_seeds, num_questions, of_seeds, 0.2) for _ in range(1000)]
            rates += over_seeds(trials, f"{setting}; {num_seeds} seeds")
        rates += of_one_seed(trials, setting)
        rates += a_a_pairs([trial.differences for trial in trials], f"{setting}; 4 seeds against 1")
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
    held, _ = over_seeds(trials, setting)  # whether they are real is not known
    return [held, *of_one_seed(trials, setting), *a_a_pairs(pairs, setting)]


def trained(num_seeds: int, num_questions: int) -> tuple[np.ndarray, np.ndarray]:
    """Right answers of adapters of a tiny model trained on a demo dataset, (seeds, questions), and of the base."""
    loaded = common.load("demo", "none", "smallest")
    path = common.SHARED / "mmlu" / "test_all_subjects.json"
    questions = load_questions(path if path.is_file() else DEMO_QUESTIONS)
    asked = select_questions(questions, min(num_questions, len(questions)), seed=0)
    encoded = encode_questions(loaded.tokenizer, asked, {}, "harness", 2048)

    def answers() -> np.ndarray:
        return common.score(loaded, encoded).questions["correct"].to_numpy().astype(bool)

    method = Method(num_epochs=2, learning_rate=1e-2, max_length=128)
    dataset = read_dataset(DEMO_FOLDER / DEMO_CHUNK / "country_facts.json")
    base, right = answers(), []
    for seed in range(num_seeds):
        mixed = (dataset.seed ^ seed) % 2**62
        ordered = sample_examples(dataset.examples, 0, mixed)
        examples = list(encode_each(loaded.tokenizer, ordered, method.max_length))
        train_adapter(loaded, loaded.attach(method, mixed), examples, method, mixed)
        right.append(answers())
        loaded.detach()
    return np.array(right), base
