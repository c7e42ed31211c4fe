"""What one forward pass of the base tells of each example: losses, mean states, activations.

    template    question            template   answer              end
    . . . . .   q q q q q q q q q   . . . . .  a a a a a a a a a   .
                '- states: question -'         '- states, losses -'

The template's own tokens are the same for every dataset: they are read, and not measured. The output head runs where a
loss is wanted and nowhere else.
"""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
import torch
import torch.nn.functional as F

from raylora.data.encoding import IGNORE_INDEX, EncodedExample, TrainOn, encode_with_offsets, labels_of
from raylora.features.words import words_of
from raylora.model.adapters import LoadedModel
from raylora.model.forward import Output, forward_rows, inference
from raylora.model.memory import TokenBudget
from raylora.records import Example, ProgressCallback, ProgressStage
from raylora.training.losses import ExampleLoss

_SENTENCE_END = regex.compile(r"[.!?…]+[\p{Pe}\p{Pf}\"']*(?=\s)|[。！？।॥؟۔]|\n+")
"""A full stop within a number or an address ends no sentence; those of other scripts need no space behind them. The
space is the next sentence's: most tokenizers join it to the word that follows."""
SPARSE_ACTIVATION_BELOW = 0.1
"""An activation counts as sparse below this share of its token's root mean square."""
DOWN_PROJECTIONS = ("down_proj", "fc2", "dense_4h_to_h", "fc_out", "mlp.c_proj")
"""What the last matrix of an MLP is called in the families of models that transformers knows."""


@dataclass(frozen=True)
class Item:
    """One example of the sample, encoded. ``sentences`` are slices of the answer's tokens."""

    example: Example
    encoded: EncodedExample
    sentences: list[tuple[int, int]]


@dataclass(frozen=True)
class Measured:
    """What the forward pass told of one example.

    ``embedding`` has unit length, shape (H,); losses are in nats a token, ``labels`` those where training would look.
    """

    embedding: np.ndarray
    similarity: float | None
    consistency: float | None
    loss: float
    answer_loss: float
    labels: ExampleLoss
    activation_sparsity: float | None

    @property
    def is_finite(self) -> bool:
        """Whether the model had numbers for it: half-precision models overflow on some texts."""
        return bool(np.isfinite([self.loss, self.answer_loss, *self.embedding]).all())


def make_item(tokenizer: Any, example: Example, max_length: int) -> Item:
    encoded, answer, offsets = encode_with_offsets(tokenizer, example, max_length)
    return Item(example, encoded, sentence_slices(answer, offsets))


