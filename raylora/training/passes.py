"""Passes of a number of adapters, and the gradients and losses that they add to."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from raylora.model.adapter_products import AdapterProducts
from raylora.model.adapters import LoadedModel
from raylora.model.forward import token_losses
from raylora.model.graphs import Capture, GraphedPasses
from raylora.training.pass_inputs import PassInputs


class Passes:
    """Runs passes for a number of adapters; they add to gradients, and to the losses (G,) of groups, in float64."""

    def __init__(self, loaded: LoadedModel, num_slots: int, num_groups: int, capture: Capture | None) -> None:
        products = AdapterProducts(loaded, num_slots, num_groups)
        products.remakes_masks |= capture is not None  # a capture keeps no mask that is as long as its pass
        losses = torch.zeros(num_groups, dtype=torch.float64, device=loaded.device)
        # Of what they use alone, without ``self``: a cycle would keep gigabytes until Python looks for cycles.
        run = functools.partial(_run, loaded, products, losses)
        self.graphed = GraphedPasses(run, capture, lambda: [*products.gradients, losses])
        self.products, self.losses = products, losses

    def hold(self, names: Sequence[str]) -> None:
        """See ``AdapterProducts.hold``."""
        if self.products.hold(names):
            self.graphed.forget()

    def use_one_group(self) -> None:
        """See ``AdapterProducts.use_one_group``."""
        self.products.use_one_group()
        self.graphed.forget()

    def begin(self) -> None:
        """Begin a step: no gradient, no loss."""
        self.products.begin()
        self.losses.zero_()


def _run(loaded: LoadedModel, products: AdapterProducts, sums: torch.Tensor, inputs: PassInputs) -> None:
    """Run a pass that is on the device; its losses are added to ``sums``, those of groups."""
    products.expect(inputs.rows)
    with loaded.autocast():
        losses = token_losses(loaded, inputs.batch)
    losses = losses * inputs.weights.to(losses.device)
    losses.sum().backward()
    sums.index_add_(0, inputs.groups, losses.detach().to(sums.device, torch.float64))
