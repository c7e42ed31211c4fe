"""raylora's training beside transformers' Trainer as the research code set it and TRL's SFTTrainer, in one run.

    python -m benchmarks.training                               # the first file of chunk_001, 32 examples
    python -m benchmarks.training --file 3 --rounds 2
    python -m benchmarks.training --adapters 4 --num-examples 16    # 4 adapters in one pass, and one after another
    python -m benchmarks.training --budgets 256,512,1024        # raylora alone, by tokens in a minibatch
    python -m benchmarks.training --shape llama3-8b --quantization 4bit     # random weights on a GPU
    python -m benchmarks.training --shape llama3-8b --eager     # its passes launched one kernel after another

The same examples, truncation and settings for all. The Trainer pads to the truncation's length and trains on
everything, as the research code had it; TRL trains on the answers, as raylora does, in whichever of its ways is fastest
on a few examples.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from raylora.config.method import Method
from raylora.data.datasets import read_dataset, sample_examples
from raylora.data.encoding import EncodedExample, encode_example, labels_of
from raylora.model import memory
from raylora.model.adapters import LoadedModel
from raylora.training.gradients import Job
from raylora.training.loop import count_steps, train_adapter, train_adapters

TRL_WAYS: dict[str, dict[str, Any]] = {
    "padding-free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True},
    "padded to the longest": {},
    "padded, like lengths together": {"train_sampling_strategy": "group_by_length"},
}
LIGER_WAY = {"padding-free, liger": {"padding_free": True, "max_length": None, "use_liger_kernel": True}}


def trl_ways(on_gpu: bool) -> dict[str, dict[str, Any]]:
    """TRL's ways here: liger's kernels are for GPUs."""
    return {**TRL_WAYS, **(LIGER_WAY if on_gpu and find_spec("liger_kernel") else {})}


def arguments_of(method: Method, folder: str, on_gpu: bool) -> dict[str, Any]:
    """What both trainers of the Hugging Face family need to do as raylora does."""
    return {
        "output_dir": folder, "num_train_epochs": method.num_epochs, "per_device_train_batch_size": method.batch_size,
        "gradient_accumulation_steps": method.gradient_accumulation, "learning_rate": method.learning_rate,
        "max_grad_norm": method.max_grad_norm, "lr_scheduler_type": method.lr_scheduler, "warmup_steps": 1,
        "weight_decay": method.weight_decay, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "no", "use_cpu": not on_gpu, "bf16": on_gpu, "gradient_checkpointing": False,
        "optim": "adamw_torch_fused" if on_gpu else "adamw_torch", "dataloader_pin_memory": on_gpu,
    }  # fmt: skip


def run_padded(loaded: LoadedModel, examples: Sequence[EncodedExample], method: Method, detach: bool = True) -> None:
    """The research code's way: every example padded to the truncation's length, labels are the inputs."""
    from transformers import Trainer, TrainingArguments

    rows = []
    for e in examples:
        pad = method.max_length - len(e)
        ids = e.input_ids + [loaded.tokenizer.pad_token_id] * pad
        rows.append({"input_ids": ids, "attention_mask": [1] * len(e) + [0] * pad, "labels": list(ids)})
    loaded.attach(method, 0, "padded")
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(**arguments_of(method, folder, loaded.device.type == "cuda"))
            Trainer(loaded.peft_model, arguments, train_dataset=rows).train()
    finally:
        if detach:
            loaded.detach("padded")


def run_trl(loaded: LoadedModel, examples: Sequence[EncodedExample], method: Method, way: str) -> None:
    """TRL on the same token ids and labels. It patches its model: ``loaded`` should be a copy."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict(
        {"input_ids": [e.input_ids for e in examples], "labels": [labels_of(e, method.train_on) for e in examples]}
    )
    loaded.attach(method, 0, "trl")
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = {"max_length": method.max_length, **arguments_of(method, folder, loaded.device.type == "cuda")}
            if way == "packing":
                # Fewer rows, each of several examples: as many optimizer steps as the others make.
                tokens = sum(map(len, examples)) / count_steps(len(examples), method)
                options["per_device_train_batch_size"] = max(1, round(tokens / method.max_length / 4))
            config = SFTConfig(**{**options, **{**TRL_WAYS, **LIGER_WAY}[way]})
            SFTTrainer(loaded.peft_model, config, train_dataset=data, processing_class=loaded.tokenizer).train()
    finally:
        loaded.detach("trl")


