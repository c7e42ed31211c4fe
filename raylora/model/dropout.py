"""Dropout as a hash of the example's seed, the module, and the token's and the feature's index.

So it does not depend on how a step is cut into minibatches, on gradient checkpointing, on the device, or on adapters
trained beside it, and need not be kept for the backward pass. On a CPU torch's dropout of 1024 tokens takes 3.9 ms, as
long as a 576 x 576 product, and each layer of SmolLM2-135M has 7 of them; the hash takes 0.4 ms (benchmarks/NOTES.md).
It has 16 bits a number.
"""

from __future__ import annotations

import functools
import math

import torch

from raylora.model.kernels import scramble, signed, spread_numbers

_64_BITS = 2**64 - 1


def mix(*numbers: int) -> int:
    """A 64-bit hash of numbers, by the finalizer of SplitMix64 (Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _64_BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _64_BITS
        state ^= state >> 31
    return state


def token_hashes(num_tokens: int, seed: int) -> torch.Tensor:
    """int32 (num_tokens,): a hash of each token of an example whose 64-bit ``seed`` is given."""
    return scramble(spread_numbers(num_tokens) + signed(seed >> 32))


@functools.cache
def column_hashes(width: int, device: torch.device) -> torch.Tensor:
    """int32 (width / 2 rounded up,): a hash for every two columns of a module's input."""
    return scramble(spread_numbers(math.ceil(width / 2))).to(device)


def module_hash(index: int) -> int:
    """A hash of a module, as a signed int32, by its place among the linear ones of the model."""
    return signed(mix(index))


def threshold_of(dropout: float) -> int:
    """Of 65,536 values of a number's hash, how many drop the number."""
    return round(dropout * 2**16)
