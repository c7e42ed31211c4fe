"""Every command that the documentation shows, and which of them are run by which test.

A command stands in an indented or fenced shell block, in backticks, or at the top of a file of ``cluster/`` and
``configs/``. ``RUN`` and ``NOT_RUN`` together must hold every one of them: a new one that is in neither is a failure of
``tests/whole/test_docs.py``, and so is an entry that no page shows any more.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests.helpers import ROOT

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
OPENINGS = (*sorted((ROOT / "cluster").iterdir()), *sorted((ROOT / "configs").glob("*.yaml")))
PROGRAMS = {
    ".", "cd", "cp", "curl", "docker", "export", "git", "grep", "helm", "hf", "kubectl", "ls", "make", "mkdir",
    "mlflow", "pip", "prometheus", "python", "ray", "raylora", "rm", "sbatch", "squeue", "srun", "ssh", "tail",
    "tensorboard", "wget",
}  # fmt: skip
"""A block one of whose lines begins with one of these is a shell block: each of its lines is a command."""


@dataclass(frozen=True)
class Command:
    """One command line, and the page it stands on."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def raylora(self) -> list[str] | None:
        """The command of raylora within it, from the module's name on: ``["raylora.batch", "--chunk", ...]``."""
        words = self.words
        words = words[: words.index(">")] if ">" in words else words
        if words[0] == "raylora":
            return [f"raylora.{words[1]}", *words[2:]]
        for i in range(len(words) - 2):
            if words[i : i + 2] == ["python", "-m"] and words[i + 2].startswith("raylora."):
                return words[i + 2 :]
        return ["raylora.batch", *words[2:]] if words[:2] == ["sbatch", "cluster/slurm.sh"] else None


# What is run. Letters in capitals stand for something of the user's: see the tests for what they are given.

RUN = {
    # tests/whole/test_docs_run.py: on a folder that is laid out as the README says, in this order
    "the user's own data": (
        "export MODEL_NAME=meta-llama/Meta-Llama-3-8B-Instruct",
        "python -m raylora.batch --chunk chunk_001 --dry-run",
        "python -m raylora.batch --chunk chunk_001",
        "python -m raylora.batch --config configs/llama3-8b-8bit.yaml --chunk chunk_001",
        "python -m raylora.batch --config configs/qwen2.5-7b-4bit.yaml --chunk chunk_001",
        "python -m raylora.report results/chunk_001",
        "python -m raylora.predict fit results/chunk_001",
        "python -m raylora.predict fit results/chunk_001 --target accuracy_change",
        "python -m raylora.predict explain results/predictor",
        "python -m raylora.predict predict results/predictor results/chunk_001",
        "python -m raylora.rank --chunk chunk_002",
        "python -m raylora.rank --chunk chunk_002 --predictor results/predictor --budget 5",
        "python -m raylora.batch --chunk chunk_002 --order results/chunk_002/ranking.csv --max-experiments 5",
        "python -m raylora.experiment FILE --model demo --mmlu demo",
        "python -m raylora.mmlu --model M --adapter DIR --questions FILE",
        "python -m raylora.mmlu --model M --adapter DIR OTHER-DIR --questions FILE --num-fewshot 5",
        "python -m raylora.features --data-folder D --model-path M --output-csv F",
        "python -m raylora.features --single-dataset FILE --model-path M --output-csv F",
        "python -m raylora.batch --chunk chunk_001 --repeats 5",
        "python -m raylora.batch --chunk chunk_001 --transfer",
        "python -m raylora.batch --chunk chunk_001 --mmlu own_test.json",
    ),
    "on a cluster": (
        "export RAY_AUTH_MODE=token",
        "ray get-auth-token",
        "ray job submit --address http://localhost:8265 -- python -m raylora.batch --address auto --chunk chunk_001 "
        "--model /shared/model --data-root /shared/data --mmlu /shared/mmlu/test_all_subjects.json "
        "--output /shared/results",
        "python -m raylora.batch --chunk chunk_001 --address auto",
        "python -m raylora.batch --config configs/many-gpus.yaml --chunk chunk_001 --address auto",
    ),
    "on an object store": (
        "python -m raylora.batch --chunk chunk_001 --data-root s3://bucket/data "
        "--mmlu s3://bucket/mmlu/test_all_subjects.json --output s3://bucket/results",
    ),
    "a new stage": ("python -m raylora.experiment FILE --model demo --stages train,recall",),
    # tests/whole/test_monitoring.py, with the session's own folder in the place of the latest one's
    "a run to watch": (
        "prometheus --config.file /tmp/ray/session_latest/metrics/prometheus/prometheus.yml",
        "cp cluster/grafana-dashboard.json /tmp/ray/session_latest/metrics/grafana/dashboards/",
    ),
    # tests/whole/test_docs_run.py
    "setting up": (
        "pip install -c constraints.txt -e .",
        "pip install -c constraints.txt -e '.[mlflow]'",
        "pip install -c constraints.txt -e '.[s3]'",
        ". .venv/bin/activate",
        "ray get-auth-token --generate",
    ),
    "a made-up run": ("python -m tests.helpers.runs FOLDER 40",),
    # tests/commands/test_run_command.py
    "the program": (
        "raylora completion bash > ~/.local/share/bash-completion/completions/raylora",
        "raylora completion zsh > ~/.zfunc/_raylora",
        "raylora schema > raylora.schema.json",
    ),
    # tests/whole/test_docs.py
    "a new question set": ("python -m raylora.mmlu --model demo --questions own_test.json --num-fewshot 1",),
    "the columns": ("python -m raylora.features --describe",),
}

