"""8 bits in both ways, 4 bits and float32, side by side, in one run.

python -m benchmarks.quantization               # log-likelihoods: what the batch moves, how far from float32 they are
python -m benchmarks.quantization --training    # tokens a second, and adapters trained together beside each alone
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.mmlu import LOGPROBS, choose
from raylora.config.method import Method
from raylora.config.options import ModelOptions
from raylora.data.datasets import read_dataset, sample_examples
from raylora.data.encoding import EncodedExample, encode_example
from raylora.mmlu.prompts import encode_questions
from raylora.model.adapters import LoadedModel
from raylora.model.loading import load_model
from raylora.model.packing import can_pack
from raylora.training.gradients import Job
from raylora.training.loop import TrainingResult, train_adapters

WAYS: dict[str, dict[str, Any]] = {
    "float32": {"quantization": "none"},
    "8 bits": {"quantization": "8bit"},
    "LLM.int8": {"quantization": "8bit", "int8_activations": True},
    "4 bits": {"quantization": "4bit"},
}


def compare_answers(models: dict[str, LoadedModel], options: argparse.Namespace) -> None:
    """Log-likelihoods of each way by batch, and against those of the first way, float32, at the first budget."""
    questions, shots = choose(options.questions, options.num_questions, 0)
    budgets = [int(budget) for budget in options.budgets.split(",")]
    rows, expected = [], None
    for way, loaded in models.items():
        encoded = encode_questions(loaded.tokenizer, questions, shots, "harness", 8192)
        found, taken = [], []
        for budget in budgets:
            run = functools.partial(common.score, loaded, encoded, budget)
            taken.append(common.measure(run, loaded.device))
            found.append(taken[-1].result.questions[LOGPROBS].to_numpy())
            print(f"{way}, budget {budget}: {taken[-1].seconds:.1f} s", flush=True)
        expected = found[0] if expected is None else expected
        moved = [np.abs(a - b) for a, b in itertools.combinations(found, 2)] or [np.zeros(1)]
        off = np.abs(found[0] - expected)
        rows.append(
            {
                "way": way,
                "off from float32, median": float(np.median(off)),
                "at most": float(off.max()),
                "between budgets, median": max(float(np.median(m)) for m in moved),
                "between, at most": max(float(m.max()) for m in moved),
                "flips from float32": int((found[0].argmax(1) != expected.argmax(1)).sum()),
                "CPU seconds by budget": " ".join(f"{m.cpu_seconds:.1f}" for m in taken),
                "tokens/CPU s": sum(map(len, encoded)) / min(m.cpu_seconds for m in taken),
            }
        )
    title = f"log-likelihoods of {len(questions)} questions, batches of {options.budgets} padded tokens"
    common.report(title, rows, options.json, {})


def train(loaded: LoadedModel, method: Method, parts: Sequence[Sequence[EncodedExample]]) -> list[float]:
    """Train an adapter on each part, over the same passes. Returns the gradient's norm at each step of the first."""
    names = [f"adapter{i}" for i in range(len(parts))]
    try:
        jobs = [Job(loaded.attach(method, 0, n), p, method, 0, n) for n, p in zip(names, parts, strict=True)]
        result = train_adapters(loaded, jobs)[0]
        assert isinstance(result, TrainingResult)
        return [step.grad_norm for step in result.steps]
    finally:
        for name in names:
            loaded.detach(name)


def compare_trainings(models: dict[str, LoadedModel], options: argparse.Namespace) -> None:
    """The same training in each way, in turn; and again with a second adapter in its passes."""
    path = sorted((common.SHARED / "chunk_001").iterdir())[0]
    dataset = read_dataset(path)
    sample = sample_examples(dataset.examples, options.num_examples, dataset.seed)
    method = Method(num_epochs=1, max_length=256)
    examples = [encode_example(next(iter(models.values())).tokenizer, e, method.max_length) for e in sample]
    taken: dict[str, list[common.Measured]] = {way: [] for way in models}
    for loaded in models.values():
        train(loaded, method, [examples[:4]])  # warm
    for _ in range(options.rounds):
        for way, loaded in models.items():
            taken[way].append(common.measure(functools.partial(train, loaded, method, [examples]), loaded.device))
            print(f"{way}: {taken[way][-1].cpu_seconds:.1f} CPU s", flush=True)
    rows = []
    for way, loaded in models.items():
        alone, together = taken[way][0].result, train(loaded, method, [examples, examples[: len(examples) // 2]])
        rows.append(
            {
                "way": way,
                "packs": can_pack(loaded.model),
                "CPU seconds": " ".join(f"{m.cpu_seconds:.1f}" for m in taken[way]),
                "tokens/CPU s": sum(map(len, examples)) / min(m.cpu_seconds for m in taken[way]),
                "norms of gradients": " ".join(f"{norm:.4f}" for norm in alone),
                "with another adapter, at most apart": max(abs(a - b) for a, b in zip(alone, together, strict=True)),
            }
        )
    title = f"training on {len(examples)} examples of {path.stem}, ways in turn"
    common.report(title, rows, options.json, {"tokens": sum(map(len, examples))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--ways", default=",".join(WAYS), help="the first is what the others are held against")
    parser.add_argument("--questions", type=Path, default=common.SHARED / "mmlu", help="folder with the two JSON files")
    parser.add_argument("--num-questions", type=int, default=114)
    parser.add_argument("--budgets", default="512,128,2048", help="padded tokens in a batch")
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--num-examples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models = {way: load_model(ModelOptions(model=options.model, **WAYS[way])) for way in options.ways.split(",")}
    (compare_trainings if options.training else compare_answers)(models, options)


if __name__ == "__main__":
    main()
