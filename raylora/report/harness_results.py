"""``results.jsonl``: a run's scores as lm-evaluation-harness writes its own, a line for the base and one for each row.

    for line in open("results/chunk_001/results.jsonl"):
        print(lm_eval.utils.make_table(json.loads(line)))

A line is what ``results_*.json`` of lm-eval 0.4 holds. Tasks and groups of MMLU have the harness's names where its
subjects are asked; any other set of questions is one task. Where the harness would say 0 for a standard error of
answers that are all right, or all wrong, there is ``N/A``, its own word for one that is not known.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raylora import __version__
from raylora.config.options import DEMO
from raylora.mmlu.questions import SUBJECT_GROUPS
from raylora.mmlu.statistics import accuracies_of
from raylora.records import ResultRow
from raylora.report.read_run import UNREADABLE
from raylora.storage.digests import load_parquet
from raylora.storage.store import Store

FILE = "results.jsonl"
FURTHER_SET = re.compile(r"overall_accuracy\[(.+)\]")
_ORDER = ("stem", "other", "social_sciences", "humanities")
"""Of the groups in the harness's ``mmlu``."""
_LOADING: dict[str, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True},
    "fp8": {"quantization": "fp8"},
}
"""The harness's own arguments of a model, but for fp8, which it does not have."""


@dataclass(frozen=True)
class _Kind:
    """What the harness calls the tasks of one way of scoring."""

    suffix: str
    metric: str
    filter: str
    output_type: str
    versions: tuple[float, str]
    """Of a task, and of a group. They stand for prompts and scoring as ours are: tests/mmlu/test_parity.py."""
    groups: dict[str, str]

    def key(self, stderr: bool = False) -> str:
        return f"{self.metric}{'_stderr' if stderr else ''},{self.filter}"


_PLAIN_GROUPS = {name: name.replace("_", " ") for name in _ORDER}
_KINDS = {
    "letters": _Kind(
        "", "acc", "none", "multiple_choice", (1.0, "2"), {name: f"mmlu_{name}" for name in _ORDER}
    ),
    "cloze": _Kind("_continuation", "acc", "none", "multiple_choice", (1.0, "2"), _PLAIN_GROUPS),
    "generate": _Kind("_generative", "exact_match", "get_response", "generate_until", (3.0, "3"), _PLAIN_GROUPS),
}  # fmt: skip
_PER = {"choice": "acc", "character": "acc_norm", "byte": "acc_bytes", "token": "acc_per_token"}
"""The harness's name of a cloze accuracy, by what log-likelihoods are divided by; it has none of the last."""


@dataclass
class _Results:
    """The parts of a line that speak of tasks."""

    results: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    group_subtasks: dict[str, list[str]] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    num_shots: dict[str, int] = field(default_factory=dict)
    higher_is_better: dict[str, Any] = field(default_factory=dict)
    num_samples: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        names = {"num_shots": "n-shot", "num_samples": "n-samples"}
        return {names.get(name, name): value for name, value in vars(self).items()}


