"""All commands: nothing heavy for --help and mistakes, exit codes, signals; the program, its completion and schema."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tomllib

import jsonschema
import pytest
import yaml

from raylora.commands.run_command import COMMANDS, PROGRAM, call_command, program, run_command
from raylora.config.run import Config, load_config
from raylora.console import make_console
from raylora.errors import MachineError, RemoteError, StoppedError, UserError
from raylora.run.interrupts import Interrupts, exit_on_sigterm
from tests.helpers import ROOT
from tests.helpers.chunks import write_dataset
from tests.helpers.docs_commands import RUN

HEAVY = ("torch", "transformers", "ray", "sklearn", "pandas")
GIVEN = {"experiment": ["FILE"], "predict": ["fit", "TABLE"], "report": ["FOLDER"]}
"""What a command cannot do without."""


def run_python(code: str, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def run_and_list_modules(name: str, *argv: str) -> tuple[int, str, list[str]]:
    """``python -m raylora.NAME``: its exit code, what it printed on either stream, the heavy modules it imported."""
    code = (
        "import runpy, sys\n"
        "name = sys.argv.pop(1)\n"
        "try:\n"
        "    runpy.run_module(f'raylora.{name}', run_name='__main__', alter_sys=True)\n"
        "finally:\n"
        f"    print('\\nHEAVY', *({{*{HEAVY}}} & {{*sys.modules}}))\n"
    )
    done = run_python(code, name, *argv)
    shown, _, modules = done.stdout.rpartition("\nHEAVY")
    return done.returncode, shown + done.stderr, modules.split()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_mistakes_wait_for_nothing_heavy(name):
    code, shown, modules = run_and_list_modules(name, "--help")
    assert (code, modules) == (0, [])
    assert f"usage: python -m raylora.{name}" in shown
    code, shown, modules = run_and_list_modules(name, *GIVEN.get(name, []), "--no-such-option", "1")
    assert (code, modules) == (2, [])
    assert shown.strip() == "raylora: unknown option --no-such-option: see --help for what there is"


@pytest.mark.parametrize(
    ("name", "argv", "expected"),
    [
        ("batch", ["--lora-r", "0"], "--lora-r: input should be greater than or equal to 1, got '0'"),
        ("features", ["--sample_size", "x"], "--sample-size: input should be a valid integer"),
        ("mmlu", ["--scoring", "guess"], "--scoring: input should be 'letters', 'cloze' or 'generate'"),
        ("predict", ["fit", "s3://a/b"], "TABLE: only what lies on this machine is read here"),
        ("report", ["x", "--price", "-1"], "--price: input should be greater than or equal to 0"),
        ("experiment", [], "the following arguments are required: FILE (see python -m raylora.experiment --help)"),
    ],
)
def test_a_wrong_value_waits_for_nothing_heavy(name, argv, expected):
    code, shown, modules = run_and_list_modules(name, *argv)
    assert (code, modules) == (2, [])
    assert shown.strip().startswith(f"raylora: {expected}")
    assert len(shown.strip().splitlines()) == 1


def settings_of(name, argv, monkeypatch):
    """What a command would be called with."""
    seen = []
    monkeypatch.setattr("raylora.commands.run_command._work", lambda command, config: seen.append(config) or 0)
    with pytest.raises(SystemExit) as stop:
        run_command(name, argv)
    assert stop.value.code == 0
    return seen[0]


def test_every_way_to_write_an_option_that_there_ever_was(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("num_epochs: 2\nmax-length: 64\n")
    features = settings_of("features", ["--data_dir=d", "--model_path", "m_x", "--no_fresh", "--dry_run"], monkeypatch)
    assert (str(features.data_folder), features.model, features.fresh, features.dry_run) == ("d", "m_x", False, True)
    features = settings_of("features", ["--data-folder", "d", "--model-path=m", "--config=a.yaml"], monkeypatch)
    assert (str(features.data_folder), features.model, features.num_epochs, features.max_length) == ("d", "m", 2, 64)
    given = ["--adapter", "A", "B", "--questions=q_1", "--adapter", "C", "--question-seed", "1"]
    mmlu = settings_of("mmlu", given, monkeypatch)
    assert [str(path) for path in mmlu.adapter] == ["A", "B", "C"]
    assert (mmlu.question_sets, mmlu.question_seed) == ({"": "q_1"}, 1)
    for argv in (["F", "--lora_r", "2", "--config", "a.yaml"], ["--config", "a.yaml", "--lora-r", "2", "F"]):
        one = settings_of("experiment", argv, monkeypatch)
        assert (str(one.file), one.lora_r, one.num_epochs) == ("F", 2, 2)
    guess = settings_of("predict", ["predict", "P", "--output", "o.csv", "T"], monkeypatch)
    assert [str(path) for path in (guess.predictor, guess.table, guess.output)] == ["P", "T", "o.csv"]
    batch = settings_of("batch", ["--target_modules", "q_proj, v_proj", "--no_dry_run", "--salvage"], monkeypatch)
    assert (batch.target_modules, batch.dry_run, batch.salvage) == (("q_proj", "v_proj"), False, True)


# How a command ends


def test_wrong_use_exits_with_2_and_no_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "raylora.batch", "--chunk", "x"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("raylora: --data-root")
    assert result.stderr.count("\n") == 1


def test_ctrl_c_before_anything_runs_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("raylora.config.sources.OptionParser.parse", interrupted)
    with pytest.raises(SystemExit) as stop:
        run_command("batch", [])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "Stopped.\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (StoppedError("Ray broke down."), 1, "Ray broke down. What is finished is kept: the same command without"),
        (KeyboardInterrupt(), 130, "Stopped. What is finished is kept: the same command without --fresh resumes from"),
        (UserError("a.json: empty"), 2, "raylora: a.json: empty"),
        (MachineError("a.json: gone"), 2, "raylora: a.json: gone"),
        (RemoteError("s3://a", "no"), 2, "raylora: s3://a: no"),
        (BrokenPipeError(), 1, ""),
        (None, 0, ""),
    ],
)
def test_what_ends_a_command_is_one_line_and_an_exit_code(error, code, line, monkeypatch, capsys):
    def work(config):
        assert signal.getsignal(signal.SIGTERM) != before
        if error is not None:
            raise error
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("raylora.commands.batch.run", work)
    with pytest.raises(SystemExit) as stop:
        run_command("batch", ["--fresh"])
    assert stop.value.code == code
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert len(shown.splitlines()) == bool(line)
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_where_nothing_is_kept_says_no_more(monkeypatch, capsys):
    def work(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("raylora.commands.report.run", work)
    with pytest.raises(SystemExit) as stop:
        run_command("report", ["folder"])
    assert (stop.value.code, capsys.readouterr().err) == (130, "Stopped.\n")


def test_sigterm_ends_in_order_and_the_former_handlers_come_back():
    former = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as stop, exit_on_sigterm(), Interrupts(make_console(quiet=True)):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == former


def test_a_thread_may_run_without_handling_signals():
    former, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with exit_on_sigterm(), Interrupts(make_console(quiet=True)):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [former]


@pytest.mark.slow
def test_process_folder_leaves_signal_handlers_as_it_found_them(options, tmp_path):
    """In a process of its own: Ray, too, puts handlers there as it starts."""
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    more = {**options, "stages": "features", "probe_steps": 0, "num_workers": 1}
    code = (
        "import json, signal, sys\n"
        "from raylora import process_folder\n"
        "def mine(*_): ...\n"
        "numbers = signal.SIGTERM, signal.SIGINT\n"
        "for number in numbers: signal.signal(number, mine)\n"
        "(result,) = process_folder('chunk_1', **json.loads(sys.argv[1]))\n"
        "assert result['status'] == 'ok', result\n"
        "assert [signal.getsignal(number) for number in numbers] == [mine, mine]\n"
    )
    done = run_python(code, json.dumps(more, default=str))
    assert done.returncode == 0, done.stderr


# The program


def test_the_program_has_every_command(capsys):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"raylora": f"{program.__module__}:{program.__name__}"}
    with pytest.raises(SystemExit) as stop:
        program(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    {name}" in shown for name in PROGRAM.commands)
    with pytest.raises(SystemExit) as stop:
        program(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("raylora ")
    with pytest.raises(SystemExit) as stop:
        program(["mmlu", "--no-such-option"])
    assert stop.value.code == 2
    assert "unknown option --no-such-option" in capsys.readouterr().err


def printed(command: str, capsys) -> str:
    """What a documented command of the program prints into its file."""
    words = shlex.split(command)
    assert words[-2] == ">"
    with pytest.raises(SystemExit) as stop:
        program(words[1:-2])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_bash_completes_commands_options_and_files(capsys, tmp_path):
    bash, zsh, _ = RUN["the program"]
    script = tmp_path / "raylora"
    script.write_text(printed(bash, capsys))
    (tmp_path / "run.yaml").touch()

    def completions(*words: str) -> list[str]:
        line = f"source {script}; COMP_WORDS=({shlex.join(['raylora', *words])}); COMP_CWORD={len(words)}; "
        code = line + "_shtab_raylora 2>/dev/null; echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        return done.stdout.split()

    assert completions("ba") == ["batch"]
    assert completions("mmlu", "--questions") == ["--questions"]
    assert completions("predict", "ex") == ["explain"]
    assert completions("batch", "--config", "run") == ["run.yaml"]
    assert not [word for word in completions("batch", "--") if "_" in word]
    assert printed(zsh, capsys).startswith("#compdef raylora")


def test_the_schema_knows_shipped_yaml_files_and_refuses_what_the_command_refuses(capsys):
    schema = json.loads(printed(RUN["the program"][2], capsys))
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    assert schema["properties"].keys() == Config.model_fields.keys()
    for file in (ROOT / "configs").glob("*.yaml"):
        check.validate(yaml.safe_load(file.read_text()))
    good = {"output": "s3://a/b", "chunk": 1, "stages": "train,mmlu", "trackers": ["mlflow"], "grid": {"lora_r": [1]}}
    check.validate(good)
    assert load_config(**good).stages == ("train", "mmlu")
    for bad in ({"lora_rr": 1}, {"lora_r": 0}, {"quantization": "3bit"}, {"stages": ["eat"]}, {"output": 3}):
        assert not check.is_valid(bad), bad


@pytest.mark.parametrize("command", ["mmlu", "experiment", "batch", "features", "merge"])
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", {"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
        ("config.json", b"\xff\xfe", "config.json: cannot be read: not UTF-8"),
        ("generation_config.json", b"[1]", "is no JSON object"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../a.safetensors"}}', "outside of the model's folder"),
        ("config.json", {"attn_implementation": "org/kernel"}, "names the kernel org/kernel"),
    ],
)
def test_every_command_refuses_such_a_model_in_one_line(
    command, name, content, says, tiny_model_folder, adapter_folder, question_file, tmp_path
):
    """Before anything is built: a skeleton of so many layers would take hours."""
    model = shutil.copytree(tiny_model_folder, tmp_path / "model")
    before = json.loads((model / name).read_text()) if isinstance(content, dict) else {}
    (model / name).write_bytes(json.dumps({**before, **content}).encode() if isinstance(content, dict) else content)
    dataset = write_dataset(tmp_path / "data" / "chunk_1", "data")
    arguments = {
        "mmlu": ["--questions", question_file],
        "experiment": [dataset, "--questions", question_file, "--dry-run"],
        "batch": ["--data-root", tmp_path / "data", "--chunk", "chunk_1", "--questions", question_file, "--dry-run"],
        "features": ["--data-folder", tmp_path / "data" / "chunk_1", "--dry-run"],
        "merge": [adapter_folder],
    }[command]
    more = [] if command == "merge" else ["--quantization", "none"]
    with pytest.raises(UserError, match=re.escape(says)) as raised:
        call_command(command, [*map(str, arguments), *more, "--model", str(model), "--output", str(tmp_path / "out")])
    assert "\n" not in str(raised.value)
