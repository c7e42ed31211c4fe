"""Measures each example in one forward pass of the base: losses, mean hidden states, activation sparsity.

    template    question            template   answer              end
    . . . . .   q q q q q q q q q   . . . . .  a a a a a a a a a   .
                '-- states, losses -'          '- states, losses -'

The chat template's own tokens are the same in every dataset: the model reads them, but they are not measured. The
output head is applied only where a loss is wanted.
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
from raylora.data.minibatch import send
from raylora.features.words import first_words
from raylora.model.adapters import LoadedModel
from raylora.model.fetching import Fetched, one_late
from raylora.model.forward import Output, forward_rows, inference
from raylora.model.kernels import near_zero_share
from raylora.model.memory import TokenBudget
from raylora.model.packing import may_pack
from raylora.records import Example, ProgressCallback, ProgressStage
from raylora.training.losses import ExampleLoss

_SENTENCE_END = regex.compile(r"[.!?…]+[\p{Pe}\p{Pf}\"']*(?=\s)|[。！？।॥؟۔]|\n+")
"""The end of a sentence. A Latin full stop needs a space after it, as it may be part of a number or an address; other
scripts' do not. The space belongs to the next sentence: most tokenizers join it to the word that follows."""
SPARSE_ACTIVATION_BELOW = 0.1
"""An activation counts as sparse if its absolute value is below this share of its token's root mean square."""
DOWN_PROJECTIONS = ("down_proj", "fc2", "dense_4h_to_h", "fc_out", "mlp.c_proj")
"""How the names of an MLP's last matrix end in the model families of transformers."""


@dataclass(frozen=True)
class Item:
    """One example of the sample, encoded."""

    example: Example
    encoded: EncodedExample
    sentences: list[tuple[int, int]]
    """The answer's sentences: start and end among the tokens of its text."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one example. Losses are means in nats per token."""

    embedding: np.ndarray
    """(H,), of unit length: the direction of the mean last hidden state of question and answer."""
    similarity: float | None
    """Cosine of the question's and the answer's mean states; None without a question."""
    consistency: float | None
    """Mean pairwise cosine of the mean states of the answer's sentences; None for fewer than two."""
    loss: float
    """Over question and answer."""
    answer_loss: float
    labels: ExampleLoss
    """The losses of the tokens that training would supervise."""
    activation_sparsity: float | None
    """Share of the MLPs' activations that are near zero; None where the model's MLPs have other names."""

    @property
    def is_finite(self) -> bool:
        """Whether all these are finite numbers: half-precision models overflow on some texts."""
        return bool(np.isfinite([self.loss, self.answer_loss, *self.embedding]).all())


def make_item(tokenizer: Any, example: Example, max_length: int) -> Item:
    """Encode an example, cut to ``max_length`` tokens, and find the sentences of its answer."""
    encoded, answer, offsets = encode_with_offsets(tokenizer, example, max_length)
    return Item(example, encoded, sentence_slices(answer, offsets))


