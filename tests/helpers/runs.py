"""Finished runs of any number of datasets, written by raylora's own objects without training anything.

    python -m tests.helpers.runs FOLDER 40         # a run to look at, of the size of the real MMLU

What a model answers, and what is measured, is drawn at random; rows, scores, intervals and tables are made as a run
makes them.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raylora.config.run import Config, load_config
from raylora.errors import ErrorKind
from raylora.experiment.transfer import cell_of, transfer_values
from raylora.mmlu.questions import LETTERS, SUBJECT_GROUPS
from raylora.mmlu.row_values import score_values
from raylora.mmlu.scoring import save_score
from raylora.records import Experiment, ResultRow, Score, digest
from raylora.report.transfer_tables import TransferTables
from raylora.rows import FEATURE_COLUMNS, ROW_COLUMNS, TrainingMetrics, error_row, make_row
from raylora.run.manifest import PACKAGES, version_of
from raylora.storage.store import Store, safe_name
from raylora.training.gradients import Step
from raylora.training.loop import TrainingResult
from raylora.training.losses import ExampleLoss

SOURCES = ("dolly", "alpaca", "oasst", "flan_cot", "sharegpt", "code_feedback", "math_steps", "wiki_qa", "pubmed_qa")
VARIANTS = ("1k", "3k", "filtered", "dedup", "shuffled", "long", "short", "mixed")
CAUSES = (
    (
        "train_data/{}.json: line 1, column 48211: the file breaks off here: get it again, or --salvage what is whole",
        ErrorKind.TRUNCATED_FILE,
    ),
    (
        "{}: its worker process died: it crashed or was killed, perhaps for memory; tried 2 times, see its log.txt",
        ErrorKind.WORKER_DIED,
    ),
    ("{}: the loss became nan at step 41: lower --learning-rate", ErrorKind.DIVERGED),
)


def dataset_names(num: int) -> list[str]:
    pairs = [f"{source}_{variant}" for variant, source in itertools.product(VARIANTS, SOURCES)]
    return [pairs[i % len(pairs)] + (f"_{i // len(pairs) + 1:02d}" if num > len(pairs) else "") for i in range(num)]


def make_score(seed: int, sizes: dict[str, int], base: Score | None, effect: float) -> Score:
    """Answers to ``sizes`` questions a subject. With ``base``: its answers, some of them turned, more up than down."""
    random = np.random.default_rng(seed)
    subjects = np.repeat(list(sizes), list(sizes.values()))
    ids = [f"{subject}/{k}" for subject, size in sizes.items() for k in range(size)]
    truth = np.random.default_rng(0).integers(0, 4, len(ids))
    if base is None:
        skill = dict(zip(sizes, random.beta(8, 6, len(sizes)), strict=True))
        correct = random.random(len(ids)) < np.array([skill[s] for s in subjects])
    else:
        group_effect = dict(
            zip(("stem", "humanities", "social_sciences", "other"), random.normal(0, 0.012, 4), strict=True)
        )
        pull = effect + np.array([group_effect[SUBJECT_GROUPS[s]] for s in subjects])
        before = base.questions["correct"].to_numpy()
        turned = random.random(len(ids)) < np.where(before, 0.06 - pull / 2, 0.07 + pull / 2).clip(0.005, 0.9)
        correct = before ^ turned
    guess = np.where(correct, truth, (truth + random.integers(1, 4, len(ids))) % 4)
    logprobs = np.log(random.dirichlet(np.ones(4), len(ids)))
    table = pd.DataFrame(
        {
            "subject": subjects,
            "question_id": ids,
            "question": [f"Question {k}?" for k in ids],
            "answer": [LETTERS[a] for a in truth],
            "prediction": [LETTERS[g] for g in guess],
            **{f"logprob_{letter.lower()}": logprobs[:, k] for k, letter in enumerate(LETTERS[:4])},
            "correct": correct,
        }
    )
    return Score(table, {"token_budget": 8192, "num_oom_backoffs": 0, "num_truncated": 0})


def letter_scores() -> tuple[Score, Score, Score]:
    """A base that always answers A, an adapter that always answers D, and one that knows nine of ten answers.

    Of 600 questions in two subjects, D is right in 60% and A in 20%.
    """
    answers = np.array(list("AABCDDDDDD" * 60))
    known = np.where(np.arange(600) % 10 == np.arange(600) // 10 % 10, "A", answers)

    def score(predictions: np.ndarray) -> Score:
        table = pd.DataFrame({"subject": ["anatomy", "virology"] * 300, "question_id": [f"q{i}" for i in range(600)]})
        table = table.assign(question="Q?", answer=answers, prediction=predictions, correct=predictions == answers)
        return Score(table, {"token_budget": 8192, "num_oom_backoffs": 0, "num_truncated": 0})

    return score(np.full(600, "A")), score(np.full(600, "D")), score(known)


def make_training(seed: int, level: float, num_steps: int) -> TrainingResult:
    random = np.random.default_rng(seed)
    time = np.arange(num_steps) / max(num_steps, 1)
    losses = level * (0.55 + 0.45 * np.exp(-5 * time)) + random.normal(0, 0.05 * level, num_steps)
    steps = [Step(k + 1, float(losses[k].clip(0.02)), 0.2, 2e-4, 4096, 900) for k in range(num_steps)]
    seconds = num_steps * float(random.uniform(1.6, 2.4))
    metrics = TrainingMetrics(
        train_initial_loss=steps[0].loss, train_final_loss=steps[-1].loss, train_loss=float(losses.mean()),
        train_seconds=seconds, num_train_examples=num_steps * 16, num_train_steps=num_steps,
        num_train_tokens=4096 * num_steps, num_supervised_tokens=900 * num_steps,
        train_samples_per_second=16 * num_steps / seconds, train_steps_per_second=num_steps / seconds,
        train_tokens_per_second=4096 * num_steps / seconds, peak_memory_bytes=int(19e9 + 1e9 * random.random()),
        micro_batch_size=4, num_oom_backoffs=0, packed=True, graphed=False, num_adapters=1,
    )  # fmt: skip
    return TrainingResult(metrics, steps)


def make_features(seed: int, quality: float) -> dict[str, Any]:
    """A value for each column within its range; a few have to do with ``quality``."""
    random = np.random.default_rng([seed, 1])  # not the draws that made the quality
    related = {"approximate_duplicates": -0.8, "base_model_perplexity": -0.7, "gradient_consistency": 0.6}
    values: dict[str, Any] = {}
    for column in FEATURE_COLUMNS:
        weight = related.get(column.name, 0.0)
        z = weight * quality + np.sqrt(1 - weight**2) * random.normal()
        share = 1 / (1 + np.exp(-z))
        if column.unit == "text":
            values[column.name] = ""
        elif column.unit in {"records", "characters", "examples"}:
            values[column.name] = int(np.exp(7 + z) * (300 if column.unit == "characters" else 1))
        elif np.isfinite([column.minimum, column.maximum]).all():
            values[column.name] = float(column.minimum + share * (column.maximum - column.minimum))
        elif column.unit == "features":
            values[column.name] = 0
        else:
            values[column.name] = float(max(column.minimum, 1.0 if column.minimum > 0 else 0.0) + np.exp(1 + z))
    return values


def make_config(root: Path, **options: Any) -> Config:
    return load_config(model="meta-llama/Meta-Llama-3-8B-Instruct", chunk="chunk_042", output=root.parent, **options)


def make_experiment(name: str, settings: dict[str, Any], error: str = "") -> Experiment:
    return Experiment(safe_name(name, settings), name, f"/data/{name}.json", settings, digest([name, settings]),
                      {}, digest("base"), digest(name), error=error)  # fmt: skip


def write_run(
    root: Path,
    names: list[str],
    *,
    sizes: dict[str, int] | None = None,
    stages: tuple[str, ...] = ("features", "train", "mmlu"),
    num_failed: int = 0,
    grid: dict[str, list[Any]] | None = None,
    scores: tuple[Score, ...] = (),
) -> list[ResultRow]:
    """A run's folder, as it is when the run has ended; the last ``num_failed`` datasets failed.

    ``scores``, if given: the base's, and one for each dataset.
    """
    config, store = make_config(root, grid=grid or {}, stages=stages), Store(root)
    store.open(fresh=False)
    sizes = sizes or dict.fromkeys(SUBJECT_GROUPS, 5)
    base = scores[0] if scores else make_score(1, sizes, None, 0.0)
    path = store.base_file(digest("base"), "scores.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    if "mmlu" in stages:
        save_score(base, path)
    rows = []
    for number, name in enumerate(names):
        for k, method in enumerate(config.grid_methods()):
            experiment = make_experiment(name, method.model_dump(mode="json"))
            folder = store.folder(experiment)
            folder.mkdir(parents=True, exist_ok=True)
            store.log_path(experiment).write_text("finished: ok\n", encoding="utf-8")
            if number >= len(names) - num_failed:
                text, kind = CAUSES[number % len(CAUSES)]
                row = error_row(config, experiment, text.format(name), kind, num_attempts=2)
            else:
                score = scores[number + 1] if scores else None
                row = make_row(config, experiment, "ok", **_stages(folder, stages, number, k, sizes, base, score))
            store.write_row(experiment, row)
            rows.append(row)
    store.write_tables(rows, ROW_COLUMNS)
    store.write_manifest(
        {
            "chunk": root.name,
            "started": "2026-03-14T22:10:05+0000",
            "base_key": digest("base"),
            "configuration": config.model_dump(mode="json"),
            "hashes": {"model": digest("model"), "questions": digest("questions")},
            "data_hashes": {name: digest(name) for name in names},
            "versions": {"python": "3.11.9", **{name: version_of(name) for name in PACKAGES}},
            "machine": {
                "platform": "Linux-6.1-x86_64",
                "cores": 96,
                "memory_bytes": 2**40,
                "gpus": ["NVIDIA H100"] * 8,
            },
        }
    )
    return rows


def write_transfer(root: Path, rows: list[ResultRow], seed: int = 0, num_examples: int = 50) -> None:
    """What ``--transfer`` adds to such a run: cells drawn at random, an adapter's own dataset the most helped."""
    random, store = np.random.default_rng(seed), Store(root)
    good = [row for row in rows if row.ok]
    names = list(dict.fromkeys(row.values["dataset"] for row in good))
    levels = dict(zip(names, random.uniform(0.8, 2.5, len(names)), strict=True))
    for row in good:
        own, cells = row.values["dataset"], {}
        for name in names:
            before = levels[name] * random.lognormal(0, 0.3, num_examples)
            effect = -0.25 if name == own else float(random.choice([0, 0, -0.05, 0.06]))
            after = before + effect + random.normal(0, 0.1, num_examples)
            held_out = pd.DataFrame({"conversation": range(num_examples), "num_supervised": 10})
            held_out = held_out.assign(base_loss=10 * before)
            cells[name] = cell_of(held_out, [ExampleLoss(10 * value, 10, value) for value in after])
        row.values.update(transfer_values(cells, own), num_held_out_examples=num_examples, transfer_seconds=31.0)
        table = pd.DataFrame([{"key": "", "on_dataset": n, "is_own": n == own, **c} for n, c in cells.items()])
        table.to_parquet(store.cells_path(row.values["experiment_id"]))
    store.write_tables(rows, ROW_COLUMNS)
    TransferTables(store).write(rows)


