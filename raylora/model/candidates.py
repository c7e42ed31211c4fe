"""Log-likelihoods of candidates for the token behind a row: how questions are asked.

    kept     P P P P P P            keys and values of a prefix, run once
    tokens   a a a a b b b c c c    rows behind it, packed
                   ^     ^     ^    the output head is applied to the last position of each row only
    candidates     4     2     4    tokens of each

A model that ``may_pack`` runs packed rows, of one or several adapters, whose products replace PEFT's forward pass; on a
GPU as captured passes of fixed sizes. Any other runs rows padded on the right, where no mask is needed, as causal
attention never looks to the right.

R rows, T tokens, C candidates a row, V entries in the vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from raylora.data.encoding import pad_token_of
from raylora.data.minibatch import Blocks, Minibatch, pack_rows
from raylora.model.adapted_product import PassRows
from raylora.model.adapter_products import AdapterProducts, Span, check_may_share
from raylora.model.adapters import LoadedModel
from raylora.model.attention import attention_in_blocks
from raylora.model.fetching import Fetched
from raylora.model.forward import at_output_head, token_losses
from raylora.model.graphs import LONGEST_BLOCKS, TOKENS_A_BLOCK, Capture, GraphedPasses, TensorRecord, fixed_size
from raylora.model.kept_keys import Behind, KeptKeys, Within
from raylora.model.memory import GPU_TOKEN_BUDGET
from raylora.model.packing import window_of

CANDIDATES = 10
"""Of each row, the choices of a question, at most: what is read of the logits costs nothing beside them."""
MOST_ROWS = GPU_TOKEN_BUDGET // TOKENS_A_BLOCK
"""Rows in a captured pass, at most."""


@dataclass(frozen=True)
class Row:
    """A row of token ids."""

    ids: Sequence[int]
    """Without those of the prefix."""
    candidates: Sequence[int]
    """Tokens that may stand behind it, ``CANDIDATES`` of them at most."""
    slot: int = 0
    """Of its adapter."""


@dataclass(frozen=True)
class Branches:
    """A row of token ids, and texts of which each may stand behind it."""

    ids: Sequence[int]
    """Without those of the prefix."""
    texts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class CandidateSize:
    """The fixed size of a captured pass."""

    tokens: int
    longest: int
    kept: int
    """Tokens that there is room for in front of the rows; 0: they stand behind no prefix."""

    @property
    def rows(self) -> int:
        """Rows that it has room for."""
        return self.tokens // TOKENS_A_BLOCK


@dataclass(frozen=True)
class CandidateInputs(TensorRecord):
    """Tensors of one pass."""

    batch: Minibatch
    last: torch.Tensor
    """int64 (R,): the last position of each row among all B * T tokens."""
    candidates: torch.Tensor
    """int64 (R, C)."""
    rows: PassRows | None
    """Whose adapter's tokens; None where no adapter's products are replaced."""
    behind: Behind | None


@dataclass(frozen=True)
class BranchInputs(TensorRecord):
    """Tensors of a pass of rows and their texts."""

    batch: Minibatch
    rows: PassRows | None
    behind: Behind | None
    within: Within | None
    texts: torch.Tensor
    """int64 (N,): whose token each label is."""


class Pending:
    """Log-likelihoods (R, C), in nats, on their way from the device.

    Args:
        rows: the caller's.
        order: which of them each of ``values`` is of.
    """

    def __init__(self, values: torch.Tensor, rows: Sequence[Row], order: Sequence[int]) -> None:
        self._fetched, self._rows, self._order = Fetched(values), rows, order

    def read(self) -> list[list[float]]:
        """Those of each row's candidates, by the caller's rows; waits for the device until they are there."""
        by_row = dict(zip(self._order, self._fetched.read().tolist(), strict=True))
        return [by_row[i][: len(row.candidates)] for i, row in enumerate(self._rows)]


class CandidatePasses:
    """Runs passes of rows of some adapters.

    Args:
        num_slots: adapters whose rows a pass may have, and one more for those of the base; 0: the model runs as it is,
            with PEFT's own forward pass where an adapter is active.
        capture: captures passes of fixed sizes; None: they are run as they are.
    """

    def __init__(self, loaded: LoadedModel, num_slots: int, capture: Capture | None) -> None:
        self._loaded, self._pad = loaded, pad_token_of(loaded.tokenizer)
        self._products = AdapterProducts(loaded, num_slots, 0) if num_slots else None
        self._num_slots, self._window = max(1, num_slots), window_of(loaded.model)
        self._keys = KeptKeys()
        self._prefix: Sequence[int] = ()
        self._is_packed = True
        out = torch.zeros(MOST_ROWS, CANDIDATES, device=loaded.device)
        # Of what they use alone, without ``self``: a cycle would keep gigabytes until Python looks for cycles.
        run = functools.partial(_add_logprobs, loaded, self._products, out)
        self.graphed = GraphedPasses(run, capture, lambda: [out])
        self._out = out

    def slot_of(self, adapter: str | None) -> int:
        """The slot of an adapter; None: of the base."""
        return self._products.slot_of(adapter) if self._products else 0

    @contextlib.contextmanager
    def ready(self, adapters: Sequence[str], packed: bool, longest_prefix: int = 0) -> Iterator[None]:
        """Inside, passes can be run; the model serves them alone.

        Args:
            adapters: the names of attached ones that have slots.
            packed: whether rows are packed, for a model that ``may_pack``; else there are no slots and no prefixes.
            longest_prefix: tokens that no prefix has more of.

        Raises:
            UserError: these adapters cannot share a pass.
        """
        self._is_packed, self._prefix = packed, ()
        self._make_room(longest_prefix)
        with contextlib.ExitStack() as stack:
            if self._products is not None:
                check_may_share(self._loaded, adapters, self._num_slots)
                if self._products.hold(adapters):
                    self.graphed.forget()
                self._products.begin()
                stack.enter_context(self._products.installed())
            if packed:
                stack.enter_context(attention_in_blocks(self._loaded.model))
            yield
        if not self.graphed.holds_any:  # no captured pass reads them
            self._keys = KeptKeys()

    def _make_room(self, longest_prefix: int) -> None:
        """Have room for the keys of a prefix of each slot: of a fixed size, where captured passes read them."""
        if not self.graphed.are_wanted:
            self._keys = KeptKeys()
        elif longest_prefix and (capacity := fixed_size(longest_prefix * self._num_slots)) > (self._keys.capacity or 0):
            self._keys = KeptKeys(capacity)
            self.graphed.forget()

    def run(self, rows: Sequence[Row], prefix: Sequence[int] = ()) -> Pending:
        """Run a pass.

        Args:
            rows: at least one.
            prefix: what all of them stand behind. It is run first, where it is not that of the pass before.

        Raises:
            torch.OutOfMemoryError: it does not fit (MemoryError or RuntimeError on a CPU).
        """
        order = sorted(range(len(rows)), key=lambda i: rows[i].slot)
        in_order = [rows[i] for i in order]
        if not self._is_packed:
            inputs = _padded(in_order, self._pad).to(self._loaded.device)
            return Pending(_logprobs(self._loaded, None, inputs), rows, order)
        if prefix and prefix != self._prefix:
            self._run_prefix(prefix)
        size = self._size_of(in_order, len(prefix))
        inputs = self._packed(in_order, len(prefix), size)
        if size is None:
            return Pending(_logprobs(self._loaded, self._products, inputs.to(self._loaded.device)), rows, order)
        self._out.zero_()
        self.graphed.run(inputs, self._loaded.device, size)
        return Pending(self._out[: len(rows)].clone(), rows, order)

    def run_branches(self, rows: Sequence[Branches], prefix: Sequence[int] = ()) -> Fetched:
        """Run rows and, behind each, its texts, which share its keys and values: packed rows of one adapter.

        Returns:
            float64, (texts of all rows,): the log-likelihood of each text behind its row, in nats.

        Raises:
            torch.OutOfMemoryError: it does not fit (MemoryError or RuntimeError on a CPU).
        """
        if prefix and prefix != self._prefix:
            self._run_prefix(prefix)
        inputs = self._branched(rows, len(prefix)).to(self._loaded.device)
        return Fetched(_sums_of_texts(self._loaded, self._products, inputs, sum(len(row.texts) for row in rows)))

    def _branched(self, rows: Sequence[Branches], num_before: int) -> BranchInputs:
        """A packed pass on the host: all rows, then the texts of each, whose last tokens predict none and are left out.

        Args:
            num_before: tokens of the prefix.
        """
        contexts = [row.ids for row in rows]
        texts = [(k, text) for k, row in enumerate(rows) for text in row.texts]
        fed = [(k, text[:-1]) for k, text in texts]
        blocks = [*contexts, *(text for _, text in fed if text)]
        starts = [num_before] * len(rows) + [num_before + len(contexts[k]) for k, text in fed if text]
        text_ends = [0, *itertools.accumulate(map(len, contexts))]
        of_row, predicting, first = [0] * len(rows), [], text_ends[-1]
        for k, text in fed:
            of_row[k] += len(text)
            predicting += [text_ends[k + 1] - 1, *range(first, first + len(text))]
            first += len(text)
        batch = replace(
            pack_rows(blocks, "cpu", starts=starts),
            targets=torch.tensor([token for _, text in texts for token in text]),
            predicting=torch.tensor(predicting),
        )
        num_tokens = batch.input_ids.shape[1]
        longest_text = num_before + max(len(row.ids) + max(map(len, row.texts)) for row in rows)
        branch_ends = [0, *itertools.accumulate(of_row)]
        spans = zip(*map(itertools.pairwise, (text_ends, branch_ends)), strict=True)
        of_texts, of_branches = (torch.tensor(ends, dtype=torch.int32) for ends in (text_ends, branch_ends))
        with_branches = tuple((*text, *branches) for text, branches in spans if branches[0] < branches[1])
        within = Within(
            text_ends[-1], of_texts, of_branches, max(map(len, contexts)), longest_text, with_branches
        )  # fmt: skip
        behind = None
        if num_before:
            of_prefix, of_rows = (torch.tensor([0, n], dtype=torch.int32) for n in (num_before, num_tokens))
            spans_before = ((0, num_before),) * len(blocks)
            behind = Behind(self._keys, of_prefix, of_rows, num_before, longest_text, spans_before)
        return BranchInputs(
            batch,
            self._products.rows_of([Span(0, num_tokens, 0, 0)], num_tokens) if self._products else None,
            behind,
            within if any(of_row) else None,
            torch.tensor([i for i, (_, text) in enumerate(texts) for _ in text]),
        )

    def _run_prefix(self, ids: Sequence[int]) -> None:
        """Keep the keys and values of a prefix, as each adapter has them."""
        self._prefix = ()
        self._keys.begin()
        rows = [Row(ids, [0], slot) for slot in range(self._num_slots)]
        inputs = self._packed(rows, 0, None).to(self._loaded.device)
        _logprobs(self._loaded, self._products, inputs, keep=self._keys)
        self._prefix = ids

    def _size_of(self, rows: Sequence[Row], num_before: int) -> CandidateSize | None:
        """The fixed size of a pass of these rows; None where it is not to be captured."""
        products = self._products
        if not self.graphed.are_wanted or (products and (products.by_group or not products.is_whole)):
            return None
        num_tokens, longest = sum(len(row.ids) for row in rows), max(len(row.ids) for row in rows)
        tokens = fixed_size(num_tokens)
        if num_before and (self._keys.capacity is None or num_before + longest > self._window):
            return None  # the keys lie elsewhere each time, or a window ends within them
        longest = next((n for n in LONGEST_BLOCKS if longest <= n <= tokens), tokens)
        size = CandidateSize(tokens, longest, (self._keys.capacity or 0) if num_before else 0)
        num_blocks = len(rows) + -(-(tokens - num_tokens) // longest)
        return size if num_blocks <= size.rows <= MOST_ROWS else None

    def _packed(self, rows: Sequence[Row], num_before: int, size: CandidateSize | None) -> CandidateInputs:
        """A packed pass of rows that are sorted by slot, on the host; filled up to ``size``, if any.

        Args:
            num_before: tokens of the prefix.
        """
        parts = [row.ids for row in rows]
        num_tokens = sum(map(len, parts))
        if size is not None:
            missing = size.tokens - num_tokens
            parts += [[self._pad] * min(size.longest, missing - i) for i in range(0, missing, size.longest)]
        batch = pack_rows(parts, "cpu", starts=[num_before] * len(parts))
        assert batch.blocks is not None
        # Fillers may be longer than any row: further positions may be beyond those that the model has.
        batch.position_ids[:, num_tokens:] = num_before
        ends = batch.blocks.ends
        last, candidates = ends[1 : len(rows) + 1].long() - 1, _candidates(rows)
        spans = [
            Span(start, end, row.slot, 0)
            for row, (start, end) in zip(rows, itertools.pairwise(ends.tolist()), strict=False)
        ]
        of_adapters = self._products.rows_of(spans, batch.input_ids.shape[1]) if self._products else None
        behind = self._behind(rows, num_before, batch, of_adapters, size) if num_before else None
        if size is not None:
            ends = F.pad(ends, (0, size.rows + 1 - len(ends)), value=size.tokens)
            batch = replace(batch, blocks=Blocks(ends, size.longest))
            # The first row again: what another position came to is not asked for.
            last = torch.cat([last, last[:1].expand(size.rows - len(last))])
            candidates = torch.cat([candidates, candidates[:1].expand(size.rows - len(candidates), -1)])
        return CandidateInputs(batch, last, candidates, of_adapters, behind)

    def _behind(
        self,
        rows: Sequence[Row],
        num_before: int,
        batch: Minibatch,
        of_adapters: PassRows | None,
        size: CandidateSize | None,
    ) -> Behind:
        """Each row behind the prefix as its adapter has it."""
        num_tokens = batch.input_ids.shape[1]
        row_ends = torch.tensor([num_tokens], dtype=torch.int32) if of_adapters is None else of_adapters.adapter_ends
        prefix_ends = torch.arange(self._num_slots + 1, dtype=torch.int32) * num_before
        longest = num_before + max(len(row.ids) for row in rows)
        return Behind(
            self._keys,
            prefix_ends,
            F.pad(row_ends.to(torch.int32), (1, 0)),
            size.kept if size is not None else num_before,
            self._window if size is not None else longest,
            tuple((row.slot * num_before, (row.slot + 1) * num_before) for row in rows) if size is None else None,
        )


def _candidates(rows: Sequence[Row]) -> torch.Tensor:
    """The rows' candidates, int64 (R, ``CANDIDATES``): the first one stands where a row has fewer."""
    repeated = [[row.candidates[0]] * (CANDIDATES - len(row.candidates)) for row in rows]
    return torch.tensor([[*row.candidates, *others] for row, others in zip(rows, repeated, strict=True)])