def sentence_slices(answer: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Start and end, in tokens, of each sentence of two words or more, up to where the answer was truncated.

    Args:
        offsets: for each token of ``answer``, the start and end of its characters, from left to right.
    """
    starts, ends = [a for a, _ in offsets], [b for _, b in offsets]
    slices, start = [], 0
    for end in itertools.chain((m.end() for m in _SENTENCE_END.finditer(answer)), [len(answer)]):
        if not ends or start >= ends[-1]:
            break
        first_token, end_token = bisect_right(ends, start), bisect_left(starts, end)
        if end_token > first_token and len(first_words(answer[start:end])) > 1:
            slices.append((first_token, end_token))
        start = end
    return slices


class _Activations:
    """Hooks that count, in each forward pass, which share of the inputs of each MLP's last matrix is near zero."""

    def __init__(self, model: Any) -> None:
        self._model, self._num_tokens = model, 0
        self._modules = [
            module
            for name, module in model.named_modules()
            if name.endswith(DOWN_PROJECTIONS) and hasattr(module, "weight")
        ]
        self._shares: list[torch.Tensor] = []  # of each layer, (B * T,), in the forward pass that ran last

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, the hooks are installed."""
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
        activations = args[0].reshape(-1, args[0].shape[-1])  # from (B, T, I), in some models (B * T, I)
        # In a mixture of experts a module gets some of the tokens only: it is not known which, so it is left out.
        if len(activations) == self._num_tokens:
            self._shares.append(near_zero_share(activations, SPARSE_ACTIVATION_BELOW))

    def shares(self, places: torch.Tensor) -> torch.Tensor | None:
        """Mean share of the layers at tokens ``places`` (K,) of the last forward pass; None where none was counted."""
        if not self._shares:
            return None
        mean = torch.stack([s.to(self._shares[0].device) for s in self._shares]).mean(0)
        return mean[places.to(mean.device)]


def measure_all(
    loaded: LoadedModel, items: Sequence[Item], train_on: TrainOn, token_budget: int, progress: ProgressCallback
) -> list[Measured]:
    """Measure each item, in their order.

    Args:
        token_budget: most tokens in a minibatch, padding included; where memory runs out, smaller ones are tried.
        progress: called with the number of items that are measured after each minibatch.

    Raises:
        torch.OutOfMemoryError: a single example does not fit (MemoryError or RuntimeError on a CPU).
    """
    rows = [item.encoded.input_ids for item in items]
    labels = [_labels(item.encoded, train_on) for item in items]
    content = [_content(item.encoded) for item in items]
    activations = _Activations(loaded.model)

    def use(part: list[int], output: Output) -> list[Fetched]:
        assert output.states is not None
        assert output.places is not None
        groups = [_groups(items[i], content[i]) for i in part]
        directions = mean_directions(output.states, output.num_states, groups)
        fetched = [Fetched(output.losses, output.num_losses), Fetched(directions, list(map(len, groups)))]
        shares = activations.shares(output.places)
        return fetched if shares is None else [*fetched, Fetched(shares, output.num_states)]

    results: dict[int, Measured] = {}
    packed = may_pack(loaded, max(map(len, rows), default=0))
    with inference(loaded.model), activations.counted():
        passes = forward_rows(loaded, rows, labels, TokenBudget(token_budget), use, content, packed=packed)
        for part, fetched in one_late(passes):
            for i, *of_row in zip(part, *(f.rows() for f in fetched), strict=True):
                results[i] = _measure(items[i], train_on, labels[i], content[i], *of_row)
            progress(ProgressStage.FEATURES, len(results), len(items))
    return [results[i] for i in range(len(items))]


def start_token(tokenizer: Any) -> int | None:
    """The token that a text begins with; None where a tokenizer has neither of the two."""
    # Some tokenizers have no begin-of-text token; their models were trained on texts separated by the end token.
    start: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if start is None else start


def answers_alone(loaded: LoadedModel, items: Sequence[Item], token_budget: int) -> Sequence[float | None]:
    """Mean token loss, in nats, of each answer without its question: only the begin-of-text token precedes it.

    Without such a token, each is None.
    """
    start = start_token(loaded.tokenizer)
    if start is None:
        return [None] * len(items)
    answers = [list(itertools.compress(i.encoded.input_ids, i.encoded.is_answer_text)) for i in items]
    rows, labels = [[start, *answer] for answer in answers], [[IGNORE_INDEX, *answer] for answer in answers]

    def use(part: list[int], output: Output) -> Fetched:
        return Fetched(output.losses, output.num_losses)

    results: dict[int, float] = {}
    packed = may_pack(loaded, max(map(len, rows), default=0))
    with inference(loaded.model):
        for part, fetched in one_late(
            forward_rows(loaded, rows, labels, TokenBudget(token_budget), use, packed=packed)
        ):
            results.update((i, float(losses.double().mean())) for i, losses in zip(part, fetched.rows(), strict=True))
    return [results[i] for i in range(len(items))]


def _content(encoded: EncodedExample) -> list[bool]:
    """For each token, whether it is the question's or the answer's text, and so is measured."""
    return [q or a for q, a in zip(encoded.is_question, encoded.is_answer_text, strict=True)]


def _labels(encoded: EncodedExample, train_on: TrainOn) -> list[int]:
    """Labels of the tokens whose loss is wanted: those of the content, and those that training would supervise."""
    supervised, content = labels_of(encoded, train_on), _content(encoded)
    labels = [t if c else label for t, c, label in zip(encoded.input_ids, content, supervised, strict=True)]
    return [IGNORE_INDEX, *labels[1:]]  # nothing comes before the first token to predict it


def _groups(item: Item, content: Sequence[bool]) -> list[np.ndarray]:
    """Groups of an item's content tokens, as their indices: all; the question's; the answer's; each sentence's."""
    is_question, is_answer = (
        np.array(list(itertools.compress(flags, content)), dtype=bool)
        for flags in (item.encoded.is_question, item.encoded.is_answer_text)
    )
    answer = is_answer.nonzero()[0]
    return [np.arange(len(is_answer)), is_question.nonzero()[0], answer, *(answer[a:b] for a, b in item.sentences)]


def mean_directions(
    states: torch.Tensor, num_states: Sequence[int], groups: Sequence[Sequence[np.ndarray]]
) -> torch.Tensor:
    """The mean state of each group of tokens, scaled to unit length: (G, H), one example's groups after another's.

    The states are read where they lie: 12,000 of 4,096 float32 are 200 MB, and no group needs a copy of its own.

    Args:
        states: (K, H), those of one example after another's.
        num_states: how many each example has; K in all.
        groups: of each example, the indices among its own states; 0 everywhere is the mean of an empty one.
    """
    starts = itertools.accumulate(num_states, initial=0)
    flat = [start + group for start, of_example in zip(starts, groups, strict=False) for group in of_example]
    indices = send(torch.from_numpy(np.concatenate(flat)), states.device)
    offsets = send(torch.tensor([0, *itertools.accumulate(map(len, flat))][:-1]), states.device)
    return F.normalize(F.embedding_bag(indices, states, offsets, mode="mean"), dim=1)


def _measure(
    item: Item,
    train_on: TrainOn,
    labels: Sequence[int],
    content: Sequence[bool],
    losses: torch.Tensor,
    directions: torch.Tensor,
    sparsities: torch.Tensor | None = None,
) -> Measured:
    """An item's measures, from the losses (N,) of its labels, the directions (G, H) of the mean states of its
    ``_groups``, and the activation sparsities (K,) of its content, all on the CPU."""
    encoded = item.encoded
    wanted = [label != IGNORE_INDEX for label in labels]
    supervised = [label != IGNORE_INDEX for label in labels_of(encoded, train_on)]
    answer_loss = float(losses[_among(wanted, encoded.is_answer_text)].double().mean())
    label_losses = losses[_among(wanted, supervised)].double()
    embedding, question, answer, *sentences = directions.numpy()
    return Measured(
        embedding.copy(),  # a view would keep the whole minibatch's
        float(question @ answer) if any(encoded.is_question) else None,
        mean_pairwise_cosine(np.stack(sentences)) if len(sentences) > 1 else None,
        float(losses[_among(wanted, content)].double().mean()),
        answer_loss,
        ExampleLoss(float(label_losses.sum()), len(label_losses), answer_loss),
        float(sparsities.double().mean()) if sparsities is not None else None,
    )


def _among(chosen: Sequence[bool], flags: Sequence[bool]) -> torch.Tensor:
    """The ``flags`` of the chosen positions alone, as a mask for a tensor that has only these positions."""
    return torch.tensor(list(itertools.compress(flags, chosen)), dtype=torch.bool)


def mean_pairwise_cosine(unit: np.ndarray) -> float:
    """Mean cosine of all pairs of n unit vectors (n, H), n at least 2.

    Without n^2 products: the squared length of the vectors' sum is n plus the cosines of all n (n - 1) ordered pairs.
    """
    n = len(unit)
    total = unit.astype(np.float64).sum(0)
    return float((total @ total - n) / (n * (n - 1)))
