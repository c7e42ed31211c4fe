"""What transformers has loaded, held against the model: no weight is missing, and all are finite numbers.

``from_pretrained`` fills a weight that the files lack with random numbers, other ones in each process, and only logs a
warning. A layer of NaN answers every question with the same letter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from raylora.errors import ErrorKind, UserError, errors_are
from raylora.model.model_files import folder_of, weight_files


@errors_are(ErrorKind.MODEL)
def check_loaded(model: Any, info: Mapping[str, Any], name: str | None, source: str) -> None:
    """Check a model that ``from_pretrained`` has just made.

    Args:
        info: what it returned with ``output_loading_info=True``.
        name: what the user calls the model.
        source: where it was read from.

    Raises:
        UserError: its files lack weights, have some of other shapes, or hold numbers that are not finite.
    """
    for names, what in (
        (missing_weights(model, info["missing_keys"]), "its files lack {} weights"),
        (sorted(str(key) for key, *_ in info["mismatched_keys"]), "{} weights of its files have other shapes"),
        (sorted(_without_scales(model)), "its files lack the scales of {} quantized weights"),
        (_not_finite(model, source), "{} of its weights are not finite numbers"),
    ):
        if names:
            raise UserError(
                f"--model {name}: cannot be loaded: {what.format(len(names))}, the first {names[0]}: get it again"
            )


def missing_weights(model: Any, missing_keys: Any) -> list[str]:
    """Those of the missing keys that are parameters of their own: no buffers, and tied to none that was loaded.

    Buffers are computed when a model is made, and not all checkpoints have them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for key, parameter in parameters.items() if key not in missing_keys}
    return sorted(key for key in missing_keys if key in parameters and id(parameters[key]) not in loaded)


def _without_scales(model: Any) -> Iterator[str]:
    """Names of 4-bit weights whose scales are still quantized, and what they were quantized with is not there."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.absmax.dtype == torch.uint8 and not state.nested:
            yield f"{name}.weight.nested_absmax"


def _not_finite(model: Any, source: str) -> list[str]:
    """Names of weights with a number that is NaN or infinite, sorted.

    What a matrix was before it was quantized is no longer in the model: of such a model the files are looked at.
    """
    # By type and device: those that accelerate has put onto a disk are on the meta device, which has no numbers.
    parameters = dict(model.named_parameters())
    read = [p.is_floating_point() and p.device.type != "meta" for p in parameters.values()]
    found = [name for name, p in parameters.items() if p.device.type != "meta" and not is_finite(p)]
    if not found and not all(read) and (folder := folder_of(source)) is not None:
        found = [name for path in weight_files(folder) for name, t in tensors_of(path) if not is_finite(t)]
    return sorted(found)


def tensors_of(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file, one at a time; none where it cannot be read, which loading it has said."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError):
        return


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite; integers always are.

    The sum says so, at the speed of the memory (19 GB/s on one core, where ``isfinite`` reads 0.7). It may overflow
    in half precision, and then the numbers are looked at.
    """
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # fp8 has no sum
        tensor = tensor.to(torch.float32)
    return bool(tensor.detach().sum().isfinite()) or bool(tensor.detach().isfinite().all())
