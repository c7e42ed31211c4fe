"""Whole experiments as raylora and as the research code ran them, each way in processes of its own.

    python -m benchmarks.end_to_end                         # one dataset
    python -m benchmarks.end_to_end --num-files 4           # a chunk: raylora loads and scores the base once
    python -m benchmarks.end_to_end --num-records 16 --probe-steps 4 --num-questions 57     # a quick look
    python -m benchmarks.end_to_end --num-files 2 --alone   # raylora only, beside what it had planned
    python -m benchmarks.end_to_end --full --shape llama3-8b                    # on a GPU: the default experiment
    python -m benchmarks.end_to_end --full --shape llama3-8b --num-files 8 --num-records 160    # and a chunk of 8

For every dataset: features with a probe, training, MMLU of the base and of the adapter. The research code's steps are
done one after another with transformers, PEFT and ``generate``, the model loaded twice a dataset as it did. Start of
the processes and loading are part of the seconds. ``--full`` is an experiment of default settings: 8 bits, 1,000
examples, 3 epochs, 20 probe steps, all 14,042 questions; the research code is then asked every 20th of them, and its
MMLU's seconds are multiplied. Where more datasets are wanted than there are files, each file is cut into several.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from benchmarks import common
from raylora.config.method import Method
from raylora.config.options import FeatureOptions
from raylora.mmlu.questions import load_questions, select_questions
from raylora.mmlu.scoring import load_score

STAGES = ("load", "static", "probe", "train", "mmlu base", "mmlu adapter", "rest")
"""Of raylora. ``rest`` is what no stage counts: Python's start, reading data, stored files, for a chunk Ray's start."""
SMALL = {
    "quantization": "none", "num_records": 64, "num_epochs": 1.0, "max_length": 256, "probe_steps": 20,
    "num_questions": 114, "research_step": 1,
}  # fmt: skip
FULL = {
    "quantization": "8bit", "num_records": 1000, "num_epochs": Method().num_epochs, "max_length": Method().max_length,
    "probe_steps": FeatureOptions().probe_steps, "num_questions": 14042, "research_step": 20,
}  # fmt: skip


def make_chunk(folder: Path, number: int) -> list[Path]:
    """So many dataset files in ``folder``: those of chunk_001, or each cut into as many parts as that needs."""
    folder.mkdir()
    files = sorted((common.SHARED / "chunk_001").resolve().iterdir())
    parts = -(-number // len(files))
    made = []
    for part in range(parts):
        for file in files[: number - len(made)]:
            records = json.loads(file.read_text(encoding="utf-8"))[part::parts]
            made.append(folder / (f"{file.stem}_{part}{file.suffix}" if parts > 1 else file.name))
            made[-1].write_text(json.dumps(records), encoding="utf-8")
    return made


def raylora_command(files: list[Path], output: Path, options: argparse.Namespace) -> list[str]:
    """One dataset by ``raylora.experiment``, several by ``raylora.batch``."""
    shared = [
        "--model", options.model, "--quantization", options.quantization, "--mmlu", str(questions_file()),
        "--max-samples", str(options.num_questions), "--max-records", str(options.num_records),
        "--probe-steps", str(options.probe_steps), "--num-epochs", str(options.num_epochs),
        "--max-length", str(options.max_length), "--output", str(output),
    ]  # fmt: skip
    if len(files) == 1:
        return [sys.executable, "-m", "raylora.experiment", str(files[0]), *shared]
    chunk = files[0].parent
    return [sys.executable, "-m", "raylora.batch", "--data-root", str(chunk.parent), "--chunk", chunk.name, *shared]


def research_command(file: Path, options: argparse.Namespace) -> list[str]:
    given = ("model", *SMALL)
    flags = [word for name in given for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    return [sys.executable, "-m", "benchmarks.end_to_end", "--research", str(file), *flags]


def questions_file() -> Path:
    return common.SHARED / "mmlu" / "test_all_subjects.json"


def research(file: Path, options: argparse.Namespace) -> None:
    """The research code's steps on one dataset; prints the seconds of each."""
    from benchmarks.features import research_way
    from benchmarks.mmlu import ask_by_writing, encode_for_writing
    from benchmarks.training import run_padded
    from raylora.data.datasets import read_dataset, sample_examples
    from raylora.data.encoding import encode_example

    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def done(stage: str, times: int = 1) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[stage] = round(times * (now - started), 1)
        started = now

    questions = select_questions(load_questions(questions_file()), options.num_questions, 0)
    dataset = read_dataset(file, limit=options.num_records)
    examples = sample_examples(dataset.examples, 0, dataset.seed)
    loaded = common.load(options.model, options.quantization, None)
    method = Method(num_epochs=options.num_epochs, max_length=options.max_length)
    encoded = [encode_example(loaded.tokenizer, e, method.max_length) for e in examples]
    done("load")
    asked = questions[:: options.research_step]
    ask_by_writing(loaded, encode_for_writing(loaded, asked, {}))
    done("mmlu base", options.research_step)
    research_way(loaded, encoded, method, options.probe_steps)
    done("features")
    del loaded
    loaded = common.load(options.model, options.quantization, None)
    done("load again")
    run_padded(loaded, encoded, method, detach=False)
    done("train")
    loaded.activate("padded")
    ask_by_writing(loaded, encode_for_writing(loaded, asked, {}))
    done("mmlu adapter", options.research_step)
    print(json.dumps(seconds))


