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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
import torch
import torch.nn.functional as F

from raylora.data.encoding import IGNORE_INDEX, EncodedExample, TrainOn, encode_with_offsets, labels_of, pad_token_of
from raylora.data.minibatch import batches_by_budget, pad_left
from raylora.features.words import words_of
from raylora.model.forward import at_output_head, head_is_plain, head_losses
from raylora.model.memory import is_out_of_memory
from raylora.model.onednn import onednn_linears
from raylora.records import Example, ProgressCallback, ProgressStage
from raylora.training.losses import ExampleLoss
from raylora.work_counts import work_counts

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
        self._shape = (0, 0)
        self._modules = [
            module
            for name, module in model.named_modules()
            if name.endswith(DOWN_PROJECTIONS) and hasattr(module, "weight")
        ]
        self._shares: list[torch.Tensor] = []

    @contextlib.contextmanager
    def counted(self, shape: tuple[int, int]) -> Iterator[None]:
        """Inside, the model runs on a minibatch of ``shape`` (B, T)."""
        self._shape = shape
        self._shares = []
        hooks = [module.register_forward_pre_hook(self._count) for module in self._modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        size = args[0].float().abs()  # (B, T, I), in some models (B * T, I)
        rms = size.square().mean(-1, keepdim=True).sqrt()
        share = (size < SPARSE_ACTIVATION_BELOW * rms).float().mean(-1)
        if share.numel() == self._shape[0] * self._shape[1]:  # an expert sees some of the tokens only
            self._shares.append(share.reshape(self._shape))

    def shares(self) -> torch.Tensor | None:
        """Mean over the layers, (B, T); None for a model whose MLPs are not known here."""
        return torch.stack([s.to(self._shares[0].device) for s in self._shares]).mean(0) if self._shares else None


def measure_all(
    model: Any, tokenizer: Any, items: Sequence[Item], train_on: TrainOn, token_budget: int, progress: ProgressCallback
) -> list[Measured]:
    """What the model says of each item, in their order."""
    results: dict[int, Measured] = {}
    activations, plain = _Activations(model), head_is_plain(model)

    def run(indices: list[int]) -> None:
        encoded = [items[i].encoded for i in indices]
        rows = [e.input_ids for e in encoded]
        labels = [labels_of(e, train_on) for e in encoded]
        wanted = [
            [label != IGNORE_INDEX or q or a for label, q, a in zip(row, e.is_question, e.is_answer_text, strict=True)]
            for row, e in zip(labels, encoded, strict=True)
        ]
        with activations.counted((len(rows), max(map(len, rows)))):
            states, losses = _states_and_losses(model, plain, pad_token_of(tokenizer), rows, wanted)
        shares = activations.shares()
        for row, i in enumerate(indices):
            own = slice(-len(rows[row]), None)
            sparsity = shares[row, own] if shares is not None else None
            results[i] = _measure(items[i], labels[row], states[row, own], losses[row, own], sparsity)
        progress(ProgressStage.FEATURES, len(results), len(items))

    in_batches(model, [len(item.encoded) for item in items], token_budget, run)
    return [results[i] for i in range(len(items))]


def answers_alone(model: Any, tokenizer: Any, items: Sequence[Item], token_budget: int) -> list[float]:
    """Mean token loss of each answer with nothing before it but the token that begins a text."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = [
        [start, *(t for t, mine in zip(i.encoded.input_ids, i.encoded.is_answer_text, strict=True) if mine)]
        for i in items
    ]
    results: dict[int, float] = {}
    plain = head_is_plain(model)

    def run(indices: list[int]) -> None:
        part = [rows[i] for i in indices]
        wanted = [[False] + [True] * (len(row) - 1) for row in part]
        _, losses = _states_and_losses(model, plain, pad_token_of(tokenizer), part, wanted)
        for row, i in enumerate(indices):
            results[i] = float(losses[row, 1 - len(rows[i]) :].double().mean())

    in_batches(model, [len(row) for row in rows], token_budget, run)
    return [results[i] for i in range(len(items))]


def _states_and_losses(
    model: Any, plain: bool, pad: int, rows: Sequence[Sequence[int]], wanted: Sequence[Sequence[bool]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states (B, T, H), and the loss of each wanted token given all before it, (B, T), 0 elsewhere.

    Args:
        plain: what ``head_is_plain`` says of the model.
    """
    batch = pad_left(rows, pad, model.device)
    width = batch.input_ids.shape[1]
    mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    for i, flags in enumerate(wanted):
        mask[i, width - len(flags) :] = torch.tensor(flags)
        mask[i, width - len(flags)] = False  # nothing stands before a first token
    mask = mask.to(model.device)
    before = mask.roll(-1, dims=1)  # where the head must look to predict a wanted token
    seen: list[torch.Tensor] = []

    def select(states: torch.Tensor) -> torch.Tensor:
        seen.append(states)
        return states[:1, :1] if plain else states[before.to(states.device)][None]

    with at_output_head(model, select) as selected:
        output = model(**batch.model_inputs(), use_cache=False, output_hidden_states=not selected)
    states = seen[0] if selected else output.hidden_states[-1]
    losses = torch.zeros(batch.input_ids.shape, device=states.device)
    if mask.any():
        targets, mask = batch.input_ids[mask], mask.to(states.device)
        if plain:
            losses[mask] = head_losses(model, states[before.to(states.device)], targets)
        else:
            logits = output.logits[0] if selected else output.logits[before.to(output.logits.device)]
            of_targets = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
            losses[mask] = of_targets.to(losses.device)
    return states.float(), losses


def _measure(
    item: Item, labels: list[int], states: torch.Tensor, losses: torch.Tensor, sparsity: torch.Tensor | None
) -> Measured:
    device = states.device
    question = torch.tensor(item.encoded.is_question, device=device)
    answer = torch.tensor(item.encoded.is_answer_text, device=device)
    supervised = torch.tensor(labels, device=device) != IGNORE_INDEX
    content = question | answer
    predicted = torch.arange(len(losses), device=device) > 0  # nothing stands before the first token
    answer_states = states[answer]
    answer_loss = float(losses[answer & predicted].double().mean())
    similarity = None
    if question.any():
        similarity = float(F.cosine_similarity(states[question].mean(0), answer_states.mean(0), dim=0))
    return Measured(
        F.normalize(states[content].mean(0), dim=0).cpu().numpy(),
        similarity,
        _consistency(answer_states, item.sentences),
        float(losses[content & predicted].double().mean()),
        answer_loss,
        ExampleLoss(float(losses[supervised].double().sum()), int(supervised.sum()), answer_loss),
        float(sparsity[content].double().mean()) if sparsity is not None else None,
    )


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


def in_batches(model: Any, lengths: Sequence[int], token_budget: int, run: Callable[[list[int]], None]) -> None:
    """``run`` on indices, longest first, in evaluation mode; half the budget when memory runs out."""
    was_training = model.training
    model.eval()
    left = list(range(len(lengths)))
    try:
        with torch.inference_mode(), onednn_linears(model, token_budget):
            while left:
                left, token_budget = _run_until_full(lengths, left, token_budget, run)
    finally:
        model.train(was_training)


def _run_until_full(
    lengths: Sequence[int], left: list[int], token_budget: int, run: Callable[[list[int]], None]
) -> tuple[list[int], int]:
    """Run batches of ``left``; what is left when memory ran out, and the budget to go on with."""
    batches: Iterator[list[int]] = batches_by_budget(left, lambda i: lengths[i], token_budget)
    done: set[int] = set()
    for batch in batches:
        try:
            run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
            work_counts.oom_backoffs += 1
            return [i for i in left if i not in done], len(batch) * max(lengths[i] for i in batch) // 2
        done |= set(batch)
    return [], token_budget