def _padded(rows: Sequence[Row], pad_token_id: int) -> CandidateInputs:
    """Rows padded on the right: as attention is causal, no mask is needed."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[pad_token_id] * (width - len(row.ids))] for row in rows])
    positions = torch.arange(width)[None].expand(len(rows), -1)
    last = torch.tensor([i * width + len(row.ids) - 1 for i, row in enumerate(rows)])
    candidates = _candidates(rows)
    return CandidateInputs(Minibatch(ids, None, positions), last, candidates, None, None)


def _logprobs(
    loaded: LoadedModel, products: AdapterProducts | None, inputs: CandidateInputs, keep: KeptKeys | None = None
) -> torch.Tensor:
    """Run a pass that is on the device: (R, C), in nats, float32."""
    if products is not None and inputs.rows is not None:
        products.expect(inputs.rows)
    batch, model = inputs.batch, loaded.model
    options: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.blocks is not None:
        options |= {"position_ids": batch.position_ids, "blocks": batch.blocks}
        options |= {"behind": inputs.behind, "keep": keep}

    def last_of(states: torch.Tensor) -> torch.Tensor:
        return states.flatten(0, 1)[inputs.last.to(states.device)][None]

    with loaded.forward_autocast(), at_output_head(model, last_of) as named:
        logits = model(**options).logits
    logits = (logits if named else last_of(logits))[0].float()  # (R, V)
    return logits.gather(1, inputs.candidates.to(logits.device)) - logits.logsumexp(-1, keepdim=True)


def _add_logprobs(
    loaded: LoadedModel, products: AdapterProducts | None, out: torch.Tensor, inputs: CandidateInputs
) -> None:
    """Run a pass, and add its log-likelihoods to the first of ``out``."""
    found = _logprobs(loaded, products, inputs)
    out[: len(found)] += found.to(out.device)


def _sums_of_texts(
    loaded: LoadedModel, products: AdapterProducts | None, inputs: BranchInputs, num_texts: int
) -> torch.Tensor:
    """Run a pass that is on the device: the log-likelihood of each text, float64."""
    if products is not None and inputs.rows is not None:
        products.expect(inputs.rows)
    with loaded.forward_autocast():
        losses = token_losses(loaded, inputs.batch, behind=inputs.behind, within=inputs.within)
    sums = torch.zeros(num_texts, dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, inputs.texts.to(losses.device), -losses.double())
