"""The report's results as plain values: which changes are significant, by subject, features, time, failures."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, rankdata, spearmanr

from raylora.errors import ErrorKind
from raylora.mmlu.paired import ALPHA, LETTER_MOVED, balanced_change, false_discovery, holm, mcnemar, verdicts
from raylora.mmlu.questions import LETTERS, subject_group
from raylora.mmlu.shrinkage import shrunk, stderr_of_interval
from raylora.mmlu.statistics import BALANCED_CHANGES, PREDICTION_SHARES, note_on_constant_answers
from raylora.report.read_run import Answers, FinishedRun, answers_of, loss_curve, read_base
from raylora.report.repeats import SeedLine, a_a_pairs, seed_lines
from raylora.rows import FEATURE_COLUMNS

MIN_DATASETS = 4
"""A rank correlation needs so many: a perfect one of three datasets still has p = 1/3."""
MAX_EXACT = 7
"""Up to so many datasets a p-value counts all their orders (7! = 5040); with more, Student's t is close enough."""
STAGES = {
    "static features": "static_seconds",
    "probe": "probe_seconds",
    "training": "train_seconds",
    "MMLU": "mmlu_seconds",
    "transfer": "transfer_seconds",
}
"""By stage, the column of its seconds."""
AGAIN = "; then the same command with --retry-failed"
ANEW = "; the same command then runs it again"
FIXES = {
    ErrorKind.DATA: "fix the file where the cause points" + ANEW,
    ErrorKind.TRUNCATED_FILE: "get the file again, or --salvage its complete records" + ANEW,
    ErrorKind.NOT_UTF8: "save the file as UTF-8" + ANEW,
    ErrorKind.BAD_RECORDS: "give its records a known form (docs/datasets.md)" + ANEW,
    ErrorKind.CHAT_TEMPLATE: "fix the dataset's roles, or take a model whose template knows them",
    ErrorKind.NO_SUPERVISED_TOKEN: "raise --max-length, or look at the dataset's answers",
    ErrorKind.USAGE: "as the cause says" + AGAIN,
    ErrorKind.QUESTIONS: "give that machine the questions of --mmlu; the same command tries it again",
    ErrorKind.MODEL: "fix it on the machine that the cause names; the same command tries it again",
    ErrorKind.TARGET_MODULES: "--target-modules with names of the cause, or auto; of experts with --lora-dropout 0",
    ErrorKind.ADAPTER: "add train to --stages; too large weights: lower --learning-rate; unreadable: remove it" + AGAIN,
    ErrorKind.CHANGED_MEANWHILE: "the same command runs it as it is now",
    ErrorKind.DATASET_GONE: "put its file back; the same command tries it again",
    ErrorKind.DIVERGED: "lower --learning-rate" + ANEW,
    ErrorKind.BASE_CHANGED: "the same command with --retry-failed; if it comes again, tell its authors",
    ErrorKind.OUT_OF_MEMORY: "one example does not fit: lower --max-length, or --quantization 4bit" + AGAIN,
    ErrorKind.NODE_OUT_OF_MEMORY: "fewer --num-workers, or a smaller --max-length" + AGAIN,
    ErrorKind.DOES_NOT_FIT: "--quantization 4bit, or a GPU with more memory that nobody else uses" + AGAIN,
    ErrorKind.GPU: "look at that machine's `nvidia-smi`; the same command tries it again",
    ErrorKind.CACHE_FULL: "make room, or set RAYLORA_CACHE; the same command tries it again",
    ErrorKind.TIMEOUT: "raise --timeout" + AGAIN,
    ErrorKind.WORKER_DIED: "look at the end of its log" + AGAIN,
    ErrorKind.NODE_LOST: "the same command with --retry-failed",
    ErrorKind.UNKNOWN: "look at the cause, and at the end of its log" + AGAIN,
}
"""What to do about each kind of error that a row can have. docs/troubleshooting.md says the same at length."""