class HarnessResults:
    """Writes ``results.jsonl`` from the rows and the scores that their experiments have stored.

    Pickled for the sink's process.

    Args:
        base_key: of the base's score, as in ``Experiment``.
        question_sets: the file of each set of questions by its name; the first one's name is empty.
    """

    def __init__(self, store: Store, base_key: str, question_sets: dict[str, str | None]) -> None:
        self._store, self._base_key, self._question_sets = store, base_key, question_sets

    def write(self, rows: Sequence[ResultRow]) -> None:
        """Write the file, atomically. An error row has no line, and neither has one whose scores cannot be read.

        Raises:
            OSError: it cannot be written.
        """
        good = [row for row in rows if row.ok and row.values.get("overall_accuracy") is not None]
        self._store.fetch_scores([str(row.values["experiment_id"]) for row in good], self._base_key)
        base = [self._line(good[0], is_base=True)] if good else []
        lines = filter(None, [*base, *(self._line(row) for row in good)])
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)

        def write(partial: Path) -> None:
            partial.write_text(text, encoding="utf-8")

        self._store.write_file(FILE, write)

    def _line(self, row: ResultRow, is_base: bool = False) -> dict[str, Any] | None:
        """The results of a row's adapter, or of its base."""
        values, experiment_id = row.values, str(row.values["experiment_id"])
        path = self._store.scores_of(experiment_id)
        if is_base:
            path = self._store.base_file(self._base_key, "scores.parquet")
        if (found := _read_scores(path)) is None:
            return None
        accuracies, date = found
        kind, results = _kind_of(values), _Results()
        if {*accuracies["subjects"]} <= {*SUBJECT_GROUPS}:
            self._add_mmlu(results, kind, accuracies, values)
        else:
            self._add_task(results, kind, self._name(""), accuracies["overall"], values, "")
        prefix = "base_" if is_base else ""
        for name in (match[1] for key in values if (match := FURTHER_SET.fullmatch(key))):
            whole = {
                "accuracy": values.get(f"{prefix}overall_accuracy[{name}]"),
                "stderr": values.get(f"{prefix}overall_stderr[{name}]"),
                "num_questions": values.get(f"total_questions[{name}]"),
            }
            if whole["accuracy"] is not None:
                self._add_task(results, kind, name, whole, values, name)
        adapter = None if is_base else str(self._store.shown(self._store.folder_of(experiment_id) / "adapter"))
        return {**results.as_json(), **_frame(values, adapter, date), "raylora": _origin(values, is_base)}

    def _add_mmlu(self, out: _Results, kind: _Kind, accuracies: dict[str, Any], values: dict[str, Any]) -> None:
        """The harness's ``mmlu``: its groups, and a task for each subject that was asked."""
        whole = f"mmlu{kind.suffix}"
        out.group_subtasks[whole] = []
        self._add_group(out, kind, whole, f"mmlu ({kind.suffix[1:]})" if kind.suffix else whole, accuracies["overall"])
        for group, name in kind.groups.items():
            subjects = [s for s in sorted(accuracies["subjects"]) if SUBJECT_GROUPS[s] == group]
            if not subjects:
                continue
            out.group_subtasks[whole].append(name)
            out.group_subtasks[name] = [f"mmlu_{s}{kind.suffix}" for s in subjects]
            self._add_group(out, kind, name, group.replace("_", " "), accuracies["groups"][group])
            for subject, task in zip(subjects, out.group_subtasks[name], strict=True):
                alias = task if kind.suffix else subject
                self._add_task(out, kind, task, accuracies["subjects"][subject], values, "", alias)
                out.configs[task]["dataset_name"] = subject
                if values.get("prompt_style") == "harness":
                    out.versions[task] = kind.versions[0]
        if values.get("prompt_style") == "harness":
            out.versions |= dict.fromkeys(out.groups, kind.versions[1])

    def _add_group(self, out: _Results, kind: _Kind, name: str, alias: str, found: dict[str, Any]) -> None:
        count = {"sample_count": {kind.key(): found["num_questions"]}}
        out.groups[name] = out.results[name] = {**_metrics(kind, name, alias, found), **count}
        out.higher_is_better[name] = {kind.metric: True}

    def _add_task(
        self,
        out: _Results,
        kind: _Kind,
        name: str,
        found: dict[str, Any],
        values: dict[str, Any],
        question_set: str,
        alias: str = "",
    ) -> None:
        """One task: a subject of MMLU, or all of another set of questions."""
        out.results[name] = _metrics(kind, name, alias or name, found)
        # What a mask leaves is asked like the first set, and has no column of its own for that.
        num_shots = values.get(f"num_fewshot[{question_set}]", values.get("num_fewshot")) or 0
        of_set = self._question_sets.get(question_set) or self._question_sets.get("")
        metric = {"metric": kind.metric, "aggregation": "mean", "higher_is_better": True}
        out.configs[name] = {
            "task": name,
            "task_alias": alias or name,
            "dataset_path": of_set,
            "output_type": kind.output_type,
            "num_fewshot": num_shots,
            "metric_list": [metric],
        }
        out.num_shots[name] = num_shots
        out.higher_is_better[name] = {kind.metric: True}
        num = found["num_questions"]
        # Of a sample it is not kept how many questions there are.
        out.num_samples[name] = {"original": None if values.get("max_samples") else num, "effective": num}

    def _name(self, question_set: str) -> str:
        """The task's name for a set of questions that is not MMLU: its file's, without the ending."""
        place = self._question_sets.get(question_set) or "questions"
        return place if place == DEMO else re.sub(r"[^\w.-]+", "_", Path(place).stem) or "questions"


def _kind_of(values: dict[str, Any]) -> _Kind:
    """What the harness calls the tasks of a row's scoring."""
    kind = _KINDS.get(str(values.get("scoring")), _KINDS["letters"])
    per = _PER.get(str(values.get("cloze_per")), "acc")
    return replace(kind, metric=per) if values.get("scoring") == "cloze" else kind


def _metrics(kind: _Kind, name: str, alias: str, found: dict[str, Any]) -> dict[str, Any]:
    stderr = "N/A" if found["stderr"] is None else found["stderr"]
    return {
        "name": name,
        "alias": alias,
        "sample_len": found["num_questions"],
        kind.key(): found["accuracy"],
        kind.key(stderr=True): stderr,
    }


def _frame(values: dict[str, Any], adapter: str | None, date: float) -> dict[str, Any]:
    """The parts of a line that speak of the model and the run."""
    model = values.get("model")
    arguments: dict[str, Any] = {"pretrained": model, **({"peft": adapter} if adapter else {})}
    arguments |= _LOADING.get(str(values.get("quantization")), {})
    name = adapter or str(model)
    seconds = values.get("mmlu_seconds") if adapter else None
    return {
        "config": {
            "model": "hf",
            "model_args": arguments,
            "batch_size": None,
            "device": values.get("device"),
            "use_cache": None,
            "limit": values.get("max_samples"),
            "bootstrap_iters": 0,
            "gen_kwargs": None,
            "random_seed": values.get("question_seed"),
        },
        "git_hash": None,
        "date": date,
        "model_source": "hf",
        "model_name": name,
        "model_name_sanitized": re.sub(r"[\"<>:/|\\?*\[\]]+", "__", name),
        "system_instruction": None,
        "fewshot_as_multiturn": values.get("prompt_style") == "chat" and bool(values.get("num_fewshot")),
        "total_evaluation_time_seconds": None if seconds is None else str(seconds),
    }


def _origin(values: dict[str, Any], is_base: bool) -> dict[str, Any]:
    """Which row of ``results.csv`` it is."""
    names = () if is_base else ("dataset", "experiment_id", "data_hash", "seed")
    return {"version": __version__, "is_base": is_base, **{name: values.get(name) for name in names}}


def _read_scores(path: Path) -> tuple[dict[str, Any], float] | None:
    """Accuracies of a score's file, and when it was written (Unix time); None where there is none to be read."""
    try:
        return _accuracies_of(path, path.stat().st_mtime_ns), path.stat().st_mtime
    except UNREADABLE:
        return None


@functools.lru_cache(maxsize=4096)  # the sink writes the file again and again, from the same scores and a few new ones
def _accuracies_of(path: Path, _: int) -> dict[str, Any]:
    return accuracies_of(load_parquet(path, ["subject", "correct"]))
