"""What comes from users and models runs nothing, leaves its folder nowhere, and tells no secret."""

from __future__ import annotations

import contextlib
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