def ranking(run: FinishedRun) -> dict[str, Any]:
    """Which experiments changed the accuracy, by McNemar's test and balanced accuracy, adjusted over all of them.

    Returns:
        ``rows``: numbers of the rows with MMLU; ``holm``: McNemar's p-values, adjusted, (rows of the table,), NaN in
        other rows; ``fdr``: the same, adjusted by Benjamini and Hochberg; ``accuracy_change_shrunk``: changes shrunk
        towards the mean of all (``shrinkage.shrunk``), NaN where there are fewer than three;
        ``verdicts``: of every row of the table (``paired.verdicts``); ``num_gains``, ``num_losses``,
        ``num_letters``: how many verdicts are ``gain``, ``loss`` and ``letter``; ``num_fdr``: gains and losses
        if p-values are adjusted by Benjamini and Hochberg in place of Holm; ``num_raw``: rows with an unadjusted
        p-value below ``alpha``; ``seeds``: None, or what ``_ranking_over_seeds`` adds where datasets were trained with
        several.
    """
    if lines := seed_lines(run):
        return _ranking_over_seeds(run, lines)
    raw = run.numbers("mcnemar_p_value").where(run.ok)
    change = run.numbers("accuracy_change").where(run.ok)
    raw = raw.where(change.notna())
    balanced = [run.numbers(name) for name in BALANCED_CHANGES]
    found, discovered = (verdicts(raw, change, *balanced, adjust=adjust) for adjust in (holm, false_discovery))
    stderrs = stderr_of_interval(run.numbers("accuracy_change_low"), run.numbers("accuracy_change_high"))
    return {
        "rows": np.flatnonzero(raw.notna()).tolist(),
        "holm": holm(raw).tolist(),
        "fdr": false_discovery(raw).tolist(),
        "accuracy_change_shrunk": shrunk(change.where(raw.notna()), stderrs).tolist(),
        "verdicts": found,
        "num_gains": found.count("gain"),
        "num_losses": found.count("loss"),
        "num_letters": found.count("letter"),
        "num_fdr": discovered.count("gain") + discovered.count("loss"),
        "num_raw": int((raw < ALPHA).sum()),
        "alpha": ALPHA,
        "seeds": None,
    }


def _ranking_over_seeds(run: FinishedRun, lines: list[SeedLine]) -> dict[str, Any]:
    """The ranking of a run with several seeds: a line for each dataset and set of hyperparameters.

    Returns:
        As ``ranking``. ``rows`` are the first rows of the lines, and a line's rows share its verdict and p-value.
        ``seeds`` has ``lines``, by first row: ``rows``, ``label``, ``change`` (their mean), ``low``, ``high``,
        ``p_value``, ``balanced``, ``seed_std`` (``mmlu.seeds``; a line of one seed has its row's own interval and
        McNemar's p-value; None where answers are missing); and what ``repeats.a_a_pairs`` returns.
    """
    found = [_line_values(run, line) for line in lines]
    names = ("p_value", "change", "balanced", "balanced_low", "balanced_high", "balanced_p_value")
    p_values, *changes, balanced_p_values = (np.array([v[name] for v in found], dtype=float) for name in names)
    shrunk_changes = shrunk(changes[0], stderr_of_interval(*([v[side] for v in found] for side in ("low", "high"))))
    called, discovered = (
        _called_over_seeds(p_values, changes, balanced_p_values, adjust) for adjust in (holm, false_discovery)
    )

    def by_row(of_lines: np.ndarray) -> list[float]:
        values = np.full(len(run.table), np.nan)
        for line, value in zip(lines, of_lines, strict=True):
            values[line.rows] = value
        return values.tolist()

    of_row = ["undecided"] * len(run.table)
    for line, verdict in zip(lines, called, strict=True):
        for row in line.rows:
            of_row[row] = verdict
    return {
        "rows": [line.rows[0] for line in lines],
        "holm": by_row(holm(p_values)),
        "fdr": by_row(false_discovery(p_values)),
        "accuracy_change_shrunk": by_row(shrunk_changes),
        "verdicts": of_row,
        "num_gains": called.count("gain"),
        "num_losses": called.count("loss"),
        "num_letters": called.count("letter"),
        "num_fdr": discovered.count("gain") + discovered.count("loss"),
        "num_raw": int((p_values < ALPHA).sum()),
        "alpha": ALPHA,
        "seeds": {"lines": {line.rows[0]: v for line, v in zip(lines, found, strict=True)}, **a_a_pairs(lines)},
    }


