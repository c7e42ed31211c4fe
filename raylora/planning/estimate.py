"""What an experiment will take, worked out before it is run: tokens, memory and time, from the model's shape.

The shape is that of the model built on torch's meta device, which reads its configuration and no weight. Memory is
weights, adapter and what a minibatch leaves behind for its way back. Time is the number of multiplications over the
rate that this machine's matrix products reach, by the share of it that whole stages were measured to reach.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raylora.config import Config, FeatureOptions, Method
from raylora.data.encoding import encode_each
from raylora.data.examples import count_chars
from raylora.errors import DoesNotFitError, UserError
from raylora.mmlu.prompts import harness_prompt
from raylora.mmlu.question_set import QuestionSet
from raylora.model.device import compute_dtype
from raylora.model.loading import load_tokenizer
from raylora.model.memory import (
    COPIES_MEMORY_SHARE,
    CPU_TOKEN_BUDGET,
    GPU_TOKEN_BUDGET,
    MINIBATCH_MEMORY_SHARE,
    Attempt,
    next_attempt,
)
from raylora.model.sources import resolve_model
from raylora.planning.hardware import Hardware, hardware_of
from raylora.records import Example, Message

log = logging.getLogger("raylora")
BYTES_A_WEIGHT = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Of a quantized matrix: nf4 in blocks of 64, whose scales are bytes in blocks of 256 (Dettmers et al. 2023)."""
ADAPTER_BYTES = 16
"""A parameter of an adapter in float32, its gradient and AdamW's two moments."""
SAVED_SHARE = 1.1
"""What a layer keeps for the way back, over the inputs and outputs of its matrices. Counted with
``torch.autograd.graph.saved_tensors_hooks``: 1.04 for SmolLM2's shape, 1.08 for Llama-3-8B's."""
CUDA_CONTEXT_BYTES = 700 * 2**20
CPU_PROCESS_BYTES = 600 * 2**20
"""What CUDA, and a process with torch and transformers, take before there is a model."""
SAMPLED_QUESTIONS = 64
SHARE_OF_RATE = {"train": 0.45, "evaluate": 0.6}
"""Of the rate of large matrix products, on 2 CPU cores with SmolLM2 (benchmarks/NOTES.md). Not measured on a GPU."""


@dataclass(frozen=True)
class Shape:
    """Counts of a causal language model's numbers."""

    layer_weights: int
    """Of the matrices within its layers: what quantization makes smaller and every token is multiplied with."""
    other_weights: int
    """Embeddings, norms, output head."""
    adapter_rows: int
    """Inputs and outputs of the matrices that get an adapter, added up: an adapter of rank r has r times as many."""
    adapted_inputs: int
    widths: int
    """Inputs and outputs of all matrices, added up."""
    num_layers: int
    hidden_size: int


def shape_of(source: str, target_modules: Sequence[str], trust_remote_code: bool = False) -> Shape | None:
    """The shape of a model by its configuration; None where that cannot be built without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            return None  # its weights are smaller than its configuration says
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return _count_weights(model, config.get_text_config(), target_modules)
    except Exception:  # a model's own code may raise anything; loading the model will say what is wrong
        log.info("no estimate: this model cannot be built from its configuration alone", exc_info=True)
        return None


def _count_weights(model: Any, config: Any, target_modules: Sequence[str]) -> Shape | None:
    """None where most weights are not in plain matrices, as in fused experts: nothing would be right for these."""
    head = model.get_output_embeddings()
    matrices = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    adapted = [m for name, m in matrices.items() if name.rpartition(".")[2] in target_modules]
    in_layers = sum(m.weight.numel() for m in matrices.values())
    num_all = sum(p.numel() for p in model.parameters())
    ends = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), head) if m is not None}
    if in_layers < (num_all - sum(ends.values())) / 2:
        return None
    return Shape(
        layer_weights=in_layers,
        other_weights=num_all - in_layers,
        adapter_rows=sum(m.in_features + m.out_features for m in adapted),
        adapted_inputs=sum(m.in_features for m in adapted),
        widths=sum(m.in_features + m.out_features for m in matrices.values()),
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
    )


def weight_bytes(shape: Shape, quantization: str, machine: Hardware) -> int:
    return int(
        shape.layer_weights * BYTES_A_WEIGHT.get(quantization, machine.dtype_bytes)
        + shape.other_weights * machine.dtype_bytes
    )


def training_bytes(shape: Shape, method: Method, num_tokens: int, machine: Hardware, checkpointing: bool) -> int:
    """What an adapter and the way back of a minibatch of ``num_tokens`` take beside the weights."""
    norms = 8 * shape.hidden_size * shape.num_layers if machine.on_gpu else 0  # their float32 inputs, twice a layer
    a_token = SAVED_SHARE * shape.widths * machine.dtype_bytes + norms
    a_token += shape.adapted_inputs if method.lora_dropout else 0  # a byte a number
    if checkpointing:
        a_token = a_token / shape.num_layers + shape.hidden_size * shape.num_layers * machine.dtype_bytes
    return int(ADAPTER_BYTES * method.lora_r * shape.adapter_rows + a_token * num_tokens)


@dataclass(frozen=True)
class Estimate:
    """Of one experiment; None where the machine that will run it, or the model's shape, is not known."""

    peak_memory_bytes: int | None
    seconds: float | None


