"""What comes from users and models runs nothing, leaves its folder nowhere, and tells no secret."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylora.commands.run_command import call_command
from raylora.config.options import ModelOptions
from raylora.data.chat import render_chat
from raylora.errors import UserError
from raylora.model.loading import load_model, load_tokenizer
from raylora.records import Message
from raylora.storage.store import safe_name
from tests.helpers.chunks import write_dataset
from tests.helpers.tiny import make_model, save_model

HOSTILE = [
    "..",
    "../x",
    "/etc/passwd",
    "a\nb",
    "a" * 300,
    "раypal",
    "paypal",
    "a/b",
    "a\\b",
    "\x00",
    "con",
    "~",
    "-rf",
    "é",
    "e\u0301",
]


@given(st.text(max_size=400))
def test_a_name_is_one_short_plain_component(name):
    safe = safe_name(name)
    assert safe == Path(safe).name
    assert safe not in {".", ".."}
    assert safe.isascii()
    assert len(safe) <= 80
    assert not set(safe) & set('/\\\0\n:*?"<>|')


def test_names_that_look_alike_do_not_collide():
    names = {safe_name(name) for name in HOSTILE}
    assert len(names) == len(HOSTILE)


@pytest.mark.slow
@pytest.mark.ci
def test_hostile_file_names_stay_in_the_output_folder(tiny_model_folder, tmp_path):
    chunk = tmp_path / "data" / "chunk_1"
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("a\nb", "x" * 240, "раypal", "paypal", "..hidden", "a b;rm -rf", "--flag"):
        write_dataset(chunk, name)
    (chunk / "linked.json").symlink_to(chunk / "paypal.json")
    output = tmp_path / "out"
    before = {p for p in tmp_path.rglob("*") if output not in p.parents and p != output}
    code = call_command(
        "batch",
        ["--chunk", "chunk_1", "--data-root", str(chunk.parent), "--output", str(output),
         "--model", str(tiny_model_folder), "--quantization", "none", "--stages", "features",
         "--probe-steps", "0", "--sample-size", "4"]
    )  # fmt: skip
    assert code == 0
    assert {p for p in tmp_path.rglob("*") if output not in p.parents and p != output} == before
    folders = list((output / "chunk_1" / "experiments").iterdir())
    assert len(folders) == 7  # ..hidden begins with a dot: it is no dataset


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch {flag}') }}",
        "{% for x in ().__class__.__base__.__subclasses__() %}{{ x('touch {flag}') }}{% endfor %}",
    ],
)
def test_a_hostile_chat_template_runs_nothing(tmp_path, template):
    flag = tmp_path / "flag"
    folder = save_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template.replace("{flag}", str(flag)))
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = template.replace("{flag}", str(flag))
    with pytest.raises(UserError, match="chat template"):
        render_chat(tokenizer, [Message("user", "x")], True)
    assert not flag.exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    flag = tmp_path / "flag"
    folder = save_model(tmp_path / "model")
    code = f"from pathlib import Path\nPath({str(flag)!r}).touch()\nfrom transformers import LlamaForCausalLM as Evil\n"
    (folder / "evil.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as raised:
        load_model(ModelOptions(model=str(folder), quantization="none"))
    assert "\n" not in str(raised.value)
    assert not flag.exists()


def test_pickled_weights_are_refused(tmp_path):
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickle files, which can run code: .*--allow-pickle"):
        load_model(ModelOptions(model=str(folder), quantization="none"))
    torch.save(make_model().state_dict(), folder / "pytorch_model.bin")
    assert load_model(ModelOptions(model=str(folder), quantization="none", allow_pickle=True)).logits_hash()


def test_a_tokenizers_own_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_model(tmp_path / "model")
    flag = tmp_path / "flag"
    (folder / "evil.py").write_text(f"open({str(flag)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(UserError):
        load_tokenizer(str(folder))
    assert not flag.exists()
    with contextlib.suppress(UserError):
        load_tokenizer(str(folder), trust_remote_code=True)
    assert flag.exists(), "nobody would have run it: the test shows nothing"


@pytest.mark.slow
@pytest.mark.ci
def test_secrets_are_in_no_file(tiny_model_folder, tmp_path):
    chunk = tmp_path / "data" / "chunk_1"
    write_dataset(chunk, "data")
    secret = "hf_" + "s3cr3t" * 5
    result = subprocess.run(
        [sys.executable, "-m", "raylora.batch", "--chunk", "chunk_1", "--data-root", str(chunk.parent), "--output",
         str(tmp_path / "out"), "--model", str(tiny_model_folder), "--quantization", "none", "--stages", "features",
         "--probe-steps", "0", "--sample-size", "4"],
        env={**os.environ, "HF_TOKEN": secret, "HUGGING_FACE_HUB_TOKEN": secret, "AWS_SECRET_ACCESS_KEY": secret},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert secret not in result.stdout + result.stderr
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) > 5
    assert not [p for p in files if secret.encode() in p.read_bytes()]


PASSWORD, HUB_TOKEN, SIGNED = "hunter2pass", "hf_" + "aBc9" * 9, "c0ffeec0ffee"


def secret_leaks(result: subprocess.CompletedProcess[str], *folders: Path) -> list[str]:
    """Where one of the secrets is found: on the terminal, or in a file."""
    places = {"stdout": result.stdout.encode(), "stderr": result.stderr.encode()}
    places |= {str(p): p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file()}
    secrets = [s.encode() for s in (PASSWORD, HUB_TOKEN, SIGNED)]
    return [f"{place}: {s.decode()}" for place, content in places.items() for s in secrets if s in content]


def run_with_secrets(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, "HF_TOKEN": HUB_TOKEN, "WANDB_API_KEY": SIGNED, **variables}, cwd=folder,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--model", f"https://user:{PASSWORD}@host/model"],
        ["--model", f"https://{HUB_TOKEN}@host/model"],
        ["--model", "demo", "--mmlu", f"s3://user:{PASSWORD}@bucket/questions.json"],
        ["--model", "demo", "--mmlu", f"s3://bucket/questions.json?X-Amz-Signature={SIGNED}"],
        ["--model", "demo", "--data-root", f"s3://user:{PASSWORD}@bucket/data"],
        ["--model", "demo", "--output", f"s3://bucket/x?AWSAccessKeyId=1&Signature={SIGNED}"],
        ["--model", "demo", "--dataset", f"hf://datasets/org/name@{HUB_TOKEN}"],
        ["--model", "demo", "--address", f"user:{PASSWORD}@host:6379"],
        ["--learning-rate", f"https://user:{PASSWORD}@host"],
        [f"--password=https://user:{PASSWORD}@host"],
        ["--config", f"https://user:{PASSWORD}@host"],
    ],
)
def test_a_secret_in_an_option_is_not_shown(tmp_path, options):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    more = [] if "--data-root" in options else ["--data-root", "data"]
    result = run_with_secrets(["raylora.batch", "--chunk", "chunk_1", *more, *options], tmp_path)
    assert result.returncode in {1, 2}, result.stderr
    assert secret_leaks(result, tmp_path) == []
    name = options[0].strip("-").replace("-", "_")
    if len(options) == 2 and name not in {"config", "learning_rate"}:
        (tmp_path / "x.yaml").write_text(json.dumps({name: options[1]}))
        result = run_with_secrets(["raylora.batch", "--chunk", "chunk_1", *more, "--config", "x.yaml"], tmp_path)
        (tmp_path / "x.yaml").unlink()
        assert result.returncode == 2
        assert secret_leaks(result, tmp_path) == []
        variable = {f"RAYLORA_{name.upper()}": options[1]}
        result = run_with_secrets(["raylora.batch", "--chunk", "chunk_1", *more], tmp_path, **variable)
        assert result.returncode == 2
        assert secret_leaks(result, tmp_path) == []


@pytest.mark.slow
def test_a_whole_run_tells_no_secret(tiny_model_folder, tmp_path):
    chunk = tmp_path / "data" / "chunk_1"
    write_dataset(chunk, "data\n2026-01-01 INFO forged\x1b[2J")
    (chunk / "bad.json").write_text("[{}")
    write_dataset(chunk, "=cmd|' -C calc'!A0")
    folder = tmp_path / "run"
    folder.mkdir()
    options = ["--chunk", "chunk_1", "--data-root", str(chunk.parent), "--output", "out", "--model",
               str(tiny_model_folder), "--quantization", "none", "--mmlu", "demo", "--max-samples", "4", "--num-epochs",
               "1", "--probe-steps", "0", "--sample-size", "4", "--trackers", "mlflow", "--max-length",
               "64"]  # fmt: skip
    tracking = {
        "MLFLOW_TRACKING_URI": f"http://user:{PASSWORD}@127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    for more in (["--dry-run"], []):
        result = run_with_secrets(["raylora.batch", *options, *more], folder, **tracking)
        assert result.returncode == (0 if more else 1), result.stdout + result.stderr
        assert secret_leaks(result, folder) == []
        lines = (result.stdout + result.stderr).splitlines()
        assert not [line for line in lines if line.startswith("2026-01-01") or "\x1b" in line]
    assert "mlflow gets no more rows" in result.stdout
    for log in folder.rglob("log.txt"):
        assert not [line for line in log.read_text().splitlines() if line.startswith("2026-01-01 INFO")]
    rows = list(csv.DictReader((folder / "out" / "chunk_1" / "results.csv").open(newline="")))
    assert len(rows) == 3
    assert "'=cmd|' -C calc'!A0" in [row["dataset"] for row in rows]
