"""What all benchmarks need: a model, the machine's own limit, peak memory, and results as JSON and a table."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from raylora.config.method import Method
from raylora.config.options import ModelOptions, Scoring
from raylora.mmlu.prompts import EncodedQuestion
from raylora.mmlu.scoring import answer_together, evaluate
from raylora.model.adapters import LoadedModel
from raylora.model.device import compute_dtype
from raylora.model.loading import load_model, load_tokenizer
from raylora.model.sources import quiet_libraries, resolve_model
from raylora.records import Score
from raylora.storage.atomic import write_atomically
from raylora.storage.places import cache_folder

SHARED = Path(os.environ.get("RAYLORA_SHARED_DATA", "../shared/data"))
SHAPES = {
    "smallest": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 49152, "max_position_embeddings": 2048,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 49152, "max_position_embeddings": 2048,
    },
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
}  # fmt: skip


QUANTIZATIONS = ("none", "8bit", "4bit", "fp8")


def load(name: str, quantization: str, shape: str | None) -> LoadedModel:
    """A real model, or random weights of a shape, quantized as a real one would be."""
    if shape is None:
        return load_model(ModelOptions(model=name, quantization=quantization))
    from raylora.model.loading import wrap_model  # here, so that a real model is measured at earlier commits too

    if quantization == "fp8" and torch.cuda.is_available():
        from raylora.model.fp8 import check_fp8

        check_fp8(torch.device("cuda"))
    options = ModelOptions(model=name, quantization=quantization)
    return wrap_model(build(shape, quantization), load_tokenizer(resolve_model(name)), shape, options)


def rival(loaded: LoadedModel, shape: str | None) -> LoadedModel:
    """The same model for trainers of others, which patch theirs: as transformers and bitsandbytes make it."""
    if shape is None:
        return LoadedModel(copy.deepcopy(loaded.model), loaded.tokenizer, loaded.source, loaded.quantization)
    model = build(shape, loaded.quantization).requires_grad_(False)
    return LoadedModel(model, loaded.tokenizer, loaded.source, loaded.quantization)


def build(shape: str, quantization: str) -> Any:
    """A Llama of random weights, made on the GPU if there is one, in eval mode, quantized there by bitsandbytes.

    On an H200 that takes 2 seconds for 8 billion weights; written to a disk of memory and read again they take 35.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    from raylora.model.loading import quantization_config

    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(device)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], name_or_path=shape))
    finally:
        torch.set_default_dtype(torch.float32)
    if (config := quantization_config(quantization, dtype)) is not None:
        weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        model.hf_quantizer.preprocess_model(model, device_map={"": device})
        for name, module in model.named_modules():
            if name in weights and module.weight is not weights[name]:  # it was replaced, with a weight to come
                module.weight = quantized(weights.pop(name), module.weight)
        model.hf_quantizer.postprocess_model(model)
    return model.eval()


def quantized(weight: torch.Tensor, like: torch.Tensor) -> torch.nn.Parameter:
    """``weight`` as bitsandbytes keeps it, quantized on its own device; ``like`` holds the settings."""
    import bitsandbytes as bnb

    if isinstance(like, bnb.nn.Int8Params):
        integers, scales, _ = bnb.functional.int8_vectorwise_quant(weight.data.to(torch.float16))
        return bnb.nn.Int8Params(integers, requires_grad=False, has_fp16_weights=False, CB=integers, SCB=scales)
    return bnb.nn.Params4bit(weight.data, requires_grad=False, **like.__dict__).to(weight.device)


def shape_folder(shape: str, tokenizer_of: str = "demo") -> Path:
    """A folder in the cache with random weights of a shape, in bfloat16, and somebody's tokenizer. Made once."""
    folder = cache_folder() / "shapes" / shape
    if (folder / "config.json").is_file():
        return folder
    model = build(shape, "none").to(torch.bfloat16)

    def save(partial: Path) -> None:
        model.save_pretrained(partial)
        load_tokenizer(resolve_model(tokenizer_of)).save_pretrained(partial)

    write_atomically(folder, save)
    return folder


def score(
    loaded: LoadedModel,
    encoded: Sequence[EncodedQuestion],
    token_budget: int | None = None,
    scoring: Scoring = "letters",
) -> Score:
    """The model's answers, with the adapter that is active in it: the one place where benchmarks ask questions."""
    return evaluate(loaded, encoded, scoring, token_budget)


def score_adapters(loaded: LoadedModel, encoded: Sequence[EncodedQuestion], names: Sequence[str]) -> list[np.ndarray]:
    """Log-likelihoods (N, 4) of each of the attached adapters, which are asked in the same passes."""
    found, _ = answer_together(loaded, encoded, names)
    return [np.array([found[name][i].logprobs for i in range(len(encoded))]) for name in names]


@contextlib.contextmanager
def random_adapters(loaded: LoadedModel, number: int) -> Iterator[list[str]]:
    """Inside, so many adapters are attached whose weights are random in A and in B; the last is active.

    Yields:
        Their names.
    """
    names = [f"adapter{i}" for i in range(number)]
    generator = torch.Generator(loaded.device).manual_seed(0)
    try:
        for name in names:
            with torch.no_grad():
                for p in loaded.attach(Method(), 0, name):
                    p.normal_(0, 0.02, generator=generator)
            loaded.activate(name)
        yield names
    finally:
        for name in names:
            loaded.detach(name)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds times two a second, of square matrices of this type: what the machine can do at best."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(3):
            a @ b
        synchronize(device)
        best = max(best, 3 * 2 * n**3 / (time.perf_counter() - started))
    return best


def empty() -> None:
    """Give the memory of a model back that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_flops(model: Any, num_tokens: int, num_head_positions: int = 0) -> float:
    """Two for each weight that a token meets, attention left out; the output head where it runs alone."""
    c = model.config
    attention = 2 * c.hidden_size + 2 * c.hidden_size * c.num_key_value_heads // c.num_attention_heads
    weights = c.num_hidden_layers * c.hidden_size * (attention + 3 * c.intermediate_size)
    return 2.0 * (weights * num_tokens + c.vocab_size * c.hidden_size * num_head_positions)


@dataclass(frozen=True)
class Measured:
    """``cpu_seconds`` are those of all threads: with OMP_NUM_THREADS=1 they hold on a busy machine too."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    result: Any
    reserved_bytes: int
    """On a GPU what was held there: what graphs keep for their next replay is not counted as allocated."""


def measure(run: Callable[[], Any], device: torch.device) -> Measured:
    """Seconds and the most memory held while ``run`` ran, what was there before included."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the process' high-water mark starts anew
    started, cpu_started = time.perf_counter(), time.process_time()
    result = run()
    synchronize(device)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return Measured(seconds, cpu_seconds, allocated, result, reserved)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    return Measured(seconds, cpu_seconds, peak, result, peak)


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cores": psutil.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch": torch.__version__,
    }


def report(title: str, rows: Sequence[dict[str, Any]], json_path: Path | None, extra: dict[str, Any]) -> None:
    """A table on the terminal, and everything as JSON."""
    table = Table(title=title, box=box.MARKDOWN)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="left" if isinstance(rows[0].get(name), str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v := row.get(name, ""), float) else str(v) for name in names))
    Console(width=200).print(table)
    for key, value in extra.items():
        print(f"{key}: {value}")
    if json_path:
        json_path.write_text(json.dumps({"title": title, "machine": machine(), "rows": rows, **extra}, indent=1) + "\n")


if __name__ == "__main__":  # python -m benchmarks.common SHAPE: where its model is
    import sys

    print(shape_folder(sys.argv[1]))
