"""Estimates an experiment's tokens, memory and time before it is run, from the shape of the model.

The shape is counted on a model on torch's meta device, which needs its configuration but none of its weights. Memory is
that of the weights, the adapter, and the activations that a minibatch saves for its backward pass. Time is the number
of floating-point operations over the rate that this machine reaches in a stage: a measured share of the rate of its
large matrix products.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raylora.config import Config, FeatureOptions, Method, Stage
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
"""Bytes of a weight in a quantized matrix. nf4: half a byte, a scale of one byte for each 64 weights, and a float32 for
each 256 scales (double quantization, Dettmers et al. 2023)."""
ADAPTER_BYTES = 16
"""Bytes of an adapter's parameter in training: itself, its gradient and AdamW's two moments, each in float32."""
SAVED_SHARE = 1.1
"""Numbers that a layer saves for the backward pass, over the number of its matrices' inputs and outputs. Counted with
``torch.autograd.graph.saved_tensors_hooks``: 1.04 for SmolLM2's shape, 1.08 for Llama-3-8B's."""
CUDA_CONTEXT_BYTES = 700 * 2**20
"""What CUDA takes of a GPU's memory before there is a model."""
CPU_PROCESS_BYTES = 600 * 2**20
"""What a process with torch and transformers takes before there is a model."""
SAMPLED_QUESTIONS = 64
"""About how many questions are tokenized to estimate the tokens of all."""
SHARE_OF_RATE = {"train": 0.45, "evaluate": 0.6}
"""Share of the rate of large matrix products that a stage reaches: on 2 CPU cores, with SmolLM2 (benchmarks/NOTES.md).
Not measured on a GPU."""


@dataclass(frozen=True)
class Shape:
    """Counts of a causal language model's weights and activations, by which memory and time are estimated."""

    layer_weights: int
    """Weights of the matrices in its layers: those that are quantized, and that every token is multiplied with."""
    largest_matrix: int
    """Weights of the largest of these matrices."""
    other_weights: int
    """Weights of embeddings, norms and output head."""
    adapter_rows: int
    """Inputs plus outputs of the matrices that get an adapter: an adapter of rank r has r times as many parameters."""
    adapted_inputs: int
    """Inputs of the matrices that get an adapter."""
    widths: int
    """Inputs plus outputs of all matrices in its layers."""
    num_layers: int
    hidden_size: int


def shape_of(source: str, target_modules: Sequence[str], trust_remote_code: bool = False) -> Shape | None:
    """The shape of a model, from its configuration alone; None where that does not say enough."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            return None  # stored quantized: its weights take fewer bytes than the model built here would have
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return _count_weights(model, config.get_text_config(), target_modules)
    except Exception:  # a model's own code may raise anything; if something is wrong, loading the model reports it
        log.info("no estimate: this model cannot be built from its configuration alone", exc_info=True)
        return None


def _count_weights(model: Any, config: Any, target_modules: Sequence[str]) -> Shape | None:
    """The shape of a model; None where most weights are not in ``Linear`` modules, as in fused experts.

    Such weights are neither quantized nor multiplied with every token, so that no estimate would be right.
    """
    head = model.get_output_embeddings()
    matrices = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    adapted = [m for name, m in matrices.items() if name.rpartition(".")[2] in target_modules]
    in_layers = sum(m.weight.numel() for m in matrices.values())
    num_all = sum(p.numel() for p in model.parameters())
    # By identity, as input embeddings and output head may be one tensor, which is then counted once.
    embeddings = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), head) if m is not None}
    if in_layers < (num_all - sum(embeddings.values())) / 2:
        return None
    return Shape(
        layer_weights=in_layers,
        largest_matrix=max(m.weight.numel() for m in matrices.values()),
        other_weights=num_all - in_layers,
        adapter_rows=sum(m.in_features + m.out_features for m in adapted),
        adapted_inputs=sum(m.in_features for m in adapted),
        widths=sum(m.in_features + m.out_features for m in matrices.values()),
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
    )


def weight_bytes(shape: Shape, quantization: str, machine: Hardware) -> int:
    """Bytes of the base's weights. Quantization makes only the matrices in its layers smaller."""
    return int(
        shape.layer_weights * BYTES_A_WEIGHT.get(quantization, machine.dtype_bytes)
        + shape.other_weights * machine.dtype_bytes
    )


def base_bytes(shape: Shape, quantization: str, machine: Hardware) -> int:
    """Bytes of the base while it runs: its weights, and one quantized matrix at a time as floats for its product."""
    floats = 0 if quantization == "none" else shape.largest_matrix * machine.dtype_bytes
    return weight_bytes(shape, quantization, machine) + floats


