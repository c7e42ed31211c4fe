"""Model folders that cannot be loaded."""

from __future__ import annotations

import shutil

import pytest
import torch

from raylora.errors import UserError
from tests.helpers.tiny import load


def test_a_damaged_model_folder_is_one_line(tmp_path, tiny_model_folder):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder, "none")
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle files"):
        load(folder, "none")
