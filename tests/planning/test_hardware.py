"""What a machine computes with: rates that are measured, and the kernels that a GPU has."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from raylora.config.run import load_config
from raylora.errors import UserError
from raylora.planning import hardware

HERE = torch.device("cpu")


def test_rates_are_those_of_what_was_run():
    one, three = (hardware.matrix_rate(HERE, torch.float32, 512, num_products=n) for n in (1, 3))
    assert 1e9 < one < 1e14
    assert 0.2 < three / one < 5, "a rate, whatever the number of products"
    assert 1e8 < hardware.copy_bandwidth(HERE, 2**24) < 1e13


def test_kernels_are_those_that_card_and_packages_have():
    best = "torch" if not find_spec("triton") else "liger" if find_spec("liger_kernel") else "triton"
    assert hardware.kernels_for((9, 0), torch.bfloat16) == best
    assert hardware.kernels_for((8, 0), torch.float16) == best
    assert hardware.kernels_for((7, 5), torch.float16) == "torch", "flash attention begins with Ampere"
    assert hardware.kernels_for((9, 0), torch.float32) == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_fp8_is_refused_here_without_a_gpu_and_left_to_a_clusters_machines():
    with pytest.raises(UserError, match="--quantization fp8: needs a GPU that multiplies fp8") as raised:
        hardware.check_fp8_here(load_config([], quantization="fp8"))
    assert "\n" not in str(raised.value)
    hardware.check_fp8_here(load_config([], quantization="fp8", address="auto"))
    for quantization in ("none", "8bit", "4bit"):
        hardware.check_fp8_here(load_config([], quantization=quantization))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_measures_itself():
    dtype_bytes, memory, rate, bandwidth, kernels = json.loads(hardware.measure_gpu())
    assert dtype_bytes == 2
    assert memory == min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    assert 1e12 < rate < 1e16
    assert 1e10 < bandwidth < 2e13
    assert kernels in {"torch", "triton", "liger"}
