"""Estimates an experiment's tokens, memory and time before it is run, from the shape of the model.

Memory is that of the weights, the adapters, and the activations that a minibatch saves for its backward pass. Time is,
on a CPU, the number of floating-point operations over the rate that it reaches in a stage: a measured share of the rate
of its large matrix products. On a GPU it is the sum of all passes (``gpu_passes``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from raylora.config.method import Method
from raylora.config.options import FeatureOptions
from raylora.config.run import Config, Stage
from raylora.data.encoding import encode_each
from raylora.data.examples import count_chars
from raylora.data.rendered import TemplateCounts
from raylora.data.template_process import check_template, template_failure
from raylora.errors import DoesNotFitError
from raylora.features.static import count_held_out
from raylora.mmlu.question_set import QuestionSet
from raylora.model.device import compute_dtype, free_bytes_of
from raylora.model.forward import GPU_LOGITS
from raylora.model.graphs import fixed_size, largest_size
from raylora.model.loading import tokenizer_for
from raylora.model.memory import (
    COPIES_MEMORY_SHARE,
    CPU_TOKEN_BUDGET,
    ENOUGH_TOKENS,
    GPU_FEATURE_TOKENS,
    GPU_TOKEN_BUDGET,
    MINIBATCH_MEMORY_SHARE,
    Attempt,
    next_attempt,
    tokens_that_fit,
)
from raylora.model.sources import resolve_model
from raylora.model.targets import Adapted
from raylora.planning.gpu_passes import OPTIMIZER_BYTES, STEP_SECONDS, is_graphed, run_seconds
from raylora.planning.hardware import Hardware, gigabytes, hardware_of
from raylora.planning.questions import (
    QuestionTokens,
    count_question_tokens,
    forward_bytes,
    question_bytes,
    question_seconds,
    tokens_in_batch,
)
from raylora.planning.shape import LLM_INT8, Shape, base_bytes, shape_of, shape_of_skeleton
from raylora.planning.training_memory import LOGIT_BYTES, activation_bytes, adapter_bytes, training_bytes
from raylora.records import Example, Message
from raylora.training.gradients import MOST_GROUPS
from raylora.training.slots import adapters_that_fit

CUDA_CONTEXT_BYTES = 700 * 2**20
"""What CUDA takes of a GPU's memory before there is a model."""
CPU_PROCESS_BYTES = 600 * 2**20
"""What a process with torch and transformers takes before there is a model."""
SHARE_OF_RATE = {"train": 0.45, "evaluate": 0.6}
"""Share of the rate of large matrix products that a stage reaches on a CPU: 2 cores, SmolLM2 (benchmarks/NOTES.md)."""
GENERAL_TOKENS = 1800
"""Tokens of the texts of general knowledge that a probe's forgetting is measured on."""
HOST_SECONDS = 2.5
"""What an experiment on a GPU takes besides its passes: reading, tokenization, text features, attaching and writing an
adapter. What is left of the 31 seconds of an experiment on an H200 (benchmarks/NOTES.md)."""


@dataclass(frozen=True)
class Estimate:
    """What one experiment takes; None where the model's shape, or the machine that will run it, is not known."""

    peak_memory_bytes: int | None
    seconds: float | None


