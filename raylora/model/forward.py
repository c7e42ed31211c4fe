"""Forward passes: rows of token ids in, losses of chosen tokens and hidden states of chosen positions out.

    token ids   a a a a a b b b
    labels      . . . a a . b b     losses (N,), N = 4; the output head sees the position before each
    chosen      . a a a a . b b     last hidden states (K, H), K = 6

The output head sees no other positions, and these a chunk at a time: the logits of a whole minibatch are
never there at once. A chunk's gradient is taken while its logits are at hand, so nothing is computed twice.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from raylora.data.encoding import IGNORE_INDEX, pad_token_of
from raylora.data.minibatch import Minibatch, collate, send
from raylora.model.adapters import LoadedModel
from raylora.model.memory import TokenBudget
from raylora.model.packing import REFUSALS, attention_in_blocks

T = TypeVar("T")
CPU_LOGITS = 2**22
"""Logits held at once: 16 MB in float32, which stay in the caches (benchmarks/NOTES.md)."""
GPU_LOGITS = 2**28


class _HeadLosses(torch.autograd.Function):
    """Losses (N,) of hidden states (N, H) at a frozen output head. Each depends on its own state alone, so that its
    gradient can be kept, in the states' size, in place of the logits."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, head: Any, targets: torch.Tensor, chunk: int) -> torch.Tensor:
        losses, gradients = [], []
        for part, target in zip(states.split(chunk), targets.split(chunk), strict=True):
            part = part.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                logits = head(part)
            log_probabilities = logits.detach().float().log_softmax(-1)
            losses.append(-log_probabilities.gather(1, target[:, None])[:, 0])
            if ctx.needs_input_grad[0]:
                slope = log_probabilities.exp_()
                slope.scatter_add_(1, target[:, None], slope.new_full((len(target), 1), -1.0))
                gradients.append(torch.autograd.grad(logits, part, slope.to(logits.dtype))[0])
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * slopes[0][:, None].to(gradients.dtype), None, None, None


def head_is_plain(model: Any) -> bool:
    """Whether ``model``'s logits are what its output head makes of the last states: some scale or bend them after."""
    seen: list[torch.Tensor] = []

    def select(states: torch.Tensor) -> torch.Tensor:
        seen.append(states)
        return states

    ids = torch.arange(4, device=model.device)[None] + 3
    with torch.inference_mode():
        try:
            with at_output_head(model, select) as named:
                logits = model(input_ids=ids, use_cache=False).logits
            return named and bool(torch.allclose(logits, model.get_output_embeddings()(seen[0]), rtol=1e-3, atol=1e-5))
        except REFUSALS:
            return False


