"""How the features of one distribution move with the number of examples, and an isolation forest's with its seed.

    python -m benchmarks.sample_size --out probes.jsonl                # probes of 6 to 100 examples: an hour on a CPU
    python -m benchmarks.sample_size --out probes.jsonl --seconds 240  # the same in pieces: it resumes where it stopped
    python -m benchmarks.sample_size --forests                         # embeddings of 8 to 400 examples, many seeds

The distribution is that of the short records of one file of chunk_001; a draw is a random part of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from raylora import DynamicProbeAnalyzer, HyperParams
from raylora.data.datasets import read_dataset
from raylora.model.adapters import LoadedModel
from raylora.records import Example, Message
from raylora.rows import PROBE_NAMES

SYSTEM = Message("system", "Answer.")
"""In place of the template's own system turn, which is longer than most of these records."""
SIZES = (6, 12, 25, 50, 100)


def short_examples(loaded: LoadedModel, max_tokens: int) -> list[Example]:
    """The examples of question and answer with 8 to ``max_tokens`` tokens together, in the file's order."""
    path = sorted((common.SHARED / "chunk_001").iterdir())[2]
    found = {}
    for e in read_dataset(path).examples:
        num_tokens = len(loaded.tokenizer(f"{e.question} {e.answer}")["input_ids"])
        if 8 <= num_tokens <= max_tokens and not e.context:
            found[e.question] = Example((SYSTEM, *e.messages), e.answer, e.question)
    return list(found.values())


def run_probes(loaded: LoadedModel, pool: list[Example], options: argparse.Namespace) -> None:
    """Append a line of probe features for each size and draw that ``options.out`` does not have yet."""
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    known = {(row["num"], row["draw"]) for row in done}
    analyzer, started = DynamicProbeAnalyzer(loaded.model, loaded.tokenizer), time.monotonic()
    for draw, num in itertools.product(range(options.draws), SIZES):
        if (num, draw) in known or time.monotonic() - started > options.seconds:
            continue
        examples = random.Random(f"{draw}/{num}").sample(pool, num)
        row = analyzer.extract_all_dynamic_features(examples, HyperParams(), options.steps, 0, 4, token_budget=2048)
        done.append({"num": num, "draw": draw, **{name: row[name] for name in PROBE_NAMES}})
        with options.out.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(f"{num} examples, draw {draw}: {time.monotonic() - started:.0f} s", flush=True)
    show_drift(done)


def show_drift(done: list[dict[str, Any]]) -> None:
    """For each feature the mean over draws at each size, +- the standard deviation between draws."""
    rows = []
    for name in PROBE_NAMES:
        values = {num: np.array([r[name] for r in done if r["num"] == num], dtype=float) for num in SIZES}
        cells = {str(num): f"{v.mean():.3g} +- {v.std(ddof=1):.2g}" for num, v in values.items() if len(v) > 1}
        rows.append({"feature": name, **cells})
    common.report("mean over draws +- standard deviation between draws", rows, None, {})


def run_forests(loaded: LoadedModel, pool: list[Example]) -> None:
    """The outlier ratio of one forest, by seed: its mean, and the spread of means over several forests."""
    from sklearn.ensemble import IsolationForest

    from raylora.features.measure import make_item, measure_all
    from raylora.records import ignore_progress

    examples = random.Random(0).sample(pool, min(400, len(pool)))
    items = [make_item(loaded.tokenizer, e, 1024) for e in examples]
    embeddings = np.stack([m.embedding for m in measure_all(loaded, items, "answer", 2048, ignore_progress)])
    rows = []
    for num in (8, 20, 50, 100, 200, 400):
        part = embeddings[:num]
        started = time.perf_counter()
        ratios = np.array(
            [
                (IsolationForest(contamination="auto", random_state=seed).fit_predict(part) < 0).mean()
                for seed in range(160)
            ]
        )
        seconds = (time.perf_counter() - started) / len(ratios)
        spread = {f"sd, mean of {k}": ratios.reshape(-1, k).mean(1).std(ddof=1) for k in (1, 4, 8, 16, 32)}
        rows.append(
            {"examples": len(part), "mean": ratios.mean(), "least": ratios.min(), "most": ratios.max(), **spread}
        )
        rows[-1]["seconds a forest"] = seconds
        print(rows[-1], flush=True)
    common.report("embedding_outlier_ratio of one forest, 160 seeds", rows, None, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=30, help="of question and answer together")
    parser.add_argument("--seconds", type=float, default=1e9, help="no probe begins later")
    parser.add_argument("--out", type=Path, default=Path("probes.jsonl"))
    parser.add_argument("--forests", action="store_true")
    options = parser.parse_args()
    loaded = common.load(options.model, "none", None)
    pool = short_examples(loaded, options.max_tokens)
    print(f"{len(pool)} examples to draw from, on {torch.get_num_threads()} threads")
    run_forests(loaded, pool) if options.forests else run_probes(loaded, pool, options)


if __name__ == "__main__":
    main()