class Estimator:
    """What the experiments of a run take.

    Args:
        asked: the questions of MMLU; None where it is not evaluated.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """

    def __init__(self, config: Config, source: str, asked: QuestionSet | None) -> None:
        self._config = config
        self._tokenizer = load_tokenizer(source, config.trust_remote_code)
        self._machine = hardware_of(config)
        self._shape = shape_of(source, config.target_modules, config.trust_remote_code)
        self._num_question_tokens = count_question_tokens(self._tokenizer, asked, config) if asked else 0
        self.misfit = misfit(self._shape, self._machine, config) if self._shape else ""

    def of(
        self, sample: Sequence[Example], num_examples: int, num_chars: int, method: Method
    ) -> tuple[Sizes, Estimate]:
        """How large a dataset is, going by its first examples and its characters, and what training on it takes."""
        try:
            sizes = sizes_of(self._tokenizer, sample, num_examples, method.max_length, num_chars)
        except UserError:  # the chat template refuses one: its own run makes the row that says so
            sizes = Sizes(num_examples, 0.0, 0)
        if self._shape is None or not sizes.num_tokens:
            return sizes, Estimate(None, None)
        return sizes, estimate(self._shape, self._machine, self._config, method, sizes, self._num_question_tokens)


def estimate(
    shape: Shape, machine: Hardware, config: Config, method: Method, sizes: Sizes, num_question_tokens: int
) -> Estimate:
    """What one experiment takes, the base's own evaluation left out.

    Args:
        sizes: of its dataset.
        num_question_tokens: of all prompts of MMLU; 0 where it is not evaluated.
    """
    weights = weight_bytes(shape, config.quantization, machine)
    fitting = _training_that_fits(shape, machine, method, sizes, weights)
    peak = weights + training_bytes(shape, method, fitting.tokens, machine, fitting.checkpointing)
    if not machine.on_gpu:
        peak += CPU_PROCESS_BYTES
        copies = 2 * machine.dtype_bytes * shape.layer_weights if config.quantization == "none" else 0
        peak += copies if copies <= COPIES_MEMORY_SHARE * machine.memory_bytes else 0  # as onednn.py has it
    counts = token_counts(config, method, sizes, num_question_tokens)
    forward = 2 * shape.layer_weights
    seconds = None
    if machine.rate:
        seconds = forward * counts["evaluate"] / (SHARE_OF_RATE["evaluate"] * machine.rate)
        # The way back has the products of the way there, once: the base's own weights have no gradient.
        seconds += (
            (3 if fitting.checkpointing else 2) * forward * counts["train"] / (SHARE_OF_RATE["train"] * machine.rate)
        )
    return Estimate(peak, seconds)


def _training_that_fits(shape: Shape, machine: Hardware, method: Method, sizes: Sizes, weights: int) -> Attempt:
    """The minibatch that a training ends up with, beside ``weights`` bytes; the smallest one if none fits."""
    most = GPU_TOKEN_BUDGET if machine.on_gpu else CPU_TOKEN_BUDGET
    a_step = method.batch_size * method.gradient_accumulation * sizes.mean_tokens
    room = machine.memory_bytes - (CUDA_CONTEXT_BYTES if machine.on_gpu else 0)
    share = MINIBATCH_MEMORY_SHARE if machine.on_gpu else 1.0
    attempt = Attempt(max(sizes.longest, int(min(most, a_step))))
    while weights + training_bytes(shape, method, attempt.tokens, machine, attempt.checkpointing) / share > room:
        smaller = next_attempt(attempt, attempt.tokens, attempt.tokens <= sizes.longest, may_checkpoint=True)
        if smaller is None:
            break
        attempt = smaller._replace(tokens=max(sizes.longest, smaller.tokens))
    return attempt