# What is not run, by what it begins with, and why. Its options and files are checked in tests/whole/test_docs.py.

NOT_RUN = {
    "raylora questions mmlu": "needs the Hugging Face hub (tests/commands/test_questions.py has a stand-in)",
    "raylora merge": "wants a run's adapter (tests/commands/test_merge.py)",
    "hf auth login": "wants a token of the hub",
    "python -m raylora.batch --chunk chunk_001 --push-to-hub": "pushes to the hub; tests/run/test_pushes.py has a "
    "stand-in",
    "raylora experiment hf://": "needs the Hugging Face hub (tests/planning/test_plan.py has a stand-in)",
    "python -m raylora.batch --dataset hf://": "so does this",
    "hf download": "needs the Hugging Face hub; tests/mmlu/test_question_forms.py writes files as they are there",
    "python -m raylora.batch --chunk chunk_001 --questions": "is on the hub; tests/experiment/test_story.py has sets",
    "python -m raylora.mmlu --model M --adapter DIR --questions FILE --questions": "so are these",
    "python -m raylora.batch --chunk chunk_001 --mask": "the mask is on the hub; tests/mmlu/test_mask.py has its form",
    "raylora batch": "is python -m raylora.batch under another name",
    "make demo": "minutes, and an environment of its own; tests/whole/test_end_to_end.py runs two of its datasets",
    "make test": "is what runs this",
    ". .venv/bin/activate && pip install pre-commit": "puts hooks into this repository",
    "python -m benchmarks.statistics": "simulates for minutes",
    "python -m benchmarks.outcomes": "wants a run of many datasets (tests/whole/test_outcomes_benchmark.py)",
    "make check": "is run for every change (.ci/run), and takes a minute",
    "python -m raylora.batch --config configs/demo.yaml": "what make demo runs",
    "python -m tests.helpers.demo": "runs the demo, and writes README's example and picture from it",
    "ray up": "starts machines (by hand, on two of our own: benchmarks/NOTES.md)",
    "ray down": "stops machines",
    "ray exec": "wants the machines of ray up",
    "ray attach": "wants the machines of ray up",
    "ray dashboard": "wants the machines of ray up",
    "ray job submit --no-wait": "wants a cluster and a bucket of the user's; a like one is run locally",
    "python cluster/request_gpus.py": "tests/whole/test_cluster_job.py runs it on a local cluster",
    "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN": "wants a secret of Kubernetes",
    "sbatch cluster/slurm.sh": "wants SLURM (by hand: benchmarks/NOTES.md); test_cluster_job.py runs the script",
    "srun": "no SLURM here",
    "squeue": "no SLURM here",
    "tail -f raylora-JOBID.out": "no SLURM here",
    "ssh -L": "no other machine here",
    "docker": "would build an image of gigabytes",
    "helm": "no Kubernetes here",
    "kubectl": "no Kubernetes here; the manifests are held against the schemas in tests/whole/test_cluster_files.py",
    "ray metrics launch-prometheus": "downloads Prometheus",
    "grafana-server": "wants Grafana on the head node",
}


def all_commands() -> list[Command]:
    """In the order of the pages; what stands twice comes twice."""
    found = [Command(page.name, text) for page in PAGES for text in commands_of_page(page.read_text(encoding="utf-8"))]
    for file in OPENINGS:
        name = file.relative_to(ROOT).as_posix()
        found += [Command(name, text) for text in commands_of_page(opening_of(file.read_text(encoding="utf-8")))]
    return found


def opening_of(text: str) -> str:
    """The comment, or the docstring, that a file opens with, as a page."""
    if text.startswith('"""'):
        return text.split('"""')[1]
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or line.startswith("#SBATCH"):
            break
        lines += ["", f"    {line[1:].strip()}"] if line.startswith("#   ") else [line[2:]]
    return "\n".join(lines)


def commands_of_page(text: str) -> list[str]:
    found = []
    prose = []
    for kind, lines in parts_of_page(text):
        if kind == "text":
            prose.append("\n".join(lines))
        elif kind in {"", "sh", "bash", "console", "shell"} and any(_program(line) in PROGRAMS for line in lines):
            found += [text for line in lines if (text := plain(line))]
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", "\n\n".join(prose)):
        words = " ".join(span.split())
        if _program(words) in PROGRAMS and " " in words:
            found.append(plain(words))
    return found


def parts_of_page(text: str) -> Iterator[tuple[str, list[str]]]:
    """``("text", lines)``, and blocks: ``(language, lines)``, of which an indented one has no language."""
    kind, lines = "text", list[str]()
    fenced = False
    before = ""
    for line in text.splitlines():
        indented = line.startswith("    ") and (kind == "" or not before.strip())
        if line.startswith("```"):
            yield kind, lines
            kind, lines = ("text", []) if fenced else (line[3:].strip(), [])
            fenced = not fenced
        elif not fenced and kind == "text" and indented:
            yield kind, lines
            kind, lines = "", [line]
        elif not fenced and kind == "" and line.strip() and not indented:
            yield kind, lines
            kind, lines = "text", [line]
        else:
            lines.append(line)
        before = line
    yield kind, lines


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language on a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return ["\n".join(lines) for kind, lines in parts_of_page(text) if kind == language]


def plain(line: str) -> str:
    """A command without its comment, with single spaces."""
    return " ".join(re.sub(r"\s#\s.*", "", line).split())


def _program(line: str) -> str:
    return (line.split() or [""])[0]