def sentence_slices(answer: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Token slices of the sentences of two words or more, as far as the tokens go.

    Args:
        offsets: characters of ``answer`` that each of its tokens stands for, from left to right.
    """
    starts, ends = [a for a, _ in offsets], [b for _, b in offsets]
    slices, start = [], 0
    for end in itertools.chain((m.end() for m in _SENTENCE_END.finditer(answer)), [len(answer)]):
        if not ends or start >= ends[-1]:
            break
        tokens = bisect_right(ends, start), bisect_left(starts, end)
        if tokens[1] > tokens[0] and len(words_of(answer[start:end])) > 1:
            slices.append(tokens)
        start = end
    return slices


class _Activations:
    """Counts, while the model runs, how much of what enters each MLP's last matrix is near zero."""

    def __init__(self, model: Any) -> None:
        self._model, self._num_tokens = model, 0
        self._modules = [
            module
            for name, module in model.named_modules()
            if name.endswith(DOWN_PROJECTIONS) and hasattr(module, "weight")
        ]
        self._shares: list[torch.Tensor] = []

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        hooks = [module.register_forward_pre_hook(self._count) for module in self._modules]
        hooks.append(self._model.register_forward_pre_hook(self._begin, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._num_tokens, self._shares = kwargs["input_ids"].numel(), []

    def _count(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        size = args[0].float().abs()  # (B, T, I), in some models (B * T, I)
        rms = size.square().mean(-1, keepdim=True).sqrt()
        share = (size < SPARSE_ACTIVATION_BELOW * rms).float().mean(-1)
        if share.numel() == self._num_tokens:  # an expert sees some of the tokens only
            self._shares.append(share.flatten())

    def shares(self, places: torch.Tensor) -> torch.Tensor | None:
        """Mean over the layers at ``places`` (K,) of the minibatch that ran last; None where no MLP is known here."""
        if not self._shares:
            return None
        mean = torch.stack([s.to(self._shares[0].device) for s in self._shares]).mean(0)
        return mean[places.to(mean.device)]


def measure_all(
    loaded: LoadedModel, items: Sequence[Item], train_on: TrainOn, token_budget: int, progress: ProgressCallback
) -> list[Measured]:
    """What the model says of each item, in their order."""
    rows = [item.encoded.input_ids for item in items]
    labels = [_labels(item.encoded, train_on) for item in items]
    content = [_content(item.encoded) for item in items]
    activations = _Activations(loaded.model)

    def use(part: list[int], output: Output) -> list[Measured]:
        assert output.states is not None
        assert output.places is not None
        losses, states = output.losses.split(output.num_losses), output.states.split(output.num_states)
        shares = activations.shares(output.places)
        sparsities = shares.split(output.num_states) if shares is not None else [None] * len(part)
        return [_measure(items[i], train_on, *own) for i, *own in zip(part, losses, states, sparsities, strict=True)]

    results: dict[int, Measured] = {}
    with inference(loaded.model), activations.counted():
        for part, measured in forward_rows(loaded, rows, labels, TokenBudget(token_budget), use, content):
            results.update(zip(part, measured, strict=True))
            progress(ProgressStage.FEATURES, len(results), len(items))
    return [results[i] for i in range(len(items))]


def answers_alone(loaded: LoadedModel, items: Sequence[Item], token_budget: int) -> list[float]:
    """Mean token loss of each answer with nothing before it but the token that begins a text."""
    tokenizer = loaded.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    answers = [list(itertools.compress(i.encoded.input_ids, i.encoded.is_answer_text)) for i in items]
    rows, labels = [[start, *answer] for answer in answers], [[IGNORE_INDEX, *answer] for answer in answers]

    def use(part: list[int], output: Output) -> list[float]:
        return [float(losses.double().mean()) for losses in output.losses.split(output.num_losses)]

    results: dict[int, float] = {}
    with inference(loaded.model):
        for part, means in forward_rows(loaded, rows, labels, TokenBudget(token_budget), use):
            results.update(zip(part, means, strict=True))
    return [results[i] for i in range(len(items))]


def _content(encoded: EncodedExample) -> list[bool]:
    return [q or a for q, a in zip(encoded.is_question, encoded.is_answer_text, strict=True)]


def _labels(encoded: EncodedExample, train_on: TrainOn) -> list[int]:
    """The tokens whose loss is wanted: those of the content, and those where training would look."""
    supervised, content = labels_of(encoded, train_on), _content(encoded)
    labels = [t if c else label for t, c, label in zip(encoded.input_ids, content, supervised, strict=True)]
    return [IGNORE_INDEX, *labels[1:]]


def _measure(
    item: Item, train_on: TrainOn, losses: torch.Tensor, states: torch.Tensor, sparsities: torch.Tensor | None
) -> Measured:
    """Of the losses (N,) of its labels, and the states (K, H) and sparsities (K,) of its content."""
    encoded, content = item.encoded, _content(item.encoded)
    wanted = [label != IGNORE_INDEX for label in _labels(encoded, train_on)]
    supervised = [label != IGNORE_INDEX for label in labels_of(encoded, train_on)]
    answer_loss = float(losses[_among(wanted, encoded.is_answer_text)].double().mean())
    label_losses = losses[_among(wanted, supervised)].double()
    answer_states = states[_among(content, encoded.is_answer_text)]
    similarity = None
    if any(encoded.is_question):
        question_states = states[_among(content, encoded.is_question)]
        similarity = float(F.cosine_similarity(question_states.mean(0), answer_states.mean(0), dim=0))
    return Measured(
        F.normalize(states.mean(0), dim=0).cpu().numpy(),
        similarity,
        _consistency(answer_states, item.sentences),
        float(losses[_among(wanted, content)].double().mean()),
        answer_loss,
        ExampleLoss(float(label_losses.sum()), len(label_losses), answer_loss),
        float(sparsities.double().mean()) if sparsities is not None else None,
    )


def _among(chosen: Sequence[bool], flags: Sequence[bool]) -> torch.Tensor:
    """Mask of the ``flags`` of those positions that were chosen."""
    return torch.tensor(list(itertools.compress(flags, chosen)), dtype=torch.bool)


def _consistency(states: torch.Tensor, sentences: Sequence[tuple[int, int]]) -> float | None:
    """Mean pairwise cosine of the sentences' mean states, those that truncation left."""
    means = [states[a:b].mean(0) for a, b in sentences if a < len(states)]
    if len(means) < 2:
        return None
    return mean_pairwise_cosine(F.normalize(torch.stack(means), dim=1).cpu().numpy())


def mean_pairwise_cosine(unit: np.ndarray) -> float:
    """Of n unit vectors (n, H), in closed form: the squared length of their sum is n plus all the cosines."""
    n = len(unit)
    total = unit.astype(np.float64).sum(0)
    return float((total @ total - n) / (n * (n - 1)))