def token_counts(config: Config, method: Method, sizes: Sizes, num_question_tokens: int) -> dict[str, float]:
    """Tokens that go through the model forwards alone (``evaluate``), and forwards and back (``train``)."""
    counts: dict[str, float] = defaultdict(float)
    if "features" in config.stages:
        options = FeatureOptions(**config.settings_of(FeatureOptions))
        sample = min(options.sample_size or sizes.num_examples, sizes.num_examples)
        a_step = min(method.batch_size * method.gradient_accumulation, sample)
        counts["evaluate"] += 2 * sample * sizes.mean_tokens  # whole, and the answers alone
        counts["train"] += options.probe_steps * a_step * sizes.mean_tokens
    if "train" in config.stages:
        counts["train"] += method.num_epochs * sizes.num_tokens
    if "mmlu" in config.stages:
        counts["evaluate"] += num_question_tokens
    return counts


@dataclass(frozen=True)
class Sizes:
    """A dataset's examples in tokens, as a sample of them says."""

    num_examples: int
    mean_tokens: float
    longest: int
    """Of those seen."""

    @property
    def num_tokens(self) -> int:
        return round(self.num_examples * self.mean_tokens)


def sizes_of(
    tokenizer: Any, sample: Sequence[Example], num_examples: int, max_length: int, num_chars: int | None = None
) -> Sizes:
    """How long the examples of a dataset are, going by its first ones.

    Args:
        num_chars: of all its examples: the first ones of a sorted file are not like the others.
    """
    lengths = [len(e) for e in encode_each(tokenizer, sample, max_length)]
    mean, longest = sum(lengths) / max(1, len(lengths)), max(lengths, default=0)
    seen = sum(map(count_chars, sample))
    if num_chars and seen:
        # What the template puts around an example, however short it is, does not grow with its characters.
        empty = min(mean, len(next(encode_each(tokenizer, [Example((Message("user", ""),), "", "")], max_length))))
        growth = (num_chars / num_examples) / (seen / len(lengths))
        mean = min(float(max_length), empty + (mean - empty) * growth)
        longest = max(longest, math.ceil(mean))
    return Sizes(num_examples, mean, longest)


def count_question_tokens(tokenizer: Any, asked: QuestionSet, config: Config) -> int:
    """Tokens of all prompts, a subject's solved questions counted once, going by some of them."""
    some = asked.questions[:: max(1, len(asked.questions) // SAMPLED_QUESTIONS)]
    ids = tokenizer([harness_prompt(q, []) for q in some], add_special_tokens=False)["input_ids"]
    num_shots = config.num_fewshot * len({q.subject for q in asked.questions})
    return round(sum(map(len, ids)) / len(some) * (len(asked.questions) + num_shots))


def misfit(shape: Shape, machine: Hardware, config: Config) -> str:
    """Why the base and an adapter do not fit, not even with one short example at a time, and what would; else ""."""
    if config.max_memory:
        return ""  # what does not fit is to lie on the CPU
    least = _least_bytes(shape, config.quantization, config, machine)
    room = machine.memory_bytes - (CUDA_CONTEXT_BYTES if machine.on_gpu else CPU_PROCESS_BYTES)
    if least <= room:
        return ""
    smaller = [q for q in ("8bit", "4bit") if _least_bytes(shape, q, config, machine) <= room]
    where = "this GPU" if machine.on_gpu else "a worker here"
    fix = (
        f"--quantization {smaller[0]} would fit"
        if smaller and smaller[0] != config.quantization
        else "--max-memory can put a part of it on the CPU"
        if machine.on_gpu
        else "fewer --num-workers leave more to each"
        if (config.num_workers or 1) > 1
        else "take a smaller model or a larger machine"
    )
    return (
        f"--model {config.model}: in {config.quantization} it needs {gigabytes(least)} for training one example at a "
        f"time, and {where} has {gigabytes(max(0, room))} for it: {fix}"
    )


def check_fit_here(config: Config) -> None:
    """Whether the model fits the GPU that this process has.

    Raises:
        DoesNotFitError: it does not.
    """
    shape = shape_of(resolve_model(config.model), config.target_modules, config.trust_remote_code)
    if shape:
        free, _ = torch.cuda.mem_get_info()
        itemsize = compute_dtype(torch.device("cuda")).itemsize
        # This process holds its CUDA context already.
        if reason := misfit(shape, Hardware("cuda", itemsize, free + CUDA_CONTEXT_BYTES, None), config):
            raise DoesNotFitError(reason)


def _least_bytes(shape: Shape, quantization: str, config: Config, machine: Hardware) -> int:
    weights = weight_bytes(shape, quantization, machine)
    if "train" not in config.stages and not config.probe_steps:
        return weights
    return weights + min(training_bytes(shape, m, 64, machine, True) for m in config.grid_methods())


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