def head_losses(model: Any, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy (N,) of what a plain, frozen output head makes of states (N, H), a chunk at a time."""
    head = model.get_output_embeddings()
    budget = GPU_LOGITS if states.device.type == "cuda" else CPU_LOGITS
    chunk = max(1, budget // int(head.weight.shape[0]))
    losses: torch.Tensor = _HeadLosses.apply(states, head, targets.to(states.device), chunk)
    return losses


@contextlib.contextmanager
def at_output_head(model: Any, select: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[bool]:
    """Inside, ``select`` takes the last hidden states (B, T, H) and returns those that the output head is to see.

    Yields:
        False where the model does not name its head: its logits are then those of all positions.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield False
        return
    hook = head.register_forward_pre_hook(lambda _, args: (select(args[0]), *args[1:]))
    try:
        yield True
    finally:
        hook.remove()


@contextlib.contextmanager
def inference(model: Any) -> Iterator[None]:
    """Inside, ``model`` is in eval mode, and nothing is kept for a backward pass."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def token_losses(loaded: LoadedModel, batch: Minibatch) -> torch.Tensor:
    """Cross entropy of each label of a minibatch, (N,) in float32, example after example."""
    return _losses_and_states(loaded, batch, None)[0]


def _losses_and_states(
    loaded: LoadedModel, batch: Minibatch, places: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses (N,) of the labels, and the last hidden states (K, H) at ``places`` (K,) among all B * T tokens."""
    assert batch.targets is not None
    assert batch.predicting is not None
    model, targets, before = loaded.model, batch.targets, batch.predicting
    head = model.get_output_embeddings()
    chunked = loaded.allows(head_is_plain) and not any(p.requires_grad for p in head.parameters())
    chosen: list[torch.Tensor] = []

    def choose(states: torch.Tensor) -> torch.Tensor:
        """Of the last states (B, T, H) those that are needed: the others are free before the losses are computed."""
        flat = states.flatten(0, 1)
        chosen.append(flat[before.to(flat.device)])
        if places is not None:
            chosen.append(flat[places.to(flat.device)].float())
        return states[:1, :1] if chunked else chosen[0][None]

    with at_output_head(model, choose) as named:
        more = {} if named or places is None else {"output_hidden_states": True}
        output = model(**batch.model_inputs(), use_cache=False, **more)
    if more:
        choose(output.hidden_states[-1])
    if chunked:
        losses = head_losses(model, chosen[0], targets)
    else:
        logits = output.logits[0] if named else output.logits.flatten(0, 1)[before.to(output.logits.device)]
        losses = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    return losses, None if places is None else chosen[1]


@dataclass(frozen=True)
class Output:
    """What a forward pass says of the rows of a minibatch, one row after another."""

    losses: torch.Tensor
    """(N,), of each label given all tokens before it in its row, in nats, float32."""
    num_losses: list[int]
    """Of each row; they add up to N."""
    states: torch.Tensor | None
    """(K, H), the last hidden states that were chosen, float32."""
    places: torch.Tensor | None
    """(K,), where those stand among all tokens of the minibatch, padding included."""
    num_states: list[int]


def forward_rows(
    loaded: LoadedModel,
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    budget: TokenBudget,
    use: Callable[[list[int], Output], T],
    chosen: Sequence[Sequence[bool]] | None = None,
    start_over: Callable[[], object] | None = None,
    packed: bool = False,
) -> Iterator[tuple[list[int], T]]:
    """Run rows of token ids, longest first, in minibatches that memory holds.

    Args:
        labels: of each row, as long as it: its own tokens where their loss is wanted, else IGNORE_INDEX. Nothing
            predicts a row's first token, which has no label.
        use: makes of a minibatch, its rows' numbers and output, what is kept of it; a backward pass belongs here. What
            it returns is not None.
        chosen: of each row, as long as it: the positions whose last hidden states are wanted.
        start_over: see ``TokenBudget.pieces``.
        packed: without padding, for a model that ``can_pack``.

    Yields:
        The numbers of the rows of each minibatch, and what ``use`` returned.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    pad = pad_token_of(loaded.tokenizer)
    num_losses = [sum(label != IGNORE_INDEX for label in row) for row in labels]

    def run(part: list[int]) -> T:
        batch = collate([rows[i] for i in part], [labels[i] for i in part], pad, loaded.device, packed)
        places, num_states = _places(batch, [chosen[i] for i in part]) if chosen is not None else (None, [])
        with attention_in_blocks(loaded.model) if packed else contextlib.nullcontext():
            losses, states = _losses_and_states(loaded, batch, places)
            return use(part, Output(losses, [num_losses[i] for i in part], states, places, num_states))

    yield from budget.pieces(range(len(rows)), lambda i: len(rows[i]), run, start_over, packed)


def _places(batch: Minibatch, chosen: Sequence[Sequence[bool]]) -> tuple[torch.Tensor, list[int]]:
    """Where the chosen positions of each row stand among all tokens, (K,), and how many of each row there are."""
    spans = batch.spans([len(flags) for flags in chosen])
    places = [list(itertools.compress(range(*span), flags)) for span, flags in zip(spans, chosen, strict=True)]
    flat = torch.tensor(list(itertools.chain.from_iterable(places)), dtype=torch.long)
    return send(flat, batch.input_ids.device), [len(row) for row in places]
