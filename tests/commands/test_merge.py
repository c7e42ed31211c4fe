"""``raylora merge``: exit codes, where the model goes, one line for mistakes; a kill leaves nothing half."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from transformers import AutoModelForCausalLM

from raylora.commands.run_command import call_command
from raylora.errors import UserError

PROGRAM = "from raylora.commands.run_command import program; program()"


def test_an_experiment_s_adapter_becomes_a_model_of_its_name(adapter_folder, tmp_path, empty_folder, capsys):
    experiment = tmp_path / "results" / "dolly-0123"
    shutil.copytree(adapter_folder, experiment / "adapter")
    assert call_command("merge", [str(experiment)]) == 0
    assert "results/merged/dolly-0123" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained("results/merged/dolly-0123")


def test_the_model_of_the_environment_is_not_the_base(adapter_folder, empty_folder, monkeypatch):
    monkeypatch.setenv("MODEL_NAME", "org/of-another-run")
    assert call_command("merge", [str(adapter_folder), "--output", "merged"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "no adapter_config.json"),
        (["s3://bucket/adapter"], "copy it first"),
        ([], "FOLDER"),
    ],
)
def test_mistakes_are_one_line(empty_folder, words, says):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "merge", *words], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_output_that_cannot_be_made_is_one_line(adapter_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output"):
        call_command("merge", [str(adapter_folder), "--output", str(tmp_path / "file" / "merged")])


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_leaves_no_half_model(adapter_folder, tmp_path, kill):
    """It is killed while it writes, as soon as there is anything on the disk."""
    slow = (
        "import pathlib, time, transformers\n"
        "write = transformers.PreTrainedModel.save_pretrained\n"
        "def save(self, folder, **options):\n"
        "    write(self, folder, **options)\n"
        f"    pathlib.Path({str(tmp_path / 'written')!r}).touch()\n"
        "    time.sleep(60)\n"
        "transformers.PreTrainedModel.save_pretrained = save\n" + PROGRAM
    )
    words = ["merge", str(adapter_folder), "--output", str(tmp_path / "out" / "merged")]
    process = subprocess.Popen([sys.executable, "-c", slow, *words], stderr=subprocess.PIPE, env=os.environ)
    while not (tmp_path / "written").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(kill)
    process.communicate(timeout=60)
    assert process.returncode == (143 if kill == signal.SIGTERM else -kill)
    assert not (tmp_path / "out" / "merged").exists()
    assert bool(list((tmp_path / "out").iterdir())) == (kill == signal.SIGKILL)
    assert call_command("merge", words[1:]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]
