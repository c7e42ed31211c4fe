"""What one forward and backward pass of a training is given: tokens, labels, and whose they are.

    tokens    a a a a b b b c c c c c . .      filled up (.) to a fixed size, where passes are captured
    blocks    '-----' '---' '-------' '-'      a block that has no label
    labels    . . 1 1 . . 1 . . . 1 1          L of them, each with its weight in its step's loss; fillers weigh 0

It is made on the host, and sent to the device at once or copied into the tensors of a captured pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from raylora.data.encoding import IGNORE_INDEX
from raylora.data.minibatch import Blocks, Minibatch, collate
from raylora.model.adapted_product import PassRows
from raylora.model.adapter_products import AdapterProducts, Span
from raylora.model.graphs import LONGEST_BLOCKS, TOKENS_A_BLOCK, TensorRecord, fixed_size


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
class PassInputs(TensorRecord):
    """Tensors of one pass: T tokens, L labels, G groups."""

    batch: Minibatch
    weights: torch.Tensor
    """float32 (L,): of each label's loss."""
    groups: torch.Tensor
    """int64 (L,): whose loss it is."""
    rows: PassRows


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
    if size is not None and missing:
        # Fillers may be longer than any example: further positions may be beyond those that the model has.
        batch.position_ids[:, -missing:] = 0
    spans = zip(batch.spans([len(row) for row in rows]), examples, strict=True)
    of_slots = products.rows_of([Span(*s, e.slot, e.seed, e.group) for s, e in spans], batch.input_ids.numel())
    if not packed:
        # Groups of padded rows may be empty and begin anywhere, which a GPU's kernels for groups do not take.
        of_slots = replace(of_slots, ends_on_host=True)
    inputs = PassInputs(
        batch,
        torch.tensor([e.weight for e in examples for _ in range(e.num_labels)]),
        torch.tensor([e.group for e in examples for _ in range(e.num_labels)], dtype=torch.long),
        of_slots,
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