def _stages(
    folder: Path, stages: tuple[str, ...], number: int, k: int, sizes: dict, base: Score, score: Score | None
) -> dict[str, Any]:
    random = np.random.default_rng(number)
    quality, seed = float(random.normal()), 1000 * number + k
    values: dict[str, Any] = {"num_examples": 900 + number, "num_bad_records": 0, "num_lost_records": 0}
    values |= {"bad_records": "", "record_form": "question/answer", "ignored_keys": "id"}
    if number % 13 == 5:
        values |= {"num_bad_records": 2, "bad_records": "record 17: question is empty; record 40: nobody answers"}
    seconds = {}
    if "features" in stages:
        values |= make_features(number, quality)
        seconds |= {"static_seconds": float(random.uniform(20, 40)), "probe_seconds": float(random.uniform(50, 80))}
        seconds["features_seconds"] = seconds["static_seconds"] + seconds["probe_seconds"]
    if "train" in stages:
        training = make_training(seed, float(np.exp(0.3 - 0.2 * quality)) * 1.4, int(random.integers(60, 420)))
        values |= vars(training.metrics)
        pd.DataFrame(training.loss_curve()).to_csv(folder / "loss_curve.csv", index=False)
    if "mmlu" in stages:
        score = score or make_score(seed + 7, sizes, base, 0.022 * quality - 0.004)
        save_score(score, folder / "scores.parquet")
        values |= score_values(score, base)
        seconds["mmlu_seconds"] = float(random.uniform(380, 420))
    values |= seconds
    stage_names = ("features_seconds", "train_seconds", "mmlu_seconds")
    return {**values, "total_seconds": 9.0 + sum(values.get(name) or 0.0 for name in stage_names)}