class Estimator:
    """Estimates the experiments of a run, which share a model and a machine.

    ``misfit`` says why the model does not fit the machine, ``note`` that its shape is not known; empty where not so.

    Args:
        source: the folder or the Hugging Face name that the model is loaded from.
        asked: the sets of questions; none where they are not asked.
        num_experiments: of the whole run. On a GPU several are trained together.
        model: its skeleton, if it has one.

    Raises:
        UserError: the tokenizer cannot be loaded, or its chat template takes too long.
    """

    def __init__(
        self, config: Config, source: str, asked: Sequence[QuestionSet], num_experiments: int, model: Any
    ) -> None:
        self._config = config
        self._num_together = config.adapters_a_pass or num_experiments
        self._tokenizer = tokenizer_for(config, source)
        check_template(self._tokenizer, config.model)
        self._machine, self._model = hardware_of(config), model
        self._shape = self._shape_with(config.target_modules)
        self._storage = LLM_INT8 if config.int8_activations else config.quantization
        self._questions = functools.reduce(QuestionTokens.beside, map(self._count_questions, asked), QuestionTokens())
        self.misfit = misfit(self._shape, self._machine, config) if self._shape else ""
        self.note = "" if self._shape else f"no estimates: the configuration of {config.model} does not say enough"

    def template_error(self, sample: Sequence[Example]) -> str:
        """Why a dataset cannot be rendered within the limits of time and memory; empty where its first examples can."""
        why = template_failure(self._tokenizer, sample)
        return why and f"the chat template {why} on its examples; fix them, or take another model"

    def _shape_with(self, names: Sequence[str]) -> Shape | None:
        return self._model and shape_of_skeleton(self._model, names)

    def of(
        self, sample: Sequence[Example], num_examples: int, num_chars: int, method: Method, stages: Sequence[Stage],
        adapted: Adapted | None = None,
    ) -> tuple[Sizes, Estimate]:  # fmt: skip
        """How large a dataset is, and what an experiment on it takes.

        Args:
            sample: its first examples.
            num_chars: characters of all its examples.
            stages: those that this experiment runs itself.
            adapted: what gets an adapter, and how much is trained; by default A and B of one rank.
        """
        sizes = sizes_of(self._tokenizer, sample, num_examples, method.max_length, num_chars)
        if self._shape is None or not sizes.num_tokens:
            return sizes, Estimate(None, None)
        work = work_of(self._config, method, sizes, self._questions, stages)
        shape = self._shape_with(method.target_modules) or self._shape
        if adapted is not None:
            others = adapted.num_parameters - shape.num_trained(method.lora_r)
            shape = replace(shape, other_trained=others, trains_head=adapted.trains_head)
        return sizes, estimate(shape, self._machine, self._storage, method, sizes, work, self._num_together)

    def of_losses(self, method: Method, num_tokens: float) -> Estimate:
        """What losses of so many tokens take, without training."""
        where = (self._machine, self._storage, method, Sizes(1, 1.0, 1), Work(num_tokens))
        return estimate(self._shape, *where) if self._shape else Estimate(None, None)

    def _count_questions(self, asked: QuestionSet) -> QuestionTokens:
        """The tokens of all questions, in the batches that the machine will take."""
        shape, machine, storage = self._shape, self._machine, self._storage
        if shape is None:
            return QuestionTokens()
        free_bytes = max(0, machine.memory_bytes - CUDA_CONTEXT_BYTES - base_bytes(shape, storage, machine))
        in_batch = self._config.token_budget or tokens_in_batch(shape, machine, storage, free_bytes)
        # A prefix needs packed rows, which LLM.int8 refused where it was measured.
        may_share = self._config.scoring != "generate" and storage != LLM_INT8
        return count_question_tokens(self._tokenizer, asked, in_batch, may_share, self._config.scoring)


@dataclass(frozen=True)
class Work:
    """What an experiment has the model do, in tokens; all 0 for a stage that it does not run."""

    feature_tokens: float = 0.0
    """Of the features' forward passes."""
    questions: QuestionTokens = field(default_factory=QuestionTokens)
    """Of all prompts of MMLU."""
    held_out_tokens: float = 0.0
    """Of the examples that the probe holds out."""
    probe_steps: int = 0
    probe_step_tokens: float = 0.0
    """Of a step of the probe."""
    train_tokens: float = 0.0
    """Of the training, all epochs."""
    train_step_tokens: float = 0.0
    """Of a step of the training."""

    @property
    def evaluated(self) -> float:
        """Tokens with a forward pass only."""
        return self.feature_tokens + self.questions.total

    @property
    def trained(self) -> float:
        """Tokens with a backward pass too."""
        return self.probe_steps * self.probe_step_tokens + self.train_tokens


def work_of(config: Config, method: Method, sizes: Sizes, questions: QuestionTokens, stages: Sequence[Stage]) -> Work:
    """What an experiment has the model do.

    Args:
        questions: of MMLU; none where it is not evaluated.
    """
    examples_a_step = method.batch_size * method.gradient_accumulation
    counts: dict[str, Any] = {}
    if "features" in stages:
        options = FeatureOptions(**config.settings_of(FeatureOptions))
        sample = min(options.sample_size or sizes.num_examples, sizes.num_examples)
        counts["feature_tokens"] = 2 * sample * sizes.mean_tokens  # whole examples, then their answers alone
        counts["held_out_tokens"] = count_held_out(sample) * sizes.mean_tokens if options.probe_steps else 0.0
        counts["probe_steps"] = options.probe_steps
        counts["probe_step_tokens"] = min(examples_a_step, sample) * sizes.mean_tokens
    if "train" in stages:
        counts["train_tokens"] = method.num_epochs * sizes.num_tokens
        counts["train_step_tokens"] = min(examples_a_step, sizes.num_examples) * sizes.mean_tokens
    if "mmlu" in stages:
        counts["questions"] = questions
    return Work(**counts)