def _called_over_seeds(
    p_values: np.ndarray, changes: list[np.ndarray], balanced_p_values: np.ndarray, adjust: Callable[[Any], np.ndarray]
) -> list[str]:
    """Verdicts of lines. Balanced accuracy's p-value over seeds is Student's, not that of its interval as a normal."""
    called = verdicts(p_values, *changes, adjust=adjust)
    both = adjust(np.fmax(p_values, balanced_p_values))
    return ["undecided" if v in {"gain", "loss"} and not p < ALPHA else v for v, p in zip(called, both, strict=True)]


def _line_values(run: FinishedRun, line: SeedLine) -> dict[str, Any]:
    names = ("accuracy_change", "accuracy_change_low", "accuracy_change_high", "mcnemar_p_value", *BALANCED_CHANGES)
    means = {name: float(run.numbers(name)[line.rows].mean()) for name in names}
    values: dict[str, Any] = {"rows": line.rows, "label": line.label, "change": means["accuracy_change"]}
    no_seeds = ("balanced_p_value", "seed_std")
    if len(line.rows) == 1:
        own = dict(zip(("low", "high", "p_value", "balanced", "balanced_low", "balanced_high"), names[1:], strict=True))
        return values | {name: means[column] for name, column in own.items()} | dict.fromkeys(no_seeds)
    change, balanced = line.change(), line.change(balanced=True)
    if change is None or balanced is None:
        unknown = ("low", "high", "p_value", "balanced_low", "balanced_high", *no_seeds)
        return values | dict.fromkeys(unknown) | {"balanced": means[BALANCED_CHANGES[0]]}
    return values | {
        "low": change.low,
        "high": change.high,
        "p_value": change.p_value,
        "seed_std": change.seed_std,
        "balanced": balanced.mean,
        "balanced_low": balanced.low,
        "balanced_high": balanced.high,
        "balanced_p_value": balanced.p_value,
    }


def subjects(run: FinishedRun) -> dict[str, Any] | None:
    """Questions gained and lost by experiment and subject, with p-values Holm-adjusted over an experiment's subjects.

    Returns:
        ``names``, ``groups``, ``sizes`` (questions), ``base`` (its accuracies, 0 to 1), each (S,) by subject;
        ``rows``: by row number, ``gained``, ``lost``, ``holm``, ``verdicts``, each (S,); ``num_left_out``: rows with
        MMLU whose answers are missing, or are to other questions. None if no row has answers.
    """
    bases, evaluated = read_base(run), np.flatnonzero(run.numbers("accuracy_change").notna() & run.ok)
    reference: Answers | None = None
    rows: dict[int, dict[str, list[Any]]] = {}
    for row in evaluated.tolist():
        pair = answers_of(run, row, bases)
        if pair is None:
            continue
        answers, base = pair
        if reference is None:
            reference = base
            names, codes = np.unique(base.subjects.to_numpy().astype(str), return_inverse=True)
            letters = np.unique(base.right_letters.to_numpy().astype(str), return_inverse=True)[1]
        if base.same_questions(reference):
            rows[row] = correct_by_subject(answers.correct, base.correct, codes, letters)
    if reference is None:
        return None
    sizes = np.bincount(codes, minlength=len(names))
    num_correct = np.bincount(codes, weights=reference.correct, minlength=len(names))
    return {
        "names": names.tolist(),
        "groups": list(map(subject_group, names)),
        "sizes": sizes.tolist(),
        "base": (num_correct / sizes).tolist(),
        "rows": rows,
        "num_left_out": len(evaluated) - len(rows),
    }


