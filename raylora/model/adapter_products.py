"""The matrix products of LoRA adapters: several adapters, and in training several gradients of one, in a pass.

The parameters are PEFT's own and PEFT saves them. In training and in scoring this replaces PEFT's forward pass:

    tokens   a a a a a a b b b b b       of adapters a and b, side by side: K = 2
    groups   0 0 0 0 0 0 1 1 1 1 1       each with a gradient of its own: G = K, or, of one adapter alone, G
                                         micro-batches of a probe

- The base's product and the adapters' are one autograd function, whatever the base's weights are stored as. In the
  backward pass the adapters' part is added in place to the base's, and the gradient of a group to what other passes of
  the step left there: neither goes through autograd, which would allocate and add them (442 additions, 24 of 496 ms of
  a pass of an 8B model on an H200).
- K adapters are one grouped product: A (K, r, in) and B (K, out, r) hold all of them, lesser ranks filled with zeros,
  which stay zero. (PEFT can mix adapters in a batch for inference only.)
- Dropout is a hash (``dropout.py``): its mask is a byte a number on a CPU, and a GPU makes it again in the
  backward pass.

T tokens in a pass; r is the largest rank.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raylora.errors import ErrorKind, PartialInputError, UserError
from raylora.model.adapted_product import AdaptedMatrix, AdaptedProduct, PassRows, add_adapters
from raylora.model.adapters import LoadedModel
from raylora.model.device import compute_dtype
from raylora.model.dropout import threshold_of, token_hashes
from raylora.model.frozen import frozen_layer
from raylora.model.grouped import aligned, may_group

LINEAR = {"Linear", "Linear8bitLt", "Linear4bit"}
"""PEFT's modules around a matrix, which compute base(x) + scaling * B A dropout(x)."""


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``stop`` of a minibatch: one example, for the adapter of ``slot``, dropout by ``seed``."""

    start: int
    stop: int
    slot: int
    seed: int
    group: int = 0
    """Whose gradient the example adds to."""


def check_may_share(loaded: LoadedModel, names: Sequence[str], num_sharing: int | None = None) -> None:
    """Check that these adapters, which are attached, can share a pass.

    Args:
        num_sharing: how many share it, if the base does, too; else as many as there are names.

    Raises:
        UserError: there are several, and some adapted modules are not linear.
    """
    if (num_sharing or len(names)) > 1 and any(not _is_linear(module) for module in _adapted(loaded, names)):
        text = "--target-modules: adapters of modules other than linear ones cannot share a pass"
        raise UserError(text, kind=ErrorKind.TARGET_MODULES)


def _adapted(loaded: LoadedModel, names: Sequence[str]) -> list[Any]:
    """The modules that one of these adapters is on."""
    return [m for _, m in loaded.lora_modules() if any(n in m.lora_A or n in m.lora_embedding_A for n in names)]


def _places_of_linear(model: Any) -> dict[int, int]:
    """The place of each linear module among all of the model, by the module's id.

    Dropout draws by it: a place among the adapted ones would depend on what else is adapted for others in the pass.
    """
    from transformers.pytorch_utils import Conv1D

    inside = (".base_layer", ".lora_")  # of PEFT's modules
    named = [(name, m) for name, m in model.named_modules() if not any(part in name for part in inside)]
    linear = (m for _, m in named if type(m).__name__ in LINEAR or isinstance(m, torch.nn.Linear | Conv1D))
    return {id(module): place for place, module in enumerate(linear)}


def _is_linear(module: Any) -> bool:
    """Whether all that its adapters add, and all that is trained of it, is scaling * B A dropout(x)."""
    has_bias = any(b.bias is not None for b in getattr(module, "lora_B", {}).values())
    if type(module).__name__ not in LINEAR or module.lora_variant or has_bias:
        return False
    return not any(parameter.requires_grad for parameter in module.get_base_layer().parameters())


class AdapterProducts:
    """Products and gradients of attached adapters, at most ``num_slots`` of them at once.

    ``expect`` is called before each forward pass; ``begin`` before the first of a step, as the adapters' parameters
    have changed since the last one.

    Args:
        num_groups: gradients that a pass has at most; more than ``num_slots`` only where there is one slot. 0: no
            gradients and no dropout, for forward passes alone.
    """

    def __init__(self, loaded: LoadedModel, num_slots: int, num_groups: int) -> None:
        assert num_slots in {1, num_groups} or num_groups == 0
        self._loaded, self.num_slots, self.num_groups = loaded, num_slots, num_groups
        self._names: list[str | None] = [None] * num_slots
        self._matrices: list[AdaptedMatrix] = []
        self._rank = self._largest_rank = 0
        self._dtype = torch.float32
        self._copies: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._scalings: list[float] = []  # of each copy, where an adapter's scaling differs from module to module
        self._is_uneven = False
        """Whether ranks, or an adapter's scaling, differ from module to module: parameters are then copied."""
        self._num_others = 0
        self._rows: PassRows | None = None
        self._rows_on: dict[torch.device, PassRows] = {}
        # Autograd runs a function's backward pass only where an input needs a gradient, and adapters are no inputs.
        self._anchor = torch.zeros((), requires_grad=True)
        self.remakes_masks = loaded.device.type == "cuda"
        """Whether dropout's masks are made again in the backward pass, which a GPU does in no time, or kept."""
        self.gradients: list[torch.Tensor] = []
        """All gradients, those of a device in one tensor."""
        self._gets_parts = False
        self.is_whole = True
        """Whether these are the products of all adapted modules; others compute and keep their gradient themselves, as
        no replay of a captured pass would."""

    def slot_of(self, name: str | None) -> int:
        """Where an adapter's matrices are among those of all; None: a free slot, whose tokens get the base alone."""
        return self._names.index(name)

    def hold(self, names: Sequence[str]) -> bool:
        """Hold these adapters, which are attached and may share a pass; those that were held keep their slots.

        Returns:
            Whether the tensors of the products are new ones.
        """
        self._names = [name if name in names else None for name in self._names]
        for name in names:
            if name not in self._names:
                self._names[self._names.index(None)] = name
        adapted = _adapted(self._loaded, names)
        linear = [module for module in adapted if _is_linear(module)]
        ranks = [pair[0].shape[0] for m in linear for name in names if (pair := _parameters(m, name))]
        self._dtype = compute_dtype(self._loaded.device) if self.num_groups else self._loaded.forward_dtype
        self._largest_rank = max(ranks, default=0)
        rank = self._fitting_rank()
        was_copied = self._is_copied
        scalings = {(n, m.scaling[n]) for m in linear for n in names if n in m.lora_A}
        differs = len(scalings) > len({name for name, _ in scalings}) or len({*ranks}) > 1
        self._is_uneven = self.num_groups > 0 and differs
        is_new = rank != self._rank or [id(m.module) for m in self._matrices] != [id(m) for m in linear]
        is_new |= self._is_copied != was_copied
        self._gets_parts = self._gets_parts and not is_new
        self.is_whole = len(linear) == len(adapted) and not self._gets_parts and not self._loaded.trains_beside
        self._num_others = len(adapted) - len(linear)
        if is_new:
            self._rank = rank
            places = _places_of_linear(self._loaded.model)
            self._matrices = [AdaptedMatrix(m, places[id(m)], next(n for n in names if n in m.lora_A)) for m in linear]
            self._allocate()
        self._link()
        return is_new

    def use_one_group(self) -> None:
        """From now on a pass has one group, as modules that get a part of the tokens do not say whose these are."""
        self.num_groups = 1
        self._rank = self._fitting_rank()
        self._allocate()
        self._link()

    def _fitting_rank(self) -> int:
        """The least rank that holds those of all, and that products of several groups take."""
        return aligned(self._largest_rank, self._dtype) if self._is_grouped else self._largest_rank

    @property
    def _is_grouped(self) -> bool:
        return max(self.num_slots, self.num_groups) > 1

    @property
    def by_group(self) -> bool:
        """Whether products are made group by group: the host must know where groups end, as in no captured pass."""
        return self._is_grouped and not may_group(self._dtype, self._loaded.device)

    @property
    def _is_copied(self) -> bool:
        """Whether products are with copies: not where one adapter's own parameters can be multiplied with.

        They are for captured passes, which masks that are made again come with: the next adapter's lie elsewhere.
        """
        return self.num_groups != 1 or self._dtype != torch.float32 or self.remakes_masks or self._is_uneven

    def _allocate(self) -> None:
        """Make the tensors that hold all weights and gradients: one for each device, of which matrices have parts."""
        self.gradients = []
        for device in {matrix.device for matrix in self._matrices}:
            matrices = [matrix for matrix in self._matrices if matrix.device == device]
            sizes = [math.prod(shape) for matrix in matrices for shape in matrix.shapes(self._rank)]
            gradients = torch.zeros(self.num_groups * sum(sizes), device=device)
            self.gradients.append(gradients)
            parts = gradients.split([self.num_groups * size for size in sizes])
            for i, matrix in enumerate(matrices):
                a, b = matrix.shapes(self._rank)
                matrix.a_gradient, matrix.b_gradient = parts[2 * i].view(-1, *a), parts[2 * i + 1].view(-1, *b)
            if self._is_copied:
                weights = torch.zeros(self.num_slots * sum(sizes), dtype=self._dtype, device=device)
                parts = weights.split([self.num_slots * size for size in sizes])
                for i, matrix in enumerate(matrices):
                    a, b = matrix.shapes(self._rank)
                    matrix.a, matrix.b = parts[2 * i].view(-1, *a), parts[2 * i + 1].view(-1, *b)

    def _link(self) -> None:
        """Find each adapter's parameters, and their place among the weights of all."""
        places: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        self._scalings = []
        for matrix in self._matrices:
            for slot, name in enumerate(self._names):
                pair = _parameters(matrix.module, name) if name is not None else None
                if not self._is_copied:
                    assert pair is not None
                    matrix.a, matrix.b = (p.detach()[None] for p in pair)
                    continue
                rank = pair[0].shape[0] if pair is not None else 0
                matrix.a[slot, rank:], matrix.b[slot, :, rank:] = 0, 0
                if pair is not None:
                    places += [matrix.a[slot, :rank], matrix.b[slot, :, :rank]]
                    sources += [p.detach() for p in pair]
                    self._scalings += [1.0, self._scaling_in_copy(matrix.module, name)]
        if all(scaling == 1 for scaling in self._scalings):
            self._scalings = []
        self._copies = places, sources

    def _scaling_in_copy(self, module: Any, name: str | None) -> float:
        """What a copy of B is multiplied with: without gradients the scaling, as rows have none; with them the share of
        it that is the module's own, as where ranks differ."""
        scaling = float(module.scaling[name])
        return scaling / self._scaling_of(name) if self.num_groups else scaling

    def _scaling_of(self, name: str | None) -> float:
        """The scaling of an adapter's rows: that of its first module."""
        return next(float(m.module.scaling[name]) for m in self._matrices if name in m.module.lora_A)

    def begin(self) -> None:
        """Take over the adapters' parameters as they are now; all gradients are zero."""
        if self._copies[0]:
            torch._foreach_copy_(*self._copies)
        if self._scalings:
            torch._foreach_mul_(self._copies[0], self._scalings)
        for gradients in self.gradients:
            gradients.zero_()

    def publish(self, name: str, group: int) -> None:
        """Put an adapter's gradient of a group into its parameters' ``grad``, as views of the gradients here."""
        for matrix in self._matrices:
            pair = _parameters(matrix.module, name)
            if pair is None or not matrix.has_gradient:
                continue
            r = pair[0].shape[0]
            # Contiguous, as torch's fused optimizers need it: a copy only where ranks differ.
            pair[0].grad = matrix.a_gradient[group, :r]
            pair[1].grad = matrix.b_gradient[group, :, :r].contiguous()
            if self._is_uneven and (share := self._scaling_in_copy(matrix.module, name)) != 1:
                pair[1].grad = pair[1].grad * share  # of B itself, from that of the copy, which is ``share`` times B

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the adapted modules run this class's forward pass."""
        for matrix in self._matrices:
            matrix.module.forward = functools.partial(self._forward, matrix)
        modules = [matrix.module for matrix in self._matrices]
        try:
            yield
        finally:
            for module in modules:
                del module.forward
            self._copies = [], []  # ``hold`` finds them again: adapters that are detached are not kept alive

    def rows_of(self, spans: Sequence[Span], num_tokens: int) -> PassRows:
        """What a pass of ``num_tokens`` holds, with padding, on the host.

        Args:
            spans: its examples; those of an adapter are side by side, in the order of the slots, and within it those of
                a group. Tokens between them, which are padding, belong to the next; those behind all, to the last.
        """
        hashes = torch.zeros(num_tokens, dtype=torch.int32)
        thresholds, scales = torch.zeros_like(hashes), torch.zeros(num_tokens)
        adapter_ends, group_ends = (torch.zeros(n, dtype=torch.int32) for n in (self.num_slots, self.num_groups))
        slices: list[tuple[int, int, int]] = []
        settings = [self._settings(name) for name in self._names]
        for span in spans:
            hashes[span.start : span.stop] = token_hashes(span.stop - span.start, span.seed)
            thresholds[span.start : span.stop], scales[span.start : span.stop] = settings[span.slot]
            is_last = span is spans[-1]
            stop = num_tokens if is_last else span.stop
            adapter_ends[span.slot :] = stop
            group_ends[span.group :] = stop
            threshold = settings[span.slot][0]
            if slices and slices[-1][2] == threshold:
                slices[-1] = (slices[-1][0], stop, threshold)
            else:
                slices.append((slices[-1][1] if slices else 0, stop, threshold))
        drops = any(threshold for threshold, _ in settings)
        kept_slices = None if self.remakes_masks else tuple(slices)
        return PassRows(hashes, thresholds, scales, adapter_ends, group_ends, drops, kept_slices, self.by_group)

    def _settings(self, name: str | None) -> tuple[int, float]:
        """An adapter's dropout, as a threshold, and the scale of its rows. Of a free slot neither."""
        for matrix in self._matrices if self.num_groups else ():
            if name in matrix.module.lora_A:
                threshold = threshold_of(getattr(matrix.module.lora_dropout[name], "p", 0.0))
                return threshold, matrix.module.scaling[name] / (1 - threshold / 2**16)
        return 0, 1.0  # its modules compute for themselves

    @property
    def forward_names(self) -> str:
        """Whose forward pass the adapted modules run: ``raylora`` (this class's), ``peft``, or ``raylora,peft``."""
        others = self._num_others or self._gets_parts
        return ",".join(filter(None, ["raylora" if self._matrices else "", "peft" if others else ""]))

    def expect(self, rows: PassRows) -> None:
        """Say what the next forward pass holds; ``rows`` are on the device."""
        self._rows, self._rows_on = rows, {}

    def _forward(self, matrix: AdaptedMatrix, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows, module = self._rows, matrix.module
        assert rows is not None
        if x.numel() != len(rows.hashes) * x.shape[-1]:
            # An expert gets a part of the tokens and does not say which: PEFT's own forward pass, for one adapter only.
            if self.num_slots > 1:
                text = "--target-modules: experts' adapters cannot share a pass"
                raise UserError(text, kind=ErrorKind.TARGET_MODULES)
            if self.num_groups > 1:
                raise PartialInputError
            self.is_whole, self._gets_parts = False, True
            output: torch.Tensor = type(module).forward(module, x, *args, **kwargs)
            return output
        if x.device not in self._rows_on:
            self._rows_on[x.device] = rows.on(x.device)
        if self.num_groups == 0:
            return self._add_to_base(matrix, x, *args, **kwargs)
        layer = frozen_layer(module.base_layer)
        base = module.base_layer(x, *args, **kwargs) if layer is None else None
        product: torch.Tensor = AdaptedProduct.apply(x, base, self._anchor, layer, matrix, self._rows_on[x.device])
        return product.view(*x.shape[:-1], product.shape[-1])

    def _add_to_base(self, matrix: AdaptedMatrix, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The product of the base's own forward pass, to which the adapters' are added in place."""
        output: torch.Tensor = matrix.module.base_layer(x, *args, **kwargs)
        flat = x.reshape(-1, x.shape[-1]).to(matrix.a.dtype)
        with torch.autocast(x.device.type, enabled=False):
            add_adapters(output.view(-1, output.shape[-1]), flat, matrix, self._rows_on[x.device])
        return output


def _parameters(module: Any, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter] | None:
    """A (r, in) and B (out, r) of an adapter in a linear module; None where it has none."""
    return (module.lora_A[name].weight, module.lora_B[name].weight) if name in module.lora_A else None