def training_bytes(shape: Shape, method: Method, num_tokens: int, machine: Hardware, checkpointing: bool) -> int:
    """Bytes of an adapter's training beside the base's weights, with minibatches of ``num_tokens``.

    That is the adapter, its gradient and optimizer, and the activations that are saved for the backward pass.
    """
    # On a GPU norms save their input in float32: 4 bytes a number, two norms a layer.
    norms = 8 * shape.hidden_size * shape.num_layers if machine.on_gpu else 0
    bytes_a_token = SAVED_SHARE * shape.widths * machine.dtype_bytes + norms
    bytes_a_token += shape.adapted_inputs if method.lora_dropout else 0  # dropout's mask: a byte for each input
    if checkpointing:
        # Each layer's input is saved, and one layer's activations at a time are computed again.
        bytes_a_token = bytes_a_token / shape.num_layers + shape.hidden_size * shape.num_layers * machine.dtype_bytes
    return int(ADAPTER_BYTES * method.lora_r * shape.adapter_rows + bytes_a_token * num_tokens)


@dataclass(frozen=True)
class Estimate:
    """What one experiment takes; None where the model's shape, or the machine that will run it, is not known."""

    peak_memory_bytes: int | None
    seconds: float | None


class Estimator:
    """Estimates the experiments of a run, which share a model and a machine.

    ``misfit`` says why the model does not fit the machine; it is empty if it does, or if its shape is not known.

    Args:
        source: the folder or the Hugging Face name that the model is loaded from.
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
        self, sample: Sequence[Example], num_examples: int, num_chars: int, method: Method, stages: Sequence[Stage]
    ) -> tuple[Sizes, Estimate]:
        """How large a dataset is, and what an experiment on it takes.

        Args:
            sample: its first examples.
            num_chars: characters of all its examples.
            stages: those that this experiment runs itself.
        """
        try:
            sizes = sizes_of(self._tokenizer, sample, num_examples, method.max_length, num_chars)
        except UserError:  # the chat template refuses an example: the experiment's own run reports that in its row
            sizes = Sizes(num_examples, 0.0, 0)
        if self._shape is None or not sizes.num_tokens:
            return sizes, Estimate(None, None)
        counts = token_counts(self._config, method, sizes, self._num_question_tokens, stages)
        return sizes, estimate(self._shape, self._machine, self._config.quantization, method, sizes, counts)


def estimate(
    shape: Shape, machine: Hardware, quantization: str, method: Method, sizes: Sizes, counts: dict[str, float]
) -> Estimate:
    """What one experiment takes, without the evaluation of the base, which all experiments share.

    Args:
        sizes: the size of its dataset.
        counts: from ``token_counts``.
    """
    base = base_bytes(shape, quantization, machine)
    fitting = _training_that_fits(shape, machine, method, sizes, base)
    peak = base + training_bytes(shape, method, fitting.tokens, machine, fitting.checkpointing)
    if not machine.on_gpu:
        peak += CPU_PROCESS_BYTES
        # onednn.py reorders copies of the weights, for forward and backward pass, unless they take too much memory.
        copies = 2 * machine.dtype_bytes * shape.layer_weights if quantization == "none" else 0
        peak += copies if copies <= COPIES_MEMORY_SHARE * machine.memory_bytes else 0
    operations = 2 * shape.layer_weights  # of a token's forward pass: a multiplication and an addition for each weight
    seconds = None
    if machine.rate:
        seconds = operations * counts["evaluate"] / (SHARE_OF_RATE["evaluate"] * machine.rate)
        # A backward pass has as many operations as a forward pass, not twice as many, as the base's weights have no
        # gradient. Gradient checkpointing runs the forward pass a second time.
        num_passes = 3 if fitting.checkpointing else 2
        seconds += num_passes * operations * counts["train"] / (SHARE_OF_RATE["train"] * machine.rate)
    return Estimate(peak, seconds)


def _training_that_fits(shape: Shape, machine: Hardware, method: Method, sizes: Sizes, base: int) -> Attempt:
    """The minibatch that a training ends up with after backing off; the smallest one if none fits.

    Args:
        base: bytes of the base.
    """
    budget = GPU_TOKEN_BUDGET if machine.on_gpu else CPU_TOKEN_BUDGET
    tokens_a_step = method.batch_size * method.gradient_accumulation * sizes.mean_tokens
    free_bytes = machine.memory_bytes - (CUDA_CONTEXT_BYTES if machine.on_gpu else 0)
    share = MINIBATCH_MEMORY_SHARE if machine.on_gpu else 1.0
    attempt = Attempt(max(sizes.longest, int(min(budget, tokens_a_step))))
    while base + training_bytes(shape, method, attempt.tokens, machine, attempt.checkpointing) / share > free_bytes:
        smaller = next_attempt(attempt, attempt.tokens, attempt.tokens <= sizes.longest, may_checkpoint=True)
        if smaller is None:
            break
        attempt = smaller._replace(tokens=max(sizes.longest, smaller.tokens))
    return attempt


def token_counts(
    config: Config, method: Method, sizes: Sizes, num_question_tokens: int, stages: Sequence[Stage]
) -> dict[str, float]:
    """Tokens of an experiment: with a forward pass only (``evaluate``), and with a backward pass too (``train``).

    Args:
        num_question_tokens: tokens of all prompts of MMLU; 0 where it is not evaluated.
    """
    counts: dict[str, float] = defaultdict(float)
    if "features" in stages:
        options = FeatureOptions(**config.settings_of(FeatureOptions))
        sample = min(options.sample_size or sizes.num_examples, sizes.num_examples)
        examples_a_step = min(method.batch_size * method.gradient_accumulation, sample)
        counts["evaluate"] += 2 * sample * sizes.mean_tokens  # whole examples, then their answers alone
        counts["train"] += options.probe_steps * examples_a_step * sizes.mean_tokens
    if "train" in stages:
        counts["train"] += method.num_epochs * sizes.num_tokens
    if "mmlu" in stages:
        counts["evaluate"] += num_question_tokens
    return counts


@dataclass(frozen=True)
class Sizes:
    """How many examples a dataset has, and how many tokens these have, estimated from a sample."""

    num_examples: int
    mean_tokens: float
    longest: int
    """Tokens of the longest example of the sample; the mean, if that is larger."""

    @property
    def num_tokens(self) -> int:
        return round(self.num_examples * self.mean_tokens)


def sizes_of(
    tokenizer: Any, sample: Sequence[Example], num_examples: int, max_length: int, num_chars: int | None = None
) -> Sizes:
    """Estimate the examples' lengths in tokens from the first examples of a dataset.

    Args:
        num_examples: of the whole dataset.
        max_length: tokens after which an example is cut off.
        num_chars: characters of the whole dataset. They correct for a sorted file, whose first examples are shorter or
            longer than the others; None: no correction.

    Raises:
        UserError: the chat template refuses an example.
    """
    lengths = [len(e) for e in encode_each(tokenizer, sample, max_length)]
    mean, longest = sum(lengths) / max(1, len(lengths)), max(lengths, default=0)
    num_sample_chars = sum(map(count_chars, sample))
    if num_chars and num_sample_chars:
        # The chat template's own tokens, those of an empty example, do not grow with the number of characters.
        num_template = min(
            mean, len(next(encode_each(tokenizer, [Example((Message("user", ""),), "", "")], max_length)))
        )
        growth = (num_chars / num_examples) / (num_sample_chars / len(lengths))
        mean = min(float(max_length), num_template + (mean - num_template) * growth)
        longest = max(longest, math.ceil(mean))
    return Sizes(num_examples, mean, longest)


def count_question_tokens(tokenizer: Any, asked: QuestionSet, config: Config) -> int:
    """Tokens of all prompts, estimated from a sample of them.

    The solved questions of a few-shot prompt are counted once a subject, as the shared prefix that they are.
    """
    sample = asked.questions[:: max(1, len(asked.questions) // SAMPLED_QUESTIONS)]
    ids = tokenizer([harness_prompt(q, []) for q in sample], add_special_tokens=False)["input_ids"]
    num_shots = config.num_fewshot * len({q.subject for q in asked.questions})
    return round(sum(map(len, ids)) / len(sample) * (len(asked.questions) + num_shots))


def misfit(shape: Shape, machine: Hardware, config: Config) -> str:
    """Why the base and an adapter do not fit the machine, and what would; "" where they fit.

    They fit if training on one short example at a time does, with gradient checkpointing.
    """
    if config.max_memory:
        return ""  # the user has chosen how much goes to each device, and the rest to the CPU
    least = _least_bytes(shape, config.quantization, config, machine)
    free_bytes = machine.memory_bytes - (CUDA_CONTEXT_BYTES if machine.on_gpu else CPU_PROCESS_BYTES)
    if least <= free_bytes:
        return ""
    smaller = [q for q in ("8bit", "4bit") if _least_bytes(shape, q, config, machine) <= free_bytes]
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
        f"time, and {where} has {gigabytes(max(0, free_bytes))} for it: {fix}"
    )


def check_fit_here(config: Config) -> None:
    """Check that the model fits the GPU that this process has.

    Raises:
        DoesNotFitError: it does not.
    """
    shape = shape_of(resolve_model(config.model), config.target_modules, config.trust_remote_code)
    if shape:
        free, _ = torch.cuda.mem_get_info()
        itemsize = compute_dtype(torch.device("cuda")).itemsize
        # ``misfit`` leaves room for a CUDA context, but this process has its own already: it is not in ``free``.
        if reason := misfit(shape, Hardware("cuda", itemsize, free + CUDA_CONTEXT_BYTES, None), config):
            raise DoesNotFitError(reason)


def _least_bytes(shape: Shape, quantization: str, config: Config, machine: Hardware) -> int:
    """Bytes of the base, and of the smallest training, if the run has any: 64 tokens, with checkpointing."""
    base = base_bytes(shape, quantization, machine)
    if "train" not in config.stages and not config.probe_steps:
        return base
    return base + min(training_bytes(shape, m, 64, machine, True) for m in config.grid_methods())


def gigabytes(num_bytes: float) -> str:
    """Bytes as text, in GB of 10^9 bytes."""
    return f"{num_bytes / 1e9:.1f} GB"
