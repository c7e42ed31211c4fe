"""EVA (Paischer et al. 2024): A begins as the directions in which a dataset's own activations vary most.

PEFT finds them in forward passes over the base, and gives layers whose activations vary in more directions more of the
ranks, as many in all. It keeps each layer's scaling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from raylora.config.method import Method
from raylora.data.encoding import IGNORE_INDEX, EncodedExample, TrainOn, labels_of
from raylora.errors import ErrorKind, UserError, one_line
from raylora.model.memory import CPU_TOKEN_BUDGET

RHO = 2.0
"""A layer gets at most so many times the rank; the default of EVA and of PEFT."""
MOST_BATCHES = 64
"""Of a dataset; they are gone through again until the directions have settled."""
MOST_PASSES = 2000
"""PEFT itself would go on for ever where they do not."""


def begin_with_directions(
    peft: Any, name: str, examples: Sequence[EncodedExample], method: Method, pad: int, dtype: torch.dtype
) -> None:
    """Make the initial values of an attached adapter, the only one.

    Args:
        peft: PEFT's wrapper around the model.
        examples: of the dataset, in the order of the training's seed.
        pad: the padding's token.
        dtype: of products on a GPU.

    Raises:
        UserError: the dataset has fewer supervised tokens than directions are asked for, or they do not settle.
    """
    from peft import EvaConfig, initialize_lora_eva_weights
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import cast_adapter_dtype

    config = peft.peft_config[name]
    most = max([config.r, *config.rank_pattern.values()])
    width = min(m.in_features for m in peft.modules() if isinstance(m, LoraLayer))
    config.eva_config = EvaConfig(rho=min(RHO, width / most))
    batches = list(_batches(examples, method.train_on, round(RHO * most), pad))
    if not batches:
        raise _refusal(f"the dataset has fewer than {round(RHO * most)} supervised tokens: lower --lora-r")
    num_passes = 0

    def run(model: Any, batch: dict[str, torch.Tensor]) -> None:
        nonlocal num_passes
        num_passes += 1
        if num_passes > MOST_PASSES:
            raise _refusal(f"the directions have not settled after {MOST_PASSES} batches of the dataset")
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    try:
        with torch.autocast("cuda", dtype, enabled=peft.device.type == "cuda"):
            initialize_lora_eva_weights(peft, batches, forward_fn=run, adapter_name=name, show_progress_bar=False)
    except (ValueError, IndexError, KeyError, AttributeError) as error:  # of layers that get a part of the tokens
        raise _refusal(f"this model's layers are not ones that PEFT finds directions for: {one_line(error)}") from error
    finally:
        for module in peft.modules():  # PEFT leaves its hooks where it fails
            for key, hook in list(module._forward_hooks.items()):
                if type(hook).__module__ == "peft.tuners.lora.eva":
                    del module._forward_hooks[key]
    cast_adapter_dtype(peft, name)  # matrices of other ranks are new, in the base's dtype


def _batches(
    examples: Sequence[EncodedExample], train_on: TrainOn, num_needed: int, pad: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches (B, T) of padded examples, of ``CPU_TOKEN_BUDGET`` tokens and ``num_needed`` supervised ones or more."""
    rows: list[tuple[list[int], list[int]]] = []
    num_tokens = num_supervised = num_batches = 0
    for example in examples:
        labels = labels_of(example, train_on)
        rows.append((list(example.input_ids), list(labels)))
        num_tokens += len(labels)
        num_supervised += sum(label != IGNORE_INDEX for label in labels)
        if num_tokens >= CPU_TOKEN_BUDGET and num_supervised >= num_needed:
            yield _padded(rows, pad)
            rows, num_tokens, num_supervised, num_batches = [], 0, 0, num_batches + 1
            if num_batches == MOST_BATCHES:
                return
    if num_supervised >= num_needed:
        yield _padded(rows, pad)


def _padded(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows)
    columns = {"input_ids": pad, "attention_mask": 0, "labels": IGNORE_INDEX}
    batch = {name: torch.full((len(rows), width), filling) for name, filling in columns.items()}
    for i, (ids, labels) in enumerate(rows):
        parts = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
        for name, numbers in parts.items():
            batch[name][i, : len(ids)] = torch.tensor(numbers, dtype=torch.long)
    return batch


def _refusal(text: str) -> UserError:
    return UserError(f"--init eva: {text}", kind=ErrorKind.ADAPTER)
