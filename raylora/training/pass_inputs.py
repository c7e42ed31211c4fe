"""What one forward and backward pass of a training is given: tokens, labels, and whose they are.

    tokens    a a a a b b b c c c c c . .      filled up (.) to a fixed size, where passes are captured
    blocks    '-----' '---' '-------' '-'      a block that has no label
    labels    . . 1 1 . . 1 . . . 1 1          L of them, each with its weight in its step's loss; fillers weigh 0

It is made on the host, and sent to the device at once or copied into the tensors of a captured pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from raylora.data.encoding import IGNORE_INDEX
from raylora.data.minibatch import Blocks, Minibatch, collate, send
from raylora.training.adapter_products import AdapterProducts, PassRows, Span

T = TypeVar("T")
SMALLEST = 512
"""Tokens of the smallest pass that is captured."""
LONGEST_BLOCKS = (512, 2048)
"""What the longest block of a captured pass is rounded up to. The kernel of attention is launched for blocks of that
length: of all 8,192 tokens, a million thread blocks would start in each layer to do nothing."""
TOKENS_A_BLOCK = 32
"""A captured pass has room for one block in so many tokens."""


@dataclass(frozen=True)
class Example:
    """An example of a pass."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    """The token where its loss is wanted, else IGNORE_INDEX."""
    slot: int
    """Of its adapter."""
    seed: int
    """Of its dropout."""
    group: int
    """Whose gradient and loss it adds to."""
    weight: float
    """Of each of its labels in that loss."""
    num_labels: int


@dataclass(frozen=True)
class PassSize:
    """The fixed size of a captured pass."""

    tokens: int
    labels: int
    longest: int
    drops: bool
    """Whether an adapter has dropout."""

    @property
    def blocks(self) -> int:
        return self.tokens // TOKENS_A_BLOCK


@dataclass(frozen=True)
class PassInputs:
    """Tensors of one pass: T tokens, L labels, G groups."""

    batch: Minibatch
    weights: torch.Tensor
    """float32 (L,): of each label's loss."""
    groups: torch.Tensor
    """int64 (L,): whose loss it is."""
    rows: PassRows

    def to(self, device: torch.device) -> PassInputs:
        moved = _with_tensors(self, lambda tensor: send(tensor, device))
        if self.batch.blocks is not None and not self.rows.by_group:
            return moved
        # Groups of padded rows may be empty and begin anywhere, which a GPU's kernels for groups do not take.
        rows = replace(moved.rows, adapter_ends=self.rows.adapter_ends, group_ends=self.rows.group_ends)
        return replace(moved, rows=rows)

    def fill(self, others: PassInputs) -> None:
        """Copy the numbers of ``others``, which has the same size, into these tensors."""
        for mine, theirs in zip(_tensors(self), _tensors(others), strict=True):
            assert mine.shape == theirs.shape
            mine.copy_(theirs.pin_memory() if mine.is_cuda else theirs, non_blocking=True)