def run(command: list[str]) -> tuple[float, str]:
    """Seconds and the last line of a command, which must end well."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - started, (done.stdout.strip().splitlines() or [""])[-1]


def compare_with_the_plan(table: pd.DataFrame) -> list[dict[str, float]]:
    """Of each experiment: seconds and gigabytes that were estimated, and those that it took."""
    return [
        {
            "estimated seconds": round(row.estimated_seconds, 1),
            "seconds": round(row.features_seconds + row.train_seconds + row.mmlu_seconds, 1),
            "estimated peak GB": round(row.estimated_peak_memory_bytes / 1e9, 2),
            "peak GB": round(row.peak_memory_bytes / 1e9, 2),
        }
        for row in table.itertuples()
    ]


def seconds_by_stage(results: Path, table: pd.DataFrame, total: float) -> dict[str, float]:
    """The seconds of ``STAGES``, all experiments together, from the rows and the scores of a run's folder."""
    asked = {False: 0.0, True: 0.0}
    for path in results.rglob("scores.parquet"):
        asked["base" in path.relative_to(results).parts] += load_score(path).info["mmlu_seconds"]
    static, probe, train = (float(table[f"{name}_seconds"].sum()) for name in ("static", "probe", "train"))
    # The features are the first stage: their seconds have the model's loading in them.
    found = [float(table["features_seconds"].sum()) - static - probe, static, probe, train, asked[True], asked[False]]
    return dict(zip(STAGES, [*found, total - sum(found)], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--shape", choices=sorted(common.SHAPES), help="random weights of this shape in place of the model"
    )
    parser.add_argument("--full", action="store_true", help="an experiment of default settings, on a GPU")
    parser.add_argument("--quantization", choices=common.QUANTIZATIONS)
    parser.add_argument("--num-files", type=int, default=1)
    parser.add_argument("--num-records", type=int)
    parser.add_argument("--num-epochs", type=float)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--probe-steps", type=int)
    parser.add_argument("--num-questions", type=int)
    parser.add_argument("--research-step", type=int, help="the research code is asked every n-th question")
    parser.add_argument("--alone", action="store_true", help="without the research code")
    parser.add_argument("--research", type=Path, help="only the research code's steps on this dataset")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for name, value in (FULL if options.full else SMALL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.shape:  # in a process of its own, which gives the GPU's memory back
        _, options.model = run([sys.executable, "-m", "benchmarks.common", options.shape])
    if options.research:
        research(options.research, options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = make_chunk(Path(folder) / "chunk_001", options.num_files)
        results = Path(folder) / "results"
        ours, _ = run(raylora_command(files, results, options))
        (table,) = (pd.read_csv(path) for path in results.glob("*/results.csv"))
        print(f"raylora: {ours:.1f} s", flush=True)
        rows = [{"way": "raylora", "seconds": ours, "times raylora": 1.0, **seconds_by_stage(results, table, ours)}]
        theirs, stages = 0.0, []
        for file in [] if options.alone else files:
            seconds, last = run(research_command(file, options))
            stages.append(json.loads(last))
            # MMLU of a part of the questions counts as of all.
            asking = sum(stages[-1][name] for name in ("mmlu base", "mmlu adapter"))
            theirs += seconds + asking * (1 - 1 / options.research_step)
            print(f"research code, {file.stem}: {seconds:.1f} s, {last}", flush=True)
    if stages:
        together = {name: sum(stage[name] for stage in stages) for name in stages[0]}
        rows.append({"way": "research code", "seconds": theirs, "times raylora": theirs / ours, **together})
    title = (
        f"{len(files)} experiments, {options.num_records} examples, {options.num_epochs:g} epochs, "
        f"{options.probe_steps} probe steps, {options.num_questions} questions, {options.shape or options.model}, "
        f"{options.quantization}"
    )
    extra = {
        "raylora, as planned and as it went": compare_with_the_plan(table),
        "research code, seconds by stage": stages,
    }
    common.report(title, rows, options.json, extra)


if __name__ == "__main__":
    main()