def estimate(
    shape: Shape, machine: Hardware, storage: str, method: Method, sizes: Sizes, work: Work, num_together: int = 1
) -> Estimate:
    """What one experiment takes, without what all experiments of a worker share: loading, and the base's own MMLU.

    Args:
        storage: of the base's weights: a value of ``--quantization``, or ``LLM_INT8``.
        sizes: the size of its dataset.
        work: from ``work_of``.
        num_together: on a GPU, how many experiments like this one may be trained together.
    """
    if machine.on_gpu:
        return _estimate_on_gpu(shape, machine, storage, method, sizes, work, num_together)
    base = base_bytes(shape, storage, machine)
    tokens_a_step = method.batch_size * method.gradient_accumulation * sizes.mean_tokens
    fitting = training_that_fits(shape, machine, method, sizes, base, tokens_a_step)
    peak = base + training_bytes(shape, method, fitting.tokens, machine, fitting.checkpointing) + CPU_PROCESS_BYTES
    # onednn.py reorders copies of the weights, for forward and backward pass, unless they take too much memory.
    copies = 2 * machine.dtype_bytes * shape.layer_weights if storage == "none" else 0
    peak += copies if copies <= COPIES_MEMORY_SHARE * machine.memory_bytes else 0
    # Of a token's forward pass: a multiplication and an addition for each weight.
    operations = 2 * (shape.layer_weights + shape.used_expert_weights)
    seconds = None
    if machine.rate:
        seconds = operations * work.evaluated / (SHARE_OF_RATE["evaluate"] * machine.rate)
        # A backward pass has as many operations as a forward pass, not twice as many, as the base's weights have no
        # gradient. Gradient checkpointing runs the forward pass a second time.
        num_passes = 3 if fitting.checkpointing else 2
        seconds += num_passes * operations * work.trained / (SHARE_OF_RATE["train"] * machine.rate)
    return Estimate(peak, seconds)


def _estimate_on_gpu(
    shape: Shape, machine: Hardware, storage: str, method: Method, sizes: Sizes, work: Work, num_together: int
) -> Estimate:
    # A trial of each model says whether LLM.int8's rows, which depend on what shares their batch, may be packed. Those
    # that were measured were not: rows are reckoned padded to the longest.
    padding = sizes.longest / sizes.mean_tokens if storage == LLM_INT8 else 1.0
    base, dropout = base_bytes(shape, storage, machine), method.lora_dropout > 0
    if machine.rate is None:  # a GPU elsewhere: how many its memory holds is not known
        num_together = 1
    step_tokens = padding * max(work.train_step_tokens, work.probe_step_tokens)
    graphed = is_graphed(machine, storage)
    together = 1
    if step_tokens and shape.adapter_rows and num_together > 1:
        free_bytes = max(1, machine.memory_bytes - CUDA_CONTEXT_BYTES - base)
        most = training_that_fits(shape, machine, method, sizes, base, GPU_TOKEN_BUDGET).tokens
        together = adapters_that_fit(
            step_tokens, largest_size(most) if graphed else most, adapter_bytes(shape, method), free_bytes
        )
        together = min(num_together, together)
    tokens = fixed_size(math.ceil(together * step_tokens)) if graphed else together * step_tokens
    fitting = training_that_fits(shape, machine, method, sizes, base, tokens)

    peaks = [question_bytes(shape, machine, work.questions)]
    if work.feature_tokens:
        peaks.append(forward_bytes(shape, GPU_FEATURE_TOKENS, machine) + LOGIT_BYTES * GPU_LOGITS)
    if work.probe_steps:  # the gradient of the held-out loss, for the flatness
        held_out = math.ceil(min(work.held_out_tokens, GPU_FEATURE_TOKENS, fitting.tokens))
        peaks.append(training_bytes(shape, method, held_out, machine, checkpointing=False))
    if step_tokens:
        others = (together - 1) * adapter_bytes(shape, method)
        peaks.append(others + training_bytes(shape, method, fitting.tokens, machine, fitting.checkpointing))
    peak = base + max(peaks)
    if machine.rate is None or machine.bandwidth is None:
        return Estimate(peak, None)

    run = functools.partial(run_seconds, shape, machine, storage)
    train = functools.partial(
        run, tokens_a_pass=fitting.tokens, backward=True, dropout=dropout, graphed=graphed, again=fitting.checkpointing
    )
    of_step = OPTIMIZER_BYTES * shape.num_trained(method.lora_r) / machine.bandwidth
    of_step += 0 if graphed else STEP_SECONDS

    seconds = HOST_SECONDS + question_seconds(shape, machine, storage, work.questions)
    seconds += run(work.feature_tokens, GPU_FEATURE_TOKENS, backward=False)
    if work.probe_steps:
        # Its micro-batches are groups of one pass, as many as a pass may have.
        num_passes = math.ceil(method.gradient_accumulation / MOST_GROUPS)
        a_step = num_passes * train(padding * work.probe_step_tokens / num_passes) + of_step
        seconds += work.probe_steps * a_step
        # The held-out losses after the probe with their gradient, those a step further, and what was forgotten.
        seconds += run(work.held_out_tokens, GPU_FEATURE_TOKENS, backward=True)
        seconds += run(work.held_out_tokens, GPU_FEATURE_TOKENS, backward=False)
        seconds += run(GENERAL_TOKENS, GPU_FEATURE_TOKENS, backward=False)
    if work.train_tokens:
        a_step = train(together * padding * work.train_step_tokens) / together + of_step
        seconds += work.train_tokens / work.train_step_tokens * a_step
    return Estimate(peak, seconds)


