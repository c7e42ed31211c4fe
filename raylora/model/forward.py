"""Forward passes: rows of token ids in, losses of chosen tokens and hidden states of chosen positions out.

    token ids   a a a a a b b b
    labels      . . . a a . b b     losses (N,), N = 4; the output head sees the position before each
    chosen      . a a a a . b b     last hidden states (K, H), K = 6

B rows, T tokens in a row, H numbers in a hidden state, V entries in the vocabulary.

Logits take the most memory (V is 128,256 in Llama 3), so the output head is applied to no other positions, and to these
in chunks: the logits of a whole minibatch are never in memory at once. The gradient with respect to a chunk's hidden
states is computed right after its logits, so the backward pass need not compute the logits again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from raylora.data.encoding import IGNORE_INDEX, pad_token_of
from raylora.data.minibatch import Minibatch, collate, send
from raylora.model.adapters import LoadedModel
from raylora.model.attention import REFUSALS, attention_in_blocks
from raylora.model.memory import TokenBudget

T = TypeVar("T")
CPU_LOGITS = 2**22
"""Logits of a chunk on a CPU: 16 MB in float32, which stay in the caches (benchmarks/NOTES.md)."""
GPU_LOGITS = 2**28
"""Logits of a chunk on a GPU: 1 GB in float32."""


class _HeadLosses(torch.autograd.Function):
    """Cross entropy (N,) of hidden states (N, H) at a frozen output head.

    A loss depends on its own hidden state alone. So the gradients, (N, H), can be computed in the forward pass. Only
    they are saved for the backward pass, the logits, (N, V), are not.
    """

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
                # The derivative of cross entropy by the logits: the probabilities, less 1 at the target.
                by_logits = log_probabilities.exp_()
                by_logits.scatter_add_(1, target[:, None], by_logits.new_full((len(target), 1), -1.0))
                gradients.append(torch.autograd.grad(logits, part, by_logits.to(logits.dtype))[0])
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *by_losses: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * by_losses[0][:, None].to(gradients.dtype), None, None, None


def head_is_plain(model: Any) -> bool:
    """Whether ``model``'s logits are its output head applied to the last hidden states, and nothing more.

    Some models scale the logits afterwards, or soft-cap them. Found out by running ``model`` on four tokens.
    """
    head_inputs: list[torch.Tensor] = []

    def select(states: torch.Tensor) -> torch.Tensor:
        head_inputs.append(states)
        return states

    ids = torch.arange(4, device=model.device)[None] + 3
    with torch.inference_mode():
        try:
            with at_output_head(model, select) as named:
                logits = model(input_ids=ids, use_cache=False).logits
            if not named:
                return False
            head_outputs = model.get_output_embeddings()(head_inputs[0])
            return bool(torch.allclose(logits, head_outputs, rtol=1e-3, atol=1e-5))
        except REFUSALS:
            return False


def head_losses(model: Any, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy (N,), in float32, of hidden states (N, H) at a plain, frozen output head, a chunk at a time.

    Args:
        targets: (N,), the token that each state is to predict.
    """
    head = model.get_output_embeddings()
    budget = GPU_LOGITS if states.device.type == "cuda" else CPU_LOGITS
    chunk = max(1, budget // int(head.weight.shape[0]))
    losses: torch.Tensor = _HeadLosses.apply(states, head, targets.to(states.device), chunk)
    return losses


@contextlib.contextmanager
def at_output_head(model: Any, select: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[bool]:
    """Inside, the output head is applied to what ``select`` returns when called with the last hidden states (B, T, H).

    Yields:
        False where the model does not name its output head: ``select`` is then never called, and the logits are those
        of all positions.
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
    """Inside, ``model`` is in eval mode, and nothing is saved for a backward pass."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def token_losses(loaded: LoadedModel, batch: Minibatch, **attention: Any) -> torch.Tensor:
    """Cross entropy of each label of a minibatch, (N,) in float32, in nats, example after example.

    Args:
        attention: what else ``attend_in_blocks`` is told.
    """
    return _losses_and_states(loaded, batch, None, attention)[0]


def _losses_and_states(
    loaded: LoadedModel, batch: Minibatch, places: torch.Tensor | None, attention: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses (N,) of the labels, and the last hidden states (K, H) at ``places`` (K,), indices of the B * T tokens."""
    assert batch.targets is not None
    assert batch.predicting is not None
    model, targets, predicting = loaded.model, batch.targets, batch.predicting
    head = model.get_output_embeddings()
    # Not where the head itself is trained: _HeadLosses has no gradient for its weights.
    chunked = loaded.allows(head_is_plain) and not any(p.requires_grad for p in head.parameters())
    chosen: list[torch.Tensor] = []

    def choose(states: torch.Tensor) -> torch.Tensor:
        """Copy what is needed of the last states (B, T, H), so that they are freed before the losses are computed."""
        flat = states.flatten(0, 1)
        chosen.append(flat[predicting.to(flat.device)])
        if places is not None:
            chosen.append(flat[places.to(flat.device)].float())
        # The model applies its head to something in any case: to one position where head_losses does the work.
        return states[:1, :1] if chunked else chosen[0][None]

    with at_output_head(model, choose) as named:
        options = {} if named or places is None else {"output_hidden_states": True}
        output = model(**batch.model_inputs(), use_cache=False, **options, **attention)
    if options:
        choose(output.hidden_states[-1])
    if chunked:
        losses = head_losses(model, chosen[0], targets)
    else:
        logits = output.logits[0] if named else output.logits.flatten(0, 1)[predicting.to(output.logits.device)]
        losses = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    return losses, None if places is None else chosen[1]


@dataclass(frozen=True)
class Output:
    """Losses and hidden states of the rows of a minibatch, one row after another."""

    losses: torch.Tensor
    """(N,): the loss of each label, given all tokens before it in its row, in nats, float32."""
    num_losses: list[int]
    """How many losses each row has; N in all."""
    states: torch.Tensor | None
    """(K, H): the last hidden states of the chosen positions, float32; None where none were asked for."""
    places: torch.Tensor | None
    """(K,): the index of each of these positions among all tokens of the minibatch, padding included."""
    num_states: list[int]
    """How many of these positions each row has; K in all."""


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
    """Run rows of token ids, longest first, in minibatches that fit into memory.

    Args:
        labels: one list a row, of the row's length: the token itself where its loss is wanted, else IGNORE_INDEX. The
            first token has no label, as nothing comes before it to predict it.
        use: called with the indices of a minibatch's rows and their ``Output``; a backward pass belongs here. It must
            not return None.
        chosen: one list a row, of the row's length: True at positions whose last hidden states are wanted.
        start_over: see ``TokenBudget.pieces``.
        packed: without padding, for a model that ``can_pack``.

    Yields:
        The indices of the rows of each minibatch, and what ``use`` returned.

    Raises:
        torch.OutOfMemoryError: a single row does not fit (MemoryError or RuntimeError on a CPU).
    """
    pad = pad_token_of(loaded.tokenizer)
    loaded.allows(head_is_plain)  # tried before attention is replaced
    num_losses = [sum(label != IGNORE_INDEX for label in row) for row in labels]

    def run(part: list[int]) -> T:
        batch = collate([rows[i] for i in part], [labels[i] for i in part], pad, loaded.device, packed)
        places, num_states = _places(batch, [chosen[i] for i in part]) if chosen is not None else (None, [])
        with attention_in_blocks(loaded.model) if packed else contextlib.nullcontext():
            losses, states = _losses_and_states(loaded, batch, places, {})
            return use(part, Output(losses, [num_losses[i] for i in part], states, places, num_states))

    yield from budget.pieces(range(len(rows)), lambda i: len(rows[i]), run, start_over, packed)


def _places(batch: Minibatch, chosen: Sequence[Sequence[bool]]) -> tuple[torch.Tensor, list[int]]:
    """The indices (K,) of the chosen positions among all tokens of the minibatch, and their number in each row."""
    spans = batch.spans([len(flags) for flags in chosen])
    places = [list(itertools.compress(range(*span), flags)) for span, flags in zip(spans, chosen, strict=True)]
    flat = torch.tensor(list(itertools.chain.from_iterable(places)), dtype=torch.long)
    return send(flat, batch.input_ids.device), [len(row) for row in places]
