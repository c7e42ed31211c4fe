"""What a machine can do, asked before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from raylora.config import load_config
from raylora.errors import UserError
from raylora.planning.hardware import check_fp8_here


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_fp8_is_refused_here_without_a_gpu_and_left_to_a_clusters_machines():
    with pytest.raises(UserError, match="--quantization fp8: needs a GPU that multiplies fp8") as raised:
        check_fp8_here(load_config([], quantization="fp8"))
    assert "\n" not in str(raised.value)
    check_fp8_here(load_config([], quantization="fp8", address="auto"))
    for quantization in ("none", "8bit", "4bit"):
        check_fp8_here(load_config([], quantization=quantization))
