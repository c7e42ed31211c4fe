"""The probe under the research code's class and method names, for a model, optimizer and batches of one's own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from raylora.config.method import Method
from raylora.data.datasets import sample_examples
from raylora.data.encoding import IGNORE_INDEX, encode_example
from raylora.data.template_check import held_to_template
from raylora.errors import UserError
from raylora.features.observer import ProbeObserver
from raylora.features.probe import run_probe
from raylora.features.static import OfLoadedModel, as_dataset, has_answer, join_notes, split_sample
from raylora.model.loading import borrowed
from raylora.records import Dataset, Example
from raylora.training.gradients import StepGradient, separate_gradients
from raylora.training.losses import example_losses
from raylora.training.optimizer_step import LaunchedStep, take_step

T = TypeVar("T")


@dataclass(frozen=True)
class HyperParams:
    """The hyperparameters of a probe that the research code has; all others have raylora's defaults."""

    learning_rate: float = 2e-4
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.1

    def method(self, batch_size: int) -> Method:
        return Method(**vars(self), batch_size=batch_size)


class DynamicProbeAnalyzer(OfLoadedModel):
    """Dynamic features: those of a dataset, and those of any training's steps."""

    def extract_all_dynamic_features(
        self,
        dataset: Dataset | Sequence[Example] | Sequence[Mapping[str, Any]],
        hyperparams: HyperParams,
        probe_steps: int = 100,
        sample_size: int = 50,
        batch_size: int = 8,
        token_budget: int = 512,
    ) -> dict[str, Any]:
        """Run a probe on a sample of a dataset.

        Args:
            dataset: what ``read_dataset`` returned, Examples, or dicts in any of the known formats.
            sample_size: examples to draw, for training and held out together (0: all).
            batch_size: examples in a micro-batch; four of them make an optimizer step.
            token_budget: most tokens in a minibatch that is measured.

        Returns:
            Each feature by column name, None where it could not be measured, and ``feature_notes``, which says why.

        Raises:
            UserError: there is no valid example, or none that the chat template takes with its answer.
        """
        read = held_to_template(self.tokenizer, as_dataset(dataset))
        method = hyperparams.method(batch_size)
        sample = sample_examples(read.examples, sample_size, read.seed)
        encoded = [encode_example(self.tokenizer, example, method.max_length) for example in sample]
        split = split_sample(sample)
        held_out = [encoded[i] for i in split.held_out if has_answer(encoded[i])]
        training = [encoded[i] for i in split.training]
        with borrowed(self.model, self.tokenizer) as loaded:
            before = example_losses(loaded, held_out, method.train_on, token_budget)
            seed = read.seed % 2**62
            result = run_probe(
                loaded, held_out, before, training, method, probe_steps, seed, token_budget, sample_size=sample_size
            )
        return {**result.values, "feature_notes": join_notes(result.notes)}

    def run_streaming_training(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        train_batches: Iterable[Mapping[str, torch.Tensor]],
        probe_steps: int,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float = 0.3,
    ) -> dict[str, Any]:
        """Run optimizer steps on the caller's batches and measure them; gradients are not kept.

        Args:
            model: a model whose trainable parameters are those of ``optimizer``.
            train_batches: keyword arguments of the model's forward pass, with ``input_ids`` and ``labels``. A list or
                a DataLoader is repeated; an iterator is used once, and the steps end where it does.
            gradient_accumulation_steps: batches of one optimizer step.
            max_grad_norm: gradients are clipped to this L2 norm.

        Returns:
            ``losses`` and ``grad_norms`` (lists, a number a step, norms before clipping), ``avg_grad_norm``,
            ``gradient_consistency``, ``avg_grad_sparsity``, ``loss_stability`` (None where it cannot be measured).

        Raises:
            UserError: there is no batch.
            TrainingDivergedError: the loss became infinite or NaN.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        observer = ProbeObserver(parameters)
        batches = _over_and_over(train_batches)

        def backward(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
            on_device = {key: value.to(model.device) for key, value in batch.items()}
            loss = model(**on_device).loss / gradient_accumulation_steps
            loss.backward()
            return loss.detach()

        def gradient(part: Sequence[Mapping[str, torch.Tensor]]) -> StepGradient:
            loss = separate_gradients(parameters, [functools.partial(backward, b) for b in part], observer)
            num_tokens = sum(b["input_ids"].numel() for b in part)
            return StepGradient(loss, num_tokens, sum(int((b["labels"] != IGNORE_INDEX).sum()) for b in part))

        was_training = model.training
        launched: LaunchedStep | None = None
        model.train()
        try:
            for k in range(probe_steps):
                if not (part := list(itertools.islice(batches, gradient_accumulation_steps))):
                    break
                following = take_step(k, parameters, optimizer, gradient(part), max_grad_norm, observer=observer)
                if launched:
                    launched.read()
                launched = following
            if launched:
                launched.read()
        finally:
            model.train(was_training)
        return {"losses": observer.losses, "grad_norms": observer.grad_norms, **observer.features()}


def _over_and_over(batches: Iterable[T]) -> Iterator[T]:
    """The batches, repeated for as long as they can be iterated over again.

    Raises:
        UserError: there is no batch.
    """
    for turn in itertools.count():
        is_empty = True
        for batch in batches:
            is_empty = False
            yield batch
        if is_empty and turn == 0:
            raise UserError("there is no batch to train on")
        if is_empty:  # an iterator that has come to its end: it cannot be repeated
            return
