"""Whole experiments as raylora and as the research code ran them, each way in processes of its own.

    python -m benchmarks.end_to_end                         # one dataset
    python -m benchmarks.end_to_end --num-files 4           # a chunk: raylora loads and scores the base once
    python -m benchmarks.end_to_end --num-records 16 --probe-steps 4 --num-questions 57     # a quick look
    python -m benchmarks.end_to_end --num-files 2 --alone   # raylora only, beside what it had planned

For every dataset: features with a probe, one epoch of training, MMLU of the base and of the adapter. The research
code's steps are done one after another with transformers, PEFT and ``generate``, the model loaded twice a dataset
as it did. Start of the processes and loading are part of the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common
from raylora.mmlu.questions import load_questions, select_questions


def raylora_command(files: list[Path], folder: Path, options: argparse.Namespace) -> list[str]:
    """One dataset by ``raylora.experiment``, several by ``raylora.batch``."""
    chunk = folder / "chunk_001"
    chunk.mkdir()
    for file in files:
        shutil.copy(file, chunk)
    shared = [
        "--model", options.model, "--quantization", options.quantization, "--mmlu", str(questions_file()),
        "--max-samples", str(options.num_questions), "--max-records", str(options.num_records),
        "--probe-steps", str(options.probe_steps), "--num-epochs", "1", "--max-length", "256",
        "--output", str(folder / "results"),
    ]  # fmt: skip
    if len(files) == 1:
        return [sys.executable, "-m", "raylora.experiment", str(chunk / files[0].name), *shared]
    return [sys.executable, "-m", "raylora.batch", "--data-root", str(folder), "--chunk", "chunk_001", *shared]


def research_command(file: Path, options: argparse.Namespace) -> list[str]:
    given = ("model", "quantization", "num_questions", "num_records", "probe_steps")
    flags = [word for name in given for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    return [sys.executable, "-m", "benchmarks.end_to_end", "--research", str(file), *flags]


def questions_file() -> Path:
    return common.SHARED / "mmlu" / "test_all_subjects.json"


def research(file: Path, options: argparse.Namespace) -> None:
    """The research code's steps on one dataset; prints the seconds of each."""
    from benchmarks.features import research_way
    from benchmarks.mmlu import ask_by_writing
    from benchmarks.training import run_padded
    from raylora.config import Method
    from raylora.data.datasets import read_dataset, sample_examples
    from raylora.data.encoding import encode_example

    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[stage] = round(now - started, 1)
        started = now

    questions = select_questions(load_questions(questions_file()), options.num_questions, 0)
    dataset = read_dataset(file, limit=options.num_records)
    examples = sample_examples(dataset.examples, 0, dataset.seed)
    loaded = common.load(options.model, options.quantization, None)
    encoded = [encode_example(loaded.tokenizer, e, 256) for e in examples]
    done("load")
    ask_by_writing(loaded, questions, {})
    done("mmlu of the base")
    method = Method(num_epochs=1, max_length=256)
    research_way(loaded, encoded, method, options.probe_steps)
    done("features")
    del loaded
    loaded = common.load(options.model, options.quantization, None)
    done("load again")
    run_padded(loaded, encoded, method, detach=False)
    done("train")
    loaded.activate("padded")
    ask_by_writing(loaded, questions, {})
    done("mmlu of the adapter")
    print(json.dumps(seconds))


def run(command: list[str]) -> tuple[float, str]:
    """Seconds and the last line of a command, which must end well."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - started, (done.stdout.strip().splitlines() or [""])[-1]


def compare_with_the_plan(results: Path) -> list[dict[str, float]]:
    """Of each experiment: seconds and gigabytes that were estimated, and those that it took."""
    import pandas as pd

    (table,) = (pd.read_csv(path) for path in results.glob("*/results.csv"))
    return [
        {
            "estimated seconds": round(row.estimated_seconds, 1),
            "seconds": round(row.features_seconds + row.train_seconds + row.mmlu_seconds, 1),
            "estimated peak GB": round(row.estimated_peak_memory_bytes / 1e9, 2),
            "peak GB": round(row.peak_memory_bytes / 1e9, 2),
        }
        for row in table.itertuples()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--quantization", default="none", choices=("none", "8bit", "4bit", "fp8"))
    parser.add_argument("--num-files", type=int, default=1)
    parser.add_argument("--num-records", type=int, default=64)
    parser.add_argument("--probe-steps", type=int, default=20)
    parser.add_argument("--num-questions", type=int, default=114)
    parser.add_argument("--alone", action="store_true", help="without the research code")
    parser.add_argument("--research", type=Path, help="only the research code's steps on this dataset")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.research:
        research(options.research, options)
        return
    files = sorted((common.SHARED / "chunk_001").resolve().iterdir())[: options.num_files]
    with tempfile.TemporaryDirectory() as folder:
        ours, _ = run(raylora_command(files, Path(folder), options))
        planned = compare_with_the_plan(Path(folder) / "results")
    print(f"raylora: {ours:.1f} s", flush=True)
    theirs, stages = 0.0, []
    for file in [] if options.alone else files:
        seconds, last = run(research_command(file, options))
        theirs += seconds
        stages.append(json.loads(last))
        print(f"research code, {file.stem}: {seconds:.1f} s, {last}", flush=True)
    rows = [{"way": "raylora", "seconds": ours, "times raylora": 1.0}]
    if theirs:
        rows.append({"way": "research code", "seconds": theirs, "times raylora": theirs / ours})
    title = (
        f"{len(files)} experiments, {options.num_records} examples, {options.probe_steps} probe steps, "
        f"{options.num_questions} questions, {options.model}, {options.quantization}"
    )
    extra = {"raylora, as planned and as it went": planned, "research code, seconds by stage": stages}
    common.report(title, rows, options.json, extra)


if __name__ == "__main__":
    main()