def run_raylora(loaded: LoadedModel, examples: Sequence[EncodedExample], method: Method) -> Any:
    parameters = loaded.attach(method, 0, "raylora")
    try:
        return train_adapter(loaded, parameters, examples, method, 0).metrics
    finally:
        loaded.detach("raylora")


def fastest_of_trl(loaded: LoadedModel, examples: Sequence[EncodedExample], method: Method) -> str:
    seconds = {
        way: common.measure(lambda way=way: run_trl(loaded, examples, method, way), loaded.device).seconds
        for way in trl_ways(loaded.device.type == "cuda")
    }
    print(f"TRL, seconds on {len(examples)} examples:", {k: round(v, 1) for k, v in seconds.items()}, flush=True)
    return min(seconds, key=lambda way: seconds[way])


def cost(loaded: LoadedModel, num_tokens: int, num_positions: int) -> float:
    """Multiply-adds times two of a training step: forward pass, and as much for the backward pass of frozen weights.
    Attention and the adapters' own products are left out."""
    return 2 * common.forward_flops(loaded.model, num_tokens, num_positions)


def compare(loaded: LoadedModel, examples: list[EncodedExample], method: Method, options: argparse.Namespace) -> None:
    num_answer = sum(label != -100 for e in examples for label in labels_of(e, "answer"))
    num_tokens = sum(map(len, examples))
    padded = method.max_length * len(examples)
    ways: dict[str, Callable[[], Any]] = {"raylora": lambda: run_raylora(loaded, examples, method)}
    costs = {"raylora": cost(loaded, num_tokens, num_answer)}
    if "trainer" in options.ways:
        ways["Trainer, padded"] = lambda: run_padded(loaded, examples, method)
        costs["Trainer, padded"] = cost(loaded, padded, padded)
    if "trl" in options.ways:
        other = common.rival(loaded, options.shape)
        best = options.trl_way or fastest_of_trl(other, examples[:16], method)
        ways[f"TRL, {best}"] = lambda: run_trl(other, examples, method, best)
        costs[f"TRL, {best}"] = costs["raylora"]  # if it did no more than it must
    few = Method(**{**method.model_dump(), "gradient_accumulation": 1})
    run_raylora(loaded, examples[:4], few)  # warm
    taken: dict[str, list[common.Measured]] = {way: [] for way in ways}
    held: dict[str, list[int]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, run in ways.items():
            held[way].append(common.measure(lambda: None, loaded.device).peak_bytes)
            taken[way].append(common.measure(run, loaded.device))
            print(f"{way}: {taken[way][-1].seconds:.1f} s", flush=True)
    ours = min(m.seconds for m in taken["raylora"])
    rate = common.matrix_rate(loaded.device, torch.bfloat16 if loaded.device.type == "cuda" else torch.float32)
    rows = []
    for way, runs in taken.items():
        seconds = min(m.seconds for m in runs)
        rows.append(
            {
                "way": way,
                "seconds": seconds,
                "times raylora": seconds / ours,
                "bound": costs[way] / costs["raylora"],
                "answer tokens/s": num_answer / seconds,
                "tokens/s": num_tokens / seconds,
                "examples/s": len(examples) / seconds,
                "share of matrix rate": costs[way] / seconds / rate,
                "GB added": max(m.peak_bytes - h for m, h in zip(runs, held[way], strict=True)) / 1e9,
            }
        )
    extra = {
        "examples": len(examples), "tokens": num_tokens, "answer tokens": num_answer, "padded tokens": padded,
        "dropout": method.lora_dropout, "matrix rate, GFLOP/s": round(rate / 1e9),
    }  # fmt: skip
    title = f"{options.name}, {options.shape or options.model}, {options.quantization}, dropout {method.lora_dropout}"
    title += ", eager" if options.eager else ""
    common.report(title, rows, options.json, extra)


def compare_adapters(
    loaded: LoadedModel, examples: list[EncodedExample], method: Method, options: argparse.Namespace
) -> None:
    """``--adapters`` adapters on as many small datasets: one after another, over the same passes, and by TRL."""
    names = [f"adapter{i}" for i in range(options.adapters)]
    parts = [examples[i :: options.adapters] for i in range(options.adapters)]

    def one_by_one() -> None:
        for name, part in zip(names, parts, strict=True):
            train_adapter(loaded, loaded.attach(method, 0, name), part, method, 0)
            loaded.detach(name)

    def together() -> None:
        jobs = [
            Job(loaded.attach(method, 0, name), part, method, 0, name) for name, part in zip(names, parts, strict=True)
        ]
        train_adapters(loaded, jobs)
        for name in names:
            loaded.detach(name)

    ways: dict[str, Callable[[], Any]] = {"together": together, "one by one": one_by_one}
    if "trl" in options.ways:
        other = common.rival(loaded, options.shape)
        best = options.trl_way or fastest_of_trl(other, parts[0], method)
        ways[f"TRL, {best}"] = lambda: [run_trl(other, part, method, best) for part in parts]
    one_by_one()  # warm, and on a GPU it is known what a token takes
    taken: dict[str, list[common.Measured]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, run in ways.items():
            taken[way].append(common.measure(run, loaded.device))
    num_tokens = sum(map(len, examples))
    rows = [
        {
            "way": way,
            "seconds": min(m.seconds for m in runs),
            "times together": min(m.seconds for m in runs) / min(m.seconds for m in taken["together"]),
            "tokens/s": num_tokens / min(m.seconds for m in runs),
            "peak GB": max(m.peak_bytes for m in runs) / 1e9,
        }
        for way, runs in taken.items()
    ]
    common.report(f"{options.adapters} adapters, {options.name}", rows, options.json, {"tokens": num_tokens})


def compare_budgets(
    loaded: LoadedModel, examples: list[EncodedExample], method: Method, options: argparse.Namespace
) -> None:
    """Seconds and memory by the most tokens in a minibatch."""
    rows = []
    for budget in (int(b) for b in options.budgets.split(",")):
        memory.CPU_TOKEN_BUDGET = loaded.training_tokens = budget
        before = common.measure(lambda: None, loaded.device).peak_bytes
        measured = common.measure(lambda: run_raylora(loaded, examples, method), loaded.device)
        rows.append(
            {
                "budget": budget,
                "seconds": measured.seconds,
                "tokens/s": sum(map(len, examples)) / measured.seconds,
                "GB added": (measured.peak_bytes - before) / 1e9,
            }
        )
        print(rows[-1], flush=True)
    common.report(f"tokens in a minibatch, {options.name}", rows, options.json, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--shape", choices=sorted(common.SHAPES), help="random weights of this shape")
    parser.add_argument("--quantization", default="none", choices=("none", "8bit", "4bit", "fp8"))
    parser.add_argument("--file", type=int, default=0, help="which file of chunk_001")
    parser.add_argument("--num-examples", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default="trainer,trl", help="what raylora is held against")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument(
        "--trl-way", choices={**TRL_WAYS, **LIGER_WAY}, help="in place of the one that is fastest on 16 examples"
    )
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--budgets", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    loaded = common.load(options.model, options.quantization, options.shape)
    loaded.graphs = not options.eager
    path = sorted((common.SHARED / "chunk_001").iterdir())[options.file]
    options.name = path.stem
    dataset = read_dataset(path)
    sample = sample_examples(dataset.examples, options.num_examples, dataset.seed)
    examples = [encode_example(loaded.tokenizer, e, options.max_length) for e in sample]
    method = Method(num_epochs=1, max_length=options.max_length, lora_dropout=options.dropout)
    run = compare_budgets if options.budgets else compare_adapters if options.adapters else compare
    run(loaded, examples, method, options)


if __name__ == "__main__":
    main()