def fixed_size(num_tokens: int) -> int:
    """The least fixed size of a pass that holds so many tokens: four sizes in each doubling, from 512 on.

    A pass is then filled up by 10% on average. Each size is captured for itself.
    """
    base = SMALLEST
    while 2 * base < num_tokens:
        base *= 2
    return next(size for k in (4, 5, 6, 7, 8) if (size := base * k // 4) >= num_tokens)


def largest_size(num_tokens: int) -> int:
    """The largest fixed size of at most so many tokens; the smallest one if there is none."""
    size = SMALLEST
    while fixed_size(size + 1) <= num_tokens:
        size = fixed_size(size + 1)
    return size


def size_of(examples: Sequence[Example], drops: bool) -> PassSize | None:
    """The fixed size of a packed pass that holds these examples; None where they are more than its blocks."""
    num_tokens, longest = sum(len(e.input_ids) for e in examples), max(len(e.input_ids) for e in examples)
    tokens, num_labels = fixed_size(num_tokens), sum(e.num_labels for e in examples)
    size = PassSize(
        tokens,
        next(n for n in (tokens // 4, tokens // 2, tokens) if n >= num_labels),
        next((n for n in LONGEST_BLOCKS if longest <= n <= tokens), tokens),
        drops,
    )
    return size if len(examples) + -(-(tokens - num_tokens) // size.longest) <= size.blocks else None


def align_groups(
    examples: Sequence[Example], products: AdapterProducts, alignment: int, pad_token_id: int
) -> list[Example]:
    """The same examples, and padding, so that each group has tokens, and begins at a multiple of ``alignment``.

    On a GPU the gradients of groups are one product, whose kernel asks both of them.
    """
    found: list[Example] = []
    for group in range(products.num_groups):
        of_group = [e for e in examples if e.group == group]
        missing = -sum(len(e.input_ids) for e in of_group) % alignment if of_group else alignment
        slot = group if products.num_slots > 1 else 0
        found += of_group + [_filler(missing, pad_token_id, slot, group)] * (missing > 0)
    return found


def _filler(num_tokens: int, pad_token_id: int, slot: int, group: int) -> Example:
    """Padding that has no label."""
    ids, labels = [pad_token_id] * num_tokens, [IGNORE_INDEX] * num_tokens
    return Example(ids, labels, slot, 0, group, 0.0, 0)


def make_inputs(
    examples: Sequence[Example],
    products: AdapterProducts,
    pad_token_id: int,
    packed: bool,
    size: PassSize | None = None,
) -> PassInputs:
    """A pass of these examples, on the host.

    Args:
        examples: sorted by the slot of their adapter, then by group.
        size: fill a packed pass up to it.
    """
    if size is not None:
        missing = size.tokens - sum(len(e.input_ids) for e in examples)
        lengths = [min(size.longest, missing - start) for start in range(0, missing, size.longest)]
        last = examples[-1]
        examples = [*examples, *(_filler(n, pad_token_id, last.slot, last.group) for n in lengths)]
    rows, labels = [e.input_ids for e in examples], [e.labels for e in examples]
    batch = collate(rows, labels, pad_token_id, torch.device("cpu"), packed)
    spans = zip(batch.spans([len(row) for row in rows]), examples, strict=True)
    inputs = PassInputs(
        batch,
        torch.tensor([e.weight for e in examples for _ in range(e.num_labels)]),
        torch.tensor([e.group for e in examples for _ in range(e.num_labels)], dtype=torch.long),
        products.rows_of([Span(*span, e.slot, e.seed, e.group) for span, e in spans], batch.input_ids.numel()),
    )
    return inputs if size is None else _with_fixed_counts(inputs, size)


def _with_fixed_counts(inputs: PassInputs, size: PassSize) -> PassInputs:
    """The same pass with labels that weigh nothing and empty blocks, as many as ``size`` has; tensors say which."""
    batch = inputs.batch
    assert batch.targets is not None
    assert batch.predicting is not None
    assert batch.blocks is not None
    ends = F.pad(batch.blocks.ends, (0, size.blocks + 1 - len(batch.blocks.ends)), value=size.tokens)
    # The first label again: what another position came to, infinite perhaps, would be of another group.
    targets, predicting, groups = (
        torch.cat([tensor, tensor[:1].expand(size.labels - len(tensor))])
        for tensor in (batch.targets, batch.predicting, inputs.groups)
    )
    weights = F.pad(inputs.weights, (0, size.labels - len(inputs.weights)))
    batch = replace(batch, targets=targets, predicting=predicting, blocks=Blocks(ends, size.longest))
    return PassInputs(batch, weights, groups, inputs.rows)


def _tensors(record: Any) -> list[torch.Tensor]:
    """All tensors of a dataclass, those of the dataclasses in it too."""
    values = [getattr(record, field.name) for field in fields(record)]
    found = [_tensors(value) if is_dataclass(value) else [value] for value in values]
    return [value for part in found for value in part if isinstance(value, torch.Tensor)]


def _with_tensors(record: T, change: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """A dataclass with each of its tensors changed, those of the dataclasses in it too."""
    changed: dict[str, Any] = {}
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if is_dataclass(value):
            changed[field.name] = _with_tensors(value, change)
        elif isinstance(value, torch.Tensor):
            changed[field.name] = change(value)
    return replace(record, **changed)  # type: ignore[type-var]
