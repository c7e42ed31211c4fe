"""Seconds that a GPU takes for passes through a base with LoRA adapters: a small model with few measured constants.

    seconds of a pass = products / (their share of the matrix rate) + bytes moved / (bandwidth of the memory)
    or, where Python launches each kernel, what the launches take, if that is longer

*Moves* are the reads and writes outside the products: norms, rotary embeddings, SwiGLU, dropout, additions, copies. One
move is of all numbers at the inputs and outputs of the layers' matrices. All constants come from one H200 with
Llama-3-8B's shape (785 TFLOP/s measured, 4.8 TB/s by its datasheet); benchmarks/NOTES.md has the derivation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raylora.model.graphs import fixed_size
from raylora.planning.hardware import Hardware, Kernels
from raylora.planning.shape import BYTES_A_WEIGHT, LLM_INT8, Shape

PRODUCTS_SHARE = 0.93
"""Share of the rate of an 8192-cubed product that the base's products reach: 298 ms of 320, in a pass of 8,166."""
FP8_RATE = 2.0
"""Rate of products in fp8 over that in bfloat16, by the datasheet of Hopper. Not measured."""
LLM_INT8_MOVES = 55.0
"""What LLM.int8 moves more, forward alone as well as forward and backward: it scored 9,600 tokens a second where
bfloat16 scored 22,600. It looks for outliers in the whole batch, and multiplies odd shapes."""
STEP_SECONDS = 0.07
"""What a step takes beside its passes where they are not graphs: 0.47 s a step, 0.398 of it the pass. The optimizer's
launches, tensors that are sent, and numbers that Python waits for."""
OPTIMIZER_BYTES = 40
"""Bytes of a parameter that a step reads and writes: AdamW's own 28, 12 of clipping and of the gradient's zeros."""
FORWARD_LAUNCHES = 0.5
"""Share of a pass's launches that are those of its forward half. Assumed, not measured."""


@dataclass(frozen=True)
class Costs:
    """What passes take beside the base's products, by the kernels that they are run with."""

    trained: float
    """Moves, forward and backward, dropout left out."""
    dropout: float
    """Moves of dropout, forward and backward."""
    read: float
    """Moves of a forward pass alone, without dropout."""
    launches: float
    """Seconds that Python takes to launch a layer's kernels, forward and backward, dropout left out."""
    dropout_launches: float
    """The same for dropout alone."""


COSTS: dict[Kernels, Costs] = {
    # 899 ms a pass of 8,166 tokens and 398 of 2,048, 85 of them for dropout (3,400 to 4,000 tokens a second with it,
    # 4,900 without), whose operations took 60 to 90 of the 227 ms that the GPU was busy; scoring at share 0.41.
    "torch": Costs(trained=32, dropout=33, read=22, launches=9.7e-3, dropout_launches=2.7e-3),
    # 163 ms a graph of 2,048 and 619 of 8,166, of which dropout 8 and 31; 283 ms to launch.
    "triton": Costs(trained=30, dropout=4, read=22, launches=8.5e-3, dropout_launches=0.3e-3),
    # 133 and 515 ms; 314 to launch. A batch of 16,384 was scored in 399 ms, which is 4.6 moves; the 36,000 tokens a
    # second that a whole evaluation is to reach are 7.4.
    "liger": Costs(trained=18, dropout=4, read=6, launches=9.5e-3, dropout_launches=0.3e-3),
}


def is_graphed(machine: Hardware, storage: str) -> bool:
    """Whether passes are captured as CUDA graphs. LLM.int8 waits for the GPU in each product: it cannot be captured."""
    return machine.kernels != "torch" and storage != LLM_INT8


def pass_seconds(
    shape: Shape,
    machine: Hardware,
    storage: str,
    num_tokens: float,
    *,
    backward: bool,
    dropout: bool = False,
    graphed: bool = False,
) -> float:
    """Seconds of one pass over ``num_tokens`` positions.

    Args:
        storage: of the base's weights: ``none``, ``8bit``, ``4bit``, ``fp8``, or ``LLM_INT8``.
        backward: whether it has a backward pass. That takes as many products as the forward pass, not twice as many,
            as the base's weights have no gradient.
        graphed: it is the replay of a CUDA graph.
    """
    assert machine.rate is not None
    assert machine.bandwidth is not None
    costs, directions = COSTS[machine.kernels], 2 if backward else 1
    rate = machine.rate * (FP8_RATE if storage == "fp8" else 1)
    weights = shape.layer_weights + shape.used_expert_weights
    products = directions * 2 * weights * num_tokens / (PRODUCTS_SHARE * rate)
    moves = (costs.trained if backward else costs.read) + (costs.dropout if dropout else 0)
    moves += LLM_INT8_MOVES if storage == LLM_INT8 else 0
    moved = moves * shape.widths * machine.dtype_bytes * num_tokens
    moved += directions * (weight_traffic(shape, machine, storage) + shape.expert_weights * machine.dtype_bytes)
    busy = products + moved / machine.bandwidth
    if graphed:
        return busy
    launches = costs.launches + (costs.dropout_launches if dropout else 0)
    return max(busy, shape.num_layers * launches * (1 if backward else FORWARD_LAUNCHES))


def weight_traffic(shape: Shape, machine: Hardware, storage: str) -> float:
    """Bytes of the layers' weights that the forward or the backward half of a pass moves.

    Quantized ones are read, written as floats, and read again for the product; fp8 is multiplied as it is stored.
    """
    floats = shape.layer_weights * machine.dtype_bytes
    if storage == "none":
        return floats
    if storage == "fp8":
        return shape.layer_weights
    return shape.layer_weights * BYTES_A_WEIGHT[storage] + 2 * floats


def run_seconds(
    shape: Shape,
    machine: Hardware,
    storage: str,
    num_tokens: float,
    tokens_a_pass: int,
    *,
    backward: bool,
    dropout: bool = False,
    graphed: bool = False,
    again: bool = False,
) -> float:
    """Seconds of ``num_tokens`` positions in passes of ``tokens_a_pass`` at most.

    Args:
        again: with gradient checkpointing, which runs the forward pass twice.
    """
    if not num_tokens:
        return 0.0
    num_passes = math.ceil(num_tokens / tokens_a_pass)
    positions = num_tokens / num_passes
    if graphed:
        positions = fixed_size(math.ceil(positions))
    seconds = pass_seconds(shape, machine, storage, positions, backward=backward, dropout=dropout, graphed=graphed)
    return num_passes * seconds * (1.5 if again else 1)
