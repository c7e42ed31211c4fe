"""A model as it was before PEFT wrapped it, to be put back afterwards.

PEFT's own ``unload`` takes the wrappers off, but leaves what some adapters change in the base: biases that were
trained; modules that were trained whole (``modules_to_save``), which stay in the originals' places and untie an output
head; weights that initial values were taken out of (PiSSA, OLoRA). Measured in benchmarks/NOTES.md.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any

import torch

_REGISTRIES = (
    "_modules",
    "_parameters",
    "_buffers",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""The attributes in which a torch module keeps what it consists of."""


class Snapshot:
    """What ``model`` consists of now: its modules, its parameters and their contents, its hooks, its configuration.

    Contents are referred to, not copied, so a snapshot takes next to no memory: PEFT puts new tensors in the place of
    weights that it changes.

    Args:
        changed_in_place: names of parameters whose numbers will be overwritten; only these are copied, to the CPU.
    """

    def __init__(self, model: Any, changed_in_place: Container[str] = ()) -> None:
        self._model = model
        # Where accelerate keeps weights on the CPU or a disk, PEFT has it move them anew: only the modules are kept.
        moves = not {"cpu", "disk"}.isdisjoint((getattr(model, "hf_device_map", None) or {}).values())
        parameters = {} if moves else dict(model.named_parameters())
        self._registries = [
            (module, {name: dict(getattr(module, name)) for name in (_REGISTRIES[:1] if moves else _REGISTRIES)})
            for module in model.modules()
        ]
        self._contents = [(p, p.data) for p in parameters.values()]
        self._copies = [
            (p, p.detach().to("cpu", copy=True)) for name, p in parameters.items() if name in changed_in_place
        ]
        self._config = copy.deepcopy(vars(model.config))

    def restore(self) -> None:
        """Put the model back: the very modules and parameters that it had, with the numbers that they had."""
        for module, registries in self._registries:
            for name, entries in registries.items():
                registry = getattr(module, name)
                registry.clear()
                registry.update(entries)
        for parameter, content in self._contents:
            if parameter.data_ptr() != content.data_ptr():
                parameter.data = content
            parameter.requires_grad_(False)
        with torch.no_grad():
            for parameter, numbers in self._copies:
                parameter.copy_(numbers)
        vars(self._model.config).clear()
        vars(self._model.config).update(copy.deepcopy(self._config))
        vars(self._model).pop("peft_config", None)
