"""What the command for one dataset says of a file that it cannot take at all."""

from __future__ import annotations

import os

import pytest

from raylora.commands.run_command import call_command
from raylora.errors import UserError


def test_a_pipe_is_wrong_use(tmp_path, tiny_model_folder):
    """The only dataset that was asked for: no row of errors stands beside good ones, as it would in a chunk."""
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    words = [str(pipe), "--model", str(tiny_model_folder), "--output", str(tmp_path / "results")]
    with pytest.raises(UserError, match="a pipe or a device, which cannot be read twice: write its content into a"):
        call_command("experiment", words)
    assert not (tmp_path / "results").exists()
