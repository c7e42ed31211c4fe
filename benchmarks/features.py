"""All features of one dataset as raylora measures them, beside the research code's way, in one run.

    python -m benchmarks.features                    # sample 100, 20 probe steps, the real model
    python -m benchmarks.features --text             # the text part alone on 1k, 10k and 100k examples: time and memory

The research code's way: a forward pass each for perplexity, answer perplexity and embeddings, in batches of 8 padded
to 256 tokens, with all logits; a probe in micro-batches of 2 padded to 128, every gradient copied for later cosines.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import common
from benchmarks.load import make_records
from raylora.config.method import Method
from raylora.config.options import FeatureOptions
from raylora.data.datasets import read_dataset, sample_examples
from raylora.data.encoding import EncodedExample, encode_example
from raylora.features.pipeline import extract_features
from raylora.features.probe import general_examples
from raylora.features.static import split_sample
from raylora.features.text import text_features
from raylora.model.adapters import LoadedModel
from raylora.records import Example, Message

STATIC_WIDTH, PROBE_WIDTH, MICRO_BATCH = 256, 128, 2


def padded(loaded: LoadedModel, part: list[EncodedExample], width: int) -> dict[str, torch.Tensor]:
    ids = torch.full((len(part), width), loaded.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, e in enumerate(part):
        row = torch.tensor(e.input_ids[:width])
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
        labels[i, : len(row)] = torch.where(torch.tensor(e.is_answer[:width]), row, -100)
    device = loaded.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def research_way(loaded: LoadedModel, encoded: list[EncodedExample], method: Method, steps: int) -> None:
    """The same measurements, one thing at a time."""
    batches = [padded(loaded, encoded[i : i + 8], STATIC_WIDTH) for i in range(0, len(encoded), 8)]
    with torch.no_grad():
        for what in ("whole", "answer", "embedding"):
            for batch in batches:
                output = loaded.model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    output_hidden_states=what == "embedding",
                )
                if what == "embedding":
                    (output.hidden_states[-1] * batch["attention_mask"][..., None]).sum(1)
                else:
                    target = batch["labels"] if what == "answer" else batch["input_ids"]
                    F.cross_entropy(output.logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), reduction="none")
    parameters = loaded.attach(method, 0, name="research")
    optimizer = torch.optim.AdamW(parameters, lr=method.learning_rate)
    loaded.model.train()
    per_step = method.batch_size * method.gradient_accumulation
    gradients: list[torch.Tensor] = []
    order = [encoded[i % len(encoded)] for i in range(steps * per_step)]
    for k in range(steps):
        for start in range(k * per_step, (k + 1) * per_step, MICRO_BATCH):
            batch = padded(loaded, order[start : start + MICRO_BATCH], PROBE_WIDTH)
            loss = loaded.model(**batch).loss / max(1, per_step // MICRO_BATCH)
            if torch.isfinite(loss):
                loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in parameters]).cpu())
            del gradients[:-10]
        torch.nn.utils.clip_grad_norm_(parameters, method.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    loaded.model.eval()
    loaded.detach("research")


def compare(options: argparse.Namespace) -> None:
    loaded = common.load(options.model, options.quantization, options.shape)
    path = sorted((common.SHARED / "chunk_001").iterdir())[options.file]
    dataset = read_dataset(path, limit=options.max_records)
    method = Method(max_length=STATIC_WIDTH, lora_dropout=0.0, batch_size=options.batch_size)
    sample = sample_examples(dataset.examples, options.sample_size, dataset.seed)
    encoded = [encode_example(loaded.tokenizer, e, STATIC_WIDTH) for e in sample]
    budget = loaded.feature_token_budget
    feature_options = FeatureOptions(sample_size=options.sample_size, probe_steps=options.steps)
    ways = {
        "raylora": lambda: extract_features(loaded, dataset, method, feature_options, budget, 0),
        "research code": lambda: research_way(loaded, encoded, method, options.steps),
    }
    taken: dict[str, list[common.Measured]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, run in ways.items():
            taken[way].append(common.measure(run, loaded.device))
            print(f"{way}: {taken[way][-1].seconds:.1f} s, {taken[way][-1].cpu_seconds:.1f} CPU s", flush=True)
    per_step = method.batch_size * method.gradient_accumulation
    mean_length = sum(map(len, encoded)) / len(encoded)
    # In forward passes over a token; a backward pass through frozen weights costs one more, not two.
    answers = sum(sum(e.is_answer_text) + 1 for e in encoded)
    ours = sum(map(len, encoded)) + answers + 2 * options.steps * per_step * mean_length
    # Sharpness, forgetting and losses of what is held out, which the research code's probe does not measure.
    held_out = sum(len(encoded[i]) for i in split_sample(sample).held_out)
    more = 3 * held_out + 2 * sum(map(len, general_examples(loaded.tokenizer)))
    theirs = 3 * len(encoded) * STATIC_WIDTH + 2 * options.steps * per_step * PROBE_WIDTH
    best = {way: min(m.seconds for m in runs) for way, runs in taken.items()}
    rows = [
        {
            "way": way,
            "seconds": best[way],
            "CPU seconds": min(m.cpu_seconds for m in runs),
            "times raylora": best[way] / best["raylora"],
            "bound from tokens": {"raylora": 1.0, "research code": theirs / ours}[way],
            "with what it leaves out": {"raylora": 1.0, "research code": theirs / (ours + more)}[way],
            "peak GB": max(m.peak_bytes for m in runs) / 1e9,
        }
        for way, runs in taken.items()
    ]
    values: dict[str, Any] = taken["raylora"][0].result
    extra = {
        "mean tokens an example": round(mean_length, 1),
        "raylora, static seconds": round(values["static_seconds"], 1),
        "raylora, probe seconds": round(values["probe_seconds"], 1),
    }
    title = (
        f"sample {options.sample_size}, {options.steps} steps of {per_step} examples, "
        f"{options.shape or options.model}, {options.quantization}"
    )
    common.report(title, rows, options.json, extra)


def measure_text(options: argparse.Namespace) -> None:
    """Examples of real and made-up words, ever new ones as their number grows; a tenth of them near-copies."""
    from raylora.model.loading import load_tokenizer
    from raylora.model.sources import resolve_model

    tokenizer = load_tokenizer(resolve_model(options.model))
    rows = []
    for num in (1_000, 10_000, 100_000, 200_000):
        turns = [[m["content"] for m in record["messages"]] for record in make_records(num)]
        examples = [Example((Message("user", question),), answer, question) for question, answer in turns]
        del turns
        before = common.measure(lambda: None, torch.device("cpu")).peak_bytes
        taken = common.measure(lambda: text_features(examples, tokenizer), torch.device("cpu"))  # noqa: B023
        rows.append(
            {
                "examples": num,
                "seconds": taken.seconds,
                "microseconds an example": 1e6 * taken.seconds / num,
                "GB above the examples": (taken.peak_bytes - before) / 1e9,
                "peak GB": taken.peak_bytes / 1e9,
                "duplicates": taken.result[0]["approximate_duplicates"],
            }
        )
        print(rows[-1], flush=True)
    common.report("text features", rows, options.json, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--shape", choices=sorted(common.SHAPES))
    parser.add_argument("--quantization", default="none", choices=("none", "8bit", "4bit"))
    parser.add_argument("--sample-size", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=1, help="examples in a micro-batch, four of them in a step")
    parser.add_argument("--file", type=int, default=0, help="which dataset of the chunk")
    parser.add_argument("--max-records", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    (measure_text if options.text else compare)(options)


if __name__ == "__main__":
    main()