def correct_by_subject(
    ours: np.ndarray, base: np.ndarray, codes: np.ndarray, letters: np.ndarray
) -> dict[str, list[Any]]:
    """Questions that an adapter gained and lost against the base, by subject, and whether that is significant.

    Args:
        ours, base: whether the adapter's, and the base's, answers are correct; booleans, (N,).
        codes: each question's subject, 0 to S - 1, (N,).
        letters: the number of each question's right letter, (N,).

    Returns:
        ``gained``, ``lost``, ``holm`` (adjusted p-values of McNemar's test) and ``verdicts``, each (S,): the same as
        ``mmlu.statistics.compare_subjects``.
    """
    shape = codes.max() + 1, letters.max() + 1

    def counts(where: np.ndarray) -> np.ndarray:
        cells = np.ravel_multi_index((codes[where], letters[where]), shape)
        return np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)

    by_letter = counts(ours & ~base), counts(base & ~ours), counts(np.ones(len(codes), dtype=bool))
    gained, lost = (of_letters.sum(axis=1) for of_letters in by_letter[:2])
    p_values = mcnemar(gained, lost)
    found = verdicts(p_values, gained - lost, *balanced_change(*by_letter))
    return {"gained": gained.tolist(), "lost": lost.tolist(), "holm": holm(p_values).tolist(), "verdicts": found}


def features(run: FinishedRun) -> dict[str, Any]:
    """Spearman's rank correlation of every feature with the change in accuracy (not the balanced one), over datasets.

    Experiments of one dataset (a grid) count once, by their means: they share the data, so they are not independent.

    Returns:
        ``columns``: of each feature ``name, group, unit, definition, rho, p_value, q_value`` (Benjamini and Hochberg
        1995), ``num`` datasets with both values; ``num_tested``; ``num_expected``: p-values below ``ALPHA`` if no
        feature had anything to do with the change; ``num_raw`` and ``num_adjusted``: how many are.
    """
    names = [column.name for column in FEATURE_COLUMNS if column.unit != "text" and column.group != "bookkeeping"]
    table = pd.DataFrame({name: run.numbers(name) for name in [*names, "accuracy_change"]})[run.ok]
    hashes = pd.Series(run.texts("data_hash"))
    keys = (pd.Series(run.texts("dataset")) + "\0" + hashes)[run.ok]
    means = table.groupby(keys).mean()
    columns: list[dict[str, Any]] = []
    for column in (c for c in FEATURE_COLUMNS if c.name in names):
        pairs = means[[column.name, "accuracy_change"]].dropna()
        rho, p_value = spearman(pairs[column.name].to_numpy(), pairs["accuracy_change"].to_numpy())
        columns.append(
            {
                "name": column.name,
                "group": column.group,
                "unit": column.unit,
                "definition": column.definition,
                "rho": rho,
                "p_value": p_value,
                "q_value": None,
                "num": len(pairs),
                "num_measured": int(means[column.name].notna().sum()),
            }
        )
    tested = [c for c in columns if c["p_value"] is not None]
    if tested:
        adjusted = false_discovery_control([c["p_value"] for c in tested])
        for c, q_value in zip(tested, adjusted, strict=True):
            c["q_value"] = float(q_value)
    return {
        "columns": columns,
        "num_datasets": len(means),
        "grouped": len(means) < len(table),
        "num_tested": len(tested),
        "num_expected": ALPHA * len(tested),
        "num_raw": sum(c["p_value"] < ALPHA for c in tested),
        "num_adjusted": sum(c["q_value"] < ALPHA for c in tested),
    }


