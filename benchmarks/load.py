"""One very large dataset, and very many tiny ones: seconds and peak memory of each part.

    python -m benchmarks.load --records 500000           # beside 5,000 records, with a tiny model
    python -m benchmarks.load --datasets 1000            # a chunk of so many files: its plan, and all of its run
    python -m benchmarks.load --records 200000 --text    # the text features alone

Each measurement runs in a process of its own. ``--generate FOLDER`` writes the datasets there and stops.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from raylora.config.run import Config, load_config
from raylora.data.datasets import list_dataset_files, read_dataset, survey
from raylora.errors import UserError
from raylora.experiment.story import run_experiment
from raylora.experiment.workbench import Workbench
from raylora.features.text import text_features
from raylora.planning.plan import DEMO_FOLDER, make_plan

CPU = torch.device("cpu")
NUM_RARE = 200_000
"""Made-up words, drawn by Zipf's law: large sets of real texts have as many names and numbers."""


def demo_words() -> list[str]:
    examples = [e for path in list_dataset_files(DEMO_FOLDER / "chunk_demo") for e in read_dataset(path).examples]
    return [word for e in examples for word in f"{e.question} {e.answer}".split()]


def make_records(num: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records of runs of the demo's texts, a third of their words others; every tenth is a near-copy of the last."""
    rng, draw = random.Random(seed), np.random.default_rng(seed)
    words = demo_words()
    syllables = [a + b for a in "bcdfglmnprstv" for b in ("a", "e", "i", "o", "un", "ar")]
    rare = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(NUM_RARE)]
    share = np.cumsum(1 / np.arange(10, NUM_RARE + 10))
    text: list[str] = []
    for i in range(num):
        if i % 10 == 9:
            text[rng.randrange(12, len(text))] = "again"
        else:
            start, length = rng.randrange(len(words) - 150), rng.randint(60, 150)
            others = np.searchsorted(share, draw.random(length) * share[-1]).tolist()
            run = words[start : start + length]
            text = [rare[k] if rng.random() < 0.33 else word for word, k in zip(run, others, strict=True)]
        turns = {"user": " ".join(text[:20]), "assistant": " ".join(text[20:])}
        yield {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def write_dataset(path: Path, num: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i, record in enumerate(make_records(num, seed)):
            file.write("[\n" if i == 0 else ",\n")
            file.write(json.dumps(record))
        file.write("\n]\n")
    return path


def write_many(folder: Path, num: int) -> Path:
    """A chunk of tiny datasets, three records each."""
    folder.mkdir(parents=True, exist_ok=True)
    records = list(make_records(3 * num))
    for i in range(num):
        (folder / f"tiny_{i:05d}.json").write_text(json.dumps(records[3 * i : 3 * i + 3]), encoding="utf-8")
    return folder


def config_of(folder: Path) -> Config:
    from tests.helpers.tiny import save_model

    model = folder / "model"
    if not model.is_dir():
        save_model(model)
    options = {"mmlu": "demo", "max_samples": 4, "num_epochs": 0.001, "probe_steps": 3, "quantization": "none"}
    return load_config(model=str(model), output=folder / "results", fresh=True, **options)


def run_part(part: str, path: Path, folder: Path) -> dict[str, Any]:
    """One part in this process: its seconds, and gigabytes at its highest beside those before it."""
    before = common.measure(lambda: None, CPU).peak_bytes
    if part == "look through":
        taken = common.measure(lambda: survey(path), CPU)
    elif part == "load":
        taken = common.measure(lambda: read_dataset(path).seed, CPU)
    elif part == "text features":
        from tests.helpers.tiny import make_tokenizer

        examples = read_dataset(path).examples
        before = common.measure(lambda: None, CPU).peak_bytes
        taken = common.measure(lambda: text_features(examples, make_tokenizer()), CPU)
        print({name: taken.result[0][name] for name in ("approximate_duplicates", "avg_output_length")})
    else:
        files = list_dataset_files(path) if path.is_dir() else [path]
        config = config_of(folder)
        taken = common.measure(lambda: make_plan(config, files, "load"), CPU)
    return {"part": part, "seconds": taken.seconds, "GB before": before / 1e9, "GB": taken.peak_bytes / 1e9}


def run_worker(path: Path, folder: Path) -> list[dict[str, Any]]:
    """One whole experiment in this process, as a worker runs it: seconds and gigabytes of each stage."""
    torch.set_num_threads(1)  # the matrices of a tiny model are too small to be shared out
    plan = make_plan(config_of(folder), [path], "load")
    bench = Workbench(plan.config, plan.store)
    bench.loaded  # noqa: B018 - the model is loaded before anything is measured
    rows: list[dict[str, Any]] = []

    def progress(stage: str, done: int, total: int) -> None:
        if not rows or rows[-1]["part"] != stage:
            if rows:
                rows[-1]["GB"] = max(rows[-1]["GB"], peak_gigabytes())
            common.measure(lambda: None, CPU)  # the peak starts anew here
            rows.append({"part": stage, "seconds": time.perf_counter(), "GB": 0.0})
        rows[-1]["GB"] = max(rows[-1]["GB"], peak_gigabytes())

    with plan.store.held(fresh=True):
        started = time.perf_counter()
        row = run_experiment(bench, plan.experiments[0], progress)
        progress("end", 0, 0)
    if not row.ok:
        raise UserError(row.values["error"])
    names = ("static_seconds", "probe_seconds", "features_seconds", "train_seconds", "mmlu_seconds", "total_seconds")
    print({name: round(row.values[name] or 0, 1) for name in names}, row.values["num_examples"])
    parts = [
        {"part": f"worker: {now['part']}", "seconds": after["seconds"] - now["seconds"], "GB": now["GB"]}
        for now, after in itertools.pairwise(rows)
    ]
    return [
        *parts,
        {"part": "worker: all", "seconds": rows[-1]["seconds"] - started, "GB": max(p["GB"] for p in parts)},
    ]


def run_batch(path: Path, folder: Path) -> list[dict[str, Any]]:
    """The command on a chunk of tiny datasets, all stages, two workers: seconds, its own memory, files, rows."""
    import pandas as pd
    import psutil

    config = config_of(folder)
    given = {"model": config.model, "mmlu": "demo", "max_samples": 4, "num_epochs": 1, "probe_steps": 1}
    given |= {"quantization": "none", "num_workers": 2, "threads": 1, "sample_size": 3, "batch_size": 1}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    where = ["--data-root", str(path.parent), "--chunk", path.name, "--output", str(folder / "results"), "--fresh"]
    started = time.perf_counter()
    command = psutil.Popen([sys.executable, "-m", "raylora.batch", *where, *words], stdout=subprocess.DEVNULL)
    peak, first = 0, 0.0
    results = folder / "results" / path.name
    while command.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            peak = max(peak, command.memory_info().rss)
        first = first or ((results / "results.csv").exists() and time.perf_counter()) or 0.0
        time.sleep(0.5)
    seconds = time.perf_counter() - started
    if command.returncode:
        raise UserError(f"the command ended with {command.returncode}")
    table = pd.read_parquet(results / "results.parquet")
    if list(table["status"]) != ["ok"] * len(list_dataset_files(path)):
        raise UserError(f"{len(table)} rows, {(table['status'] != 'ok').sum()} of them errors")
    files = [p for p in results.rglob("*") if p.is_file()]
    print(f"{len(table)} rows, {len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:.0f} MB")
    print(f"{1000 * (time.perf_counter() - first) / len(table):.0f} ms a dataset from the first row on")
    return [{"part": "batch", "seconds": seconds, "GB": peak / 1e9}]


def peak_gigabytes() -> float:
    """The most this process held since its high-water mark was set anew."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e9


def in_a_process(part: str, path: Path, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.load", "--part", part, "--path", str(path), "--folder", str(folder)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    for line in out[:-1]:
        print(" ", line, flush=True)
    rows: list[dict[str, Any]] = json.loads(out[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=500_000)
    parser.add_argument("--beside", type=int, default=5_000)
    parser.add_argument("--datasets", type=int)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--parts", help="only these, separated by commas")
    parser.add_argument("--generate", type=Path)
    parser.add_argument("--json", type=Path)
    for name in ("--part", "--path", "--folder"):  # how this command starts itself
        parser.add_argument(name, type=str if name == "--part" else Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        whole = {"worker": run_worker, "batch": run_batch}.get(options.part)
        rows = whole(options.path, options.folder) if whole else [run_part(**_names(options))]
        print(json.dumps(rows))
        return
    with tempfile.TemporaryDirectory() as temporary:
        measure(options, options.generate or Path(temporary))


def _names(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("part", "path", "folder")}


def measure(options: argparse.Namespace, folder: Path) -> None:
    if options.datasets:
        sizes = {f"{n} files": write_many(folder / f"chunk_{n}", n) for n in (options.datasets // 10, options.datasets)}
        parts = ["plan", "batch"]
    else:
        numbers = (options.beside, options.records)
        sizes = {f"{n} records": write_dataset(folder / f"records_{n}.json", n) for n in numbers}
        parts = ["text features"] if options.text else ["look through", "load", "plan", "text features", "worker"]
    if options.generate:
        return
    rows = []
    for part in options.parts.split(",") if options.parts else parts:
        for name, path in sizes.items():
            print(f"{part}: {name}", flush=True)
            rows += [{"what": name, **row} for row in in_a_process(part, path, folder)]
            print(" ", rows[-1], flush=True)
    every = ("what", "part", "seconds", "GB before", "GB")
    common.report("load", [{k: row.get(k, "") for k in every} for row in rows], options.json, {})


if __name__ == "__main__":
    main()