def training_that_fits(
    shape: Shape, machine: Hardware, method: Method, sizes: Sizes, base: int, num_tokens: float
) -> Attempt:
    """The minibatch that a training ends up with once it has learnt what memory holds; the smallest one if none fits.

    Args:
        base: bytes of the base.
        num_tokens: tokens that a minibatch has where nothing limits it.
    """
    free_bytes = machine.memory_bytes - (CUDA_CONTEXT_BYTES if machine.on_gpu else 0)
    share = MINIBATCH_MEMORY_SHARE if machine.on_gpu else 1.0
    budget = CPU_TOKEN_BUDGET
    if machine.on_gpu:
        fixed = base + training_bytes(shape, method, 0, machine, False) + LOGIT_BYTES * GPU_LOGITS
        a_token = activation_bytes(shape, method, machine, False)
        learnt = tokens_that_fit(a_token, max(0, free_bytes - fixed), captured=True)
        budget = max(learnt, ENOUGH_TOKENS)  # and not less before gradient checkpointing is tried
    attempt = Attempt(max(sizes.longest, math.ceil(min(budget, num_tokens))))
    while base + training_bytes(shape, method, attempt.tokens, machine, attempt.checkpointing) / share > free_bytes:
        smaller = next_attempt(attempt, attempt.tokens, attempt.tokens <= sizes.longest, may_checkpoint=True)
        if smaller is None:
            break
        attempt = smaller._replace(tokens=max(sizes.longest, smaller.tokens))
    return attempt


@dataclass(frozen=True)
class Sizes:
    """How many examples a dataset has, and how many tokens these have, estimated from a sample."""

    num_examples: int
    mean_tokens: float
    longest: int
    """Tokens of the longest example of the sample; the mean, if that is larger."""
    in_template: TemplateCounts = field(default_factory=TemplateCounts)
    """What the chat template does to the sample."""

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

    Those that the chat template refuses are no part of it; where it refuses all there are no tokens.
    """
    counts = TemplateCounts()
    lengths = [len(e) for e in encode_each(tokenizer, sample, max_length, counts)]
    if not lengths:
        return Sizes(num_examples, 0.0, 0, counts)
    sample = [example for number, example in enumerate(sample) if number not in counts.refused]
    mean, longest = sum(lengths) / max(1, len(lengths)), max(lengths, default=0)
    num_sample_chars = sum(map(count_chars, sample))
    if num_chars and num_sample_chars:
        # The chat template's own tokens, those of an empty example, do not grow with the number of characters.
        empty = [Example((Message("user", ""),), "", "")]
        num_template = min(mean, len(next(encode_each(tokenizer, empty, max_length, TemplateCounts()), ())))
        growth = (num_chars / num_examples) / (num_sample_chars / len(lengths))
        mean = min(float(max_length), num_template + (mean - num_template) * growth)
        longest = max(longest, math.ceil(mean))
    return Sizes(num_examples, mean, longest, counts)


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
    gpus = config.gpus_per_worker
    where = (
        "a worker here"
        if not machine.on_gpu
        else "this GPU"
        if gpus == 1
        else f"a group of {gpus:g} GPUs"
        if gpus > 1
        else f"a share of {gpus:g} of this GPU"
    )
    fix = (
        f"--quantization {smaller[0]} would fit"
        if smaller and smaller[0] != config.quantization
        else "--gpus-per-worker can spread it over more GPUs, --max-memory can put a part of it on the CPU"
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
    """Check that the model fits the GPUs that this process has.

    Raises:
        DoesNotFitError: it does not.
    """
    shape = shape_of(resolve_model(config.model), config.target_modules, config.trust_remote_code)
    if shape:
        free = free_bytes_of(config.gpus_per_worker)
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