# The sizes of the real benchmark's subjects run from 100 to 1534; these do too, with the largest as large as there.
REAL_SIZES = dict.fromkeys(SUBJECT_GROUPS, 100) | {
    "professional_law": 1534, "moral_scenarios": 895, "miscellaneous": 783, "professional_psychology": 612,
    "high_school_psychology": 545, "high_school_macroeconomics": 390, "elementary_mathematics": 378,
    "moral_disputes": 346, "prehistory": 324, "philosophy": 311, "high_school_biology": 310, "nutrition": 306,
    "professional_accounting": 282, "professional_medicine": 272, "high_school_mathematics": 270,
    "clinical_knowledge": 265, "security_studies": 245, "high_school_microeconomics": 238,
    "high_school_world_history": 237, "conceptual_physics": 235, "marketing": 234, "human_aging": 223,
    "high_school_statistics": 216, "high_school_us_history": 204, "high_school_chemistry": 203, "sociology": 201,
    "high_school_geography": 198,
}  # fmt: skip


def main() -> None:
    from raylora.report.page import write_report

    root, num = Path(sys.argv[1]), int(sys.argv[2])
    write_run(root, dataset_names(num), sizes=REAL_SIZES if num <= 50 else None, num_failed=min(3, num // 10))
    print(write_report(root))


if __name__ == "__main__":
    main()
