"""Trainings on fp8 weights beside float32: which type the gradients of inputs may have. Runs on a CPU.

python -m benchmarks.fp8                      # the figures of NOTES.md; 15 minutes
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from raylora.config.method import Method
from raylora.config.options import ModelOptions
from raylora.data.datasets import read_dataset, sample_examples
from raylora.data.encoding import EncodedExample, encode_example
from raylora.model.adapters import LoadedModel
from raylora.model.fp8 import Fp8Linear, make_fp8
from raylora.model.loading import load_model
from raylora.model.weight_only import replace_class
from raylora.training.gradients import Job
from raylora.training.loop import TrainingResult, train_adapters
from raylora.training.losses import example_losses


class Bfloat16Gradients(Fp8Linear):
    """Gradients of inputs as products in bfloat16."""

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        return (gradient.bfloat16() @ self.float_weight(torch.bfloat16)).to(gradient.dtype)


class E5m2Gradients(Fp8Linear):
    """Gradients as float8_e5m2: more range, and two bits of precision in place of three."""

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        numbers = gradient.float() * self.scales
        scales = numbers.abs().amax(1, keepdim=True).clamp(min=1e-30) / 57344
        rows = (numbers / scales).to(torch.float8_e5m2).float() * scales
        return (rows @ self.weight.view(torch.float8_e4m3fn).float()).bfloat16().to(gradient.dtype)


WAYS: dict[str, Any] = {
    "float32": None,
    "float32, another seed": None,
    "fp8, bfloat16 gradients": Bfloat16Gradients,
    "fp8, e4m3 gradients": Fp8Linear,
    "fp8, e5m2 gradients": E5m2Gradients,
}


def train(loaded: LoadedModel, seed: int, method: Method, examples: list[EncodedExample], held_out: Any) -> Any:
    """The losses of each step, and the mean loss of ``held_out`` afterwards."""
    try:
        result = train_adapters(loaded, [Job(loaded.attach(method, seed), examples, method, seed)])[0]
        assert isinstance(result, TrainingResult)
        losses = [e.total / e.num_supervised for e in example_losses(loaded, held_out, "answer", 512)]
        return np.array([step.loss for step in result.steps]), np.array([s.grad_norm for s in result.steps]), losses
    finally:
        loaded.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--ways", default=";".join(WAYS), help="the first is what the others are held against")
    parser.add_argument("--num-examples", type=int, default=32)
    parser.add_argument("--num-epochs", type=float, default=4)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = sorted((common.SHARED / "chunk_001").iterdir())[0]
    dataset = read_dataset(path)
    sample = sample_examples(dataset.examples, options.num_examples + 32, dataset.seed)
    method = Method(num_epochs=options.num_epochs, max_length=options.max_length, learning_rate=options.learning_rate)
    rows: list[dict[str, Any]] = []
    expected = None
    for way in options.ways.split(";"):
        kind = WAYS[way]
        loaded = load_model(ModelOptions(model=options.model, quantization="none"))
        if kind:
            make_fp8(loaded.model)
            replace_class(loaded.model, Fp8Linear, kind)
        examples = [encode_example(loaded.tokenizer, e, method.max_length) for e in sample]
        kept, held_out = examples[: options.num_examples], examples[options.num_examples :]
        run = functools.partial(train, loaded, int("seed" in way), method, kept, held_out)
        taken = common.measure(run, loaded.device)
        losses, norms, after = taken.result
        expected = taken.result if expected is None else expected
        rows.append(
            {
                "way": way,
                "first loss": losses[0],
                "loss of the last 3 steps": losses[-3:].mean(),
                "from float32, mean of steps": np.abs(losses - expected[0]).mean(),
                "held-out loss": np.mean(after),
                "held-out, mean from float32": np.abs(np.subtract(after, expected[2])).mean(),
                "gradient's norm, of float32's": (norms / expected[1]).mean(),
                "CPU seconds": taken.cpu_seconds,
            }
        )
        print(rows[-1], flush=True)
    common.report(f"training on {options.num_examples} examples of {path.stem}", rows, options.json, {})


if __name__ == "__main__":
    main()
