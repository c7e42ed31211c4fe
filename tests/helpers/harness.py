"""lm-evaluation-harness on a live model and local questions: the reference that MMLU's scores are held against.

    python -m tests.helpers.harness    # records data/mmlu_reference.json anew (20 minutes on two cores)

Prompts come from the harness's own task files, log-likelihoods from its ``hf`` backend, accuracies from its groups.
Only the place of the data is ours, as there is no hub.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylora.mmlu.questions import load_questions
from raylora.records import Question
from tests.helpers import DATA

RECORDED = DATA / "mmlu_reference.json"
SHOTS = (0, 1, 5)


def write_tasks(
    folder: Path, questions: Sequence[Question], dev: dict[str, list[Question]], kind: str = "default"
) -> Path:
    """The harness's MMLU task files with local data: ``questions`` as the test split, ``dev`` as the solved ones.

    Args:
        kind: ``default``, where letters are scored, or ``continuation``, where texts of choices are.
    """
    import lm_eval

    original = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / kind
    tasks, data = folder / "tasks", folder / "data"
    shutil.copytree(original, tasks)
    template = tasks / f"_{kind}_template_yaml"
    template.write_text(template.read_text().replace("dataset_path: cais/mmlu", f"dataset_path: {data}"))
    by_subject = defaultdict(list)
    for question in questions:
        by_subject[question.subject].append(question)
    readme = ["---", "configs:"]
    for subject, group in by_subject.items():
        readme += [f"- config_name: {subject}", "  data_files:"]
        for split, part in (("test", group), ("dev", dev.get(subject) or group[:1])):
            path = data / subject / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(asdict(q)) + "\n" for q in part))
            readme += [f"  - split: {split}", f"    path: {subject}/{split}.jsonl"]
    (data / "README.md").write_text("\n".join([*readme, "---", ""]))
    return tasks


def make_lm(model: Any, tokenizer: Any, batch_size: int = 4, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device), **options)


def run_harness(
    lm: Any, tasks: Path, num_fewshot: int, names: Sequence[str] = ("mmlu",)
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Log-likelihoods of the choices by question id, and the harness's own results by task and group.

    Args:
        names: of tasks; those of subjects without questions cannot be run.
    """
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = str(tasks.parent / "cache")
    manager = TaskManager(include_defaults=False, include_path=str(tasks))
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[*names], num_fewshot=num_fewshot, task_manager=manager, bootstrap_iters=1
    )
    logprobs = {}
    for samples in found["samples"].values():
        for sample in samples:
            # A response is (log-likelihood, whether it is what greedy decoding would write).
            logprobs[sample["doc"]["question_id"]] = [float(ll) for ll, _ in sample["filtered_resps"]]
    return logprobs, {**found["results"], **found.get("groups", {})}


def score_strings(lm: Any, questions: Sequence[Question], contexts: Sequence[str]) -> dict[str, list[float]]:
    """Log-likelihoods of the bare letters behind given texts, by question id: for prompts the harness does not make."""
    from lm_eval.api.instance import Instance

    requests = [
        Instance("loglikelihood", {}, (context, letter), i) for i, context in enumerate(contexts) for letter in "ABCD"
    ]
    found = [float(ll) for ll, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    return {q.question_id: found[4 * i : 4 * i + 4] for i, q in enumerate(questions)}


def chat_contexts(tokenizer: Any, questions: Sequence[Question], shots: dict[str, list[Question]]) -> Iterator[str]:
    from raylora.mmlu.prompts import chat_prompt

    return (chat_prompt(tokenizer, q, shots.get(q.subject, [])) for q in questions)


def reference_questions(shared: Path) -> tuple[list[Question], dict[str, list[Question]]]:
    """A real question of each of the 57 subjects, the shortest of its first twenty, and five solved ones.

    The dev split here lacks four questions: the last ones of the test split take their places.
    """
    everything = load_questions(shared / "mmlu" / "test_all_subjects.json")
    dev: dict[str, list[Question]] = defaultdict(list)
    for question in load_questions(shared / "mmlu" / "dev_all_subjects.json"):
        dev[question.subject].append(question)
    by_subject = defaultdict(list)
    for question in everything:
        by_subject[question.subject].append(question)
    chosen = []
    for subject, group in by_subject.items():
        chosen.append(min(group[:20], key=lambda q: len(q.question) + sum(map(len, q.choices))))
        dev[subject] = [*dev[subject], *group[::-1]][:5]
    return chosen, dev


@contextmanager
def fixed_adapter(loaded: Any) -> Iterator[None]:
    """An adapter that moves every layer, with weights from numpy's legacy generator: the same wherever it is made."""
    from raylora.config.method import Method

    parameters = loaded.attach(Method(lora_dropout=0.0), seed=0)
    random = np.random.RandomState(0)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.tensor(random.standard_normal(tuple(p.shape)) * 0.02, dtype=p.dtype))
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        loaded.detach()


def reference(loaded: Any, questions: Sequence[Question], dev: dict, style: str, n: int, folder: Path) -> dict:
    """The harness's log-likelihoods in one setting."""
    lm = make_lm(loaded.model, loaded.tokenizer)
    if style == "chat":
        shots = {subject: group[:n] for subject, group in dev.items()}
        return score_strings(lm, questions, list(chat_contexts(loaded.tokenizer, questions, shots)))
    kind, ending = ("continuation", "_continuation") if style == "cloze" else ("default", "")
    names = sorted({f"mmlu_{q.subject}{ending}" for q in questions})
    return run_harness(lm, write_tasks(folder, questions, dev, kind), n, names)[0]


def main() -> None:
    import os
    import tempfile
    from contextlib import nullcontext

    from raylora.config.options import ModelOptions
    from raylora.model.loading import load_model

    shared = Path(os.environ.get("RAYLORA_SHARED_DATA", "../shared/data"))
    questions, dev = reference_questions(shared)
    loaded = load_model(ModelOptions(model="demo", quantization="none"))
    recorded = {}
    for who in ("base", "adapter"):
        with fixed_adapter(loaded) if who == "adapter" else nullcontext():
            for style, n in (*itertools.product(("harness", "chat"), SHOTS), ("cloze", 0), ("cloze", 5)):
                # Texts of choices behind five shots take the harness four times as long as letters do.
                some = questions[::12] if (style, n) == ("cloze", 5) else questions
                with tempfile.TemporaryDirectory() as folder:
                    found = reference(loaded, some, dev, style, n, Path(folder))
                recorded[f"{who}/{style}/{n}"] = {k: [round(x, 5) for x in v] for k, v in sorted(found.items())}
                print(who, style, n, len(found), flush=True)
    RECORDED.parent.mkdir(exist_ok=True)
    lines = [f'"{k}": {json.dumps(v, separators=(",", ":"))}' for k, v in recorded.items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
