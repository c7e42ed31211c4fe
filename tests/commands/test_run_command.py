"""What every command does with a mistake and with Ctrl-C."""

from __future__ import annotations

import subprocess
import sys

import pytest

from raylora.commands.run_command import run_command
from raylora.errors import MachineError, RemoteError, UserError

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_wrong_use_exits_with_2_and_no_traceback():
    result = subprocess.run(
        [sys.executable, "-m", "raylora.batch", "--chunk", "x"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("raylora: --data-root")
    assert result.stderr.count("\n") == 1


def test_a_mistake_does_not_wait_for_torch():
    """Nor does --help: what takes seconds to import comes after the options."""
    code = "import sys, raylora.batch; sys.exit(' '.join({'torch', 'transformers', 'ray'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    "error", [UserError("a.json: empty"), MachineError("a.json: empty"), RemoteError("a.json", "empty")]
)
def test_what_is_wrong_is_one_line_whoever_is_to_blame(capsys, error):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main, [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "raylora: a.json: empty\n"


def test_ctrl_c_before_anything_runs_is_one_line(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_command(main, [])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "Stopped.\n"