def spearman(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    """Spearman's rank correlation of two (N,) arrays, and its two-sided p-value, exact up to ``MAX_EXACT`` datasets.

    None and None for fewer than ``MIN_DATASETS``, or where one array is constant.
    """
    if len(x) < MIN_DATASETS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None, None
    result = spearmanr(x, y)
    rho = float(result.statistic)
    if len(x) > MAX_EXACT:
        return rho, float(result.pvalue)
    ranks, others = rankdata(x), rankdata(y)
    orders = others[np.array(list(permutations(range(len(y)))))]
    products = (orders - orders.mean(axis=1, keepdims=True)) @ (ranks - ranks.mean())
    observed = (others - others.mean()) @ (ranks - ranks.mean())
    # 1e-9: of two equal products of ranks, floats may make the one a little smaller.
    return rho, float((np.abs(products) >= abs(observed) - 1e-9).mean())


def curves(run: FinishedRun) -> dict[int, dict[str, list[float]]]:
    """Loss curves by row number: ``steps`` and ``losses``."""
    by_row = {row: loss_curve(run, row) for row in range(len(run.table))}
    return {row: {"steps": c[0], "losses": c[1]} for row, c in by_row.items() if c}


def costs(run: FinishedRun) -> dict[str, Any]:
    """A worker's seconds by row and stage; ``other`` are those of no stage: loading, waiting, writing.

    The total of a row whose stages an earlier run did leaves these out, and may be less than their sum: its ``other``
    is then 0.
    """
    seconds = pd.DataFrame({stage: run.numbers(column) for stage, column in STAGES.items()})
    other = (run.numbers("total_seconds") - seconds.sum(axis=1)).clip(lower=0)
    seconds["other"] = other
    machine = run.manifest.get("machine")
    gpus = machine.get("gpus") if isinstance(machine, dict) else None
    if used := sorted(set(run.texts("device")) - {"", "cpu"}):
        gpus = used  # those of the rows: on a cluster, the command's own machine may have no GPU
    return {
        "stages": list(seconds.columns),
        "seconds": [seconds[stage].tolist() for stage in seconds.columns],
        "totals": seconds.sum().tolist(),
        "gpus": [str(gpu) for gpu in gpus] if isinstance(gpus, list) else [],
    }


def failures(run: FinishedRun) -> list[dict[str, Any]]:
    """For each failed row: its number ``row``, the ``cause``, and what to do, the ``fix``."""
    texts, kinds = run.texts("error"), run.texts("error_kind")
    return [
        {"row": row, "cause": texts[row] or "no cause was written down", "fix": fix_of(kinds[row])}
        for row in np.flatnonzero(~run.ok).tolist()
    ]


def fix_of(kind: str) -> str:
    """What to do about an ``error_kind``. Rows of older runs have none, and get the advice for an unknown cause."""
    return FIXES.get(ErrorKind(kind), FIXES[ErrorKind.UNKNOWN])


def oddities(run: FinishedRun, ranked: dict[str, Any]) -> list[dict[str, Any]]:
    """What is no failure and yet worth a look: the row's number ``row`` and ``what``; a row may have several.

    Args:
        ranked: from ``ranking``.
    """
    entries = []
    unparsed, num_questions = run.numbers("num_unparsed"), run.numbers("total_questions")
    counts = {
        "num_bad_records": "{:.0f} records left out",
        "num_lost_records": "{:.0f} records lost behind the place where the file breaks off",
        "num_truncated": "{:.0f} questions with a cut prompt",
        "num_oom_backoffs": "training halved its minibatch {:.0f} times: out of memory",
        "mmlu_oom_backoffs": "MMLU halved its batch {:.0f} times: out of memory",
    }
    columns = {name: run.numbers(name) for name in counts}
    reasons = run.texts("bad_records")
    notes = {name: run.texts(name) for name in ("template_note", "train_notes", "feature_notes")}
    moved, constant = favourite_letters(run, ranked), constant_answers(run)
    for row in np.flatnonzero(run.ok).tolist():
        for name, text in counts.items():
            value = columns[name][row]
            if value == -1:  # num_lost_records, where nobody can know how many
                entries.append({"row": row, "what": "records lost behind the place where the file breaks off"})
            elif value > 0:
                why = f": {reasons[row]}" if name == "num_bad_records" and reasons[row] else ""
                entries.append({"row": row, "what": text.format(value) + why})
        if unparsed[row] > 0:
            share = unparsed[row] / num_questions[row] if num_questions[row] > 0 else 1
            entries.append({"row": row, "what": f"{unparsed[row]:.0f} answers ({share:.1%}) name no letter: wrong"})
        if row in moved:
            entries.append({"row": row, "what": moved[row]})
        if row in constant:
            entries.append({"row": row, "what": f"the model {constant[row]}"})
        for name in ("template_note", "train_notes"):
            if notes[name][row]:
                entries.append({"row": row, "what": notes[name][row]})
        if notes["feature_notes"][row]:
            entries.append({"row": row, "what": f"features: {notes['feature_notes'][row]}"})
    return entries


def constant_answers(run: FinishedRun, prefix: str = "") -> dict[int, str]:
    """By good row whose model answers (nearly) all questions with one letter: ``note_on_constant_answers``.

    Args:
        prefix: ``base_`` for the base, empty for the adapter.
    """
    shares = [run.numbers(f"{prefix}{name}") for name in PREDICTION_SHARES]
    num_questions, scorings = run.numbers("total_questions"), run.texts("scoring")
    notes = {
        row: note_on_constant_answers([values[row] for values in shares], num_questions[row], scorings[row])
        for row in np.flatnonzero(run.ok).tolist()
    }
    return {row: note for row, note in notes.items() if note}


def notes_on_constant_answers(run: FinishedRun, ranked: dict[str, Any]) -> list[str]:
    """Lines for a run in which letters show little: the base, and how many adapters, answer with one letter.

    Of the base alone nothing is said: where adapters answer with several letters, letters do show a change.

    Args:
        ranked: from ``ranking``.
    """
    asked = np.flatnonzero(run.numbers("accuracy_change").notna() & run.ok).tolist()
    adapters = {row: note for row, note in constant_answers(run).items() if row in asked}
    if not ranked["rows"] or not adapters:
        return []
    of_base = constant_answers(run, "base_").get(ranked["rows"][0])
    lines = [f"The base {of_base}."] if of_base else []
    if len(adapters) == 1:
        ((row, note),) = adapters.items()
        return [*lines, f"{run.labels[row]}: the model {note}."]
    what = f"{len(adapters)} of {len(asked)} adapters answer one letter to nearly all questions"
    return [*lines, f"{what}: letters cannot show a change; try --scoring cloze."]


def favourite_letters(run: FinishedRun, ranked: dict[str, Any]) -> dict[int, str]:
    """By row whose verdict is ``letter``: how often base and adapter answered each letter, and balanced accuracy.

    Of several seeds the first row stands for all.

    Args:
        ranked: from ``ranking``.
    """
    shares = {name: (run.numbers(f"base_{name}"), run.numbers(name)) for name in PREDICTION_SHARES}
    changes = [run.numbers(name) for name in BALANCED_CHANGES]
    texts = {}
    for row in (i for i in sorted(ranked["rows"]) if ranked["verdicts"][i] == "letter"):
        letters = ", ".join(
            f"{letter} {before[row]:.0%} to {after[row]:.0%}"
            for letter, (before, after) in zip(LETTERS, shares.values(), strict=True)
            if not np.isnan(before[row] + after[row])
        )
        change, low, high = (100 * values[row] for values in changes)
        balanced = f"balanced accuracy {change:+.1f} points, {low:+.1f} to {high:+.1f}"
        texts[row] = f"{LETTER_MOVED}: {letters} of its answers; {balanced}"
    return texts
