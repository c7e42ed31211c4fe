"""A chat template that loops or swells is one line, before it can take the command with it."""

from __future__ import annotations

import json
import time

import pytest

from raylora.commands.run_command import call_command
from raylora.data import template_process
from raylora.data.chat import render_chat
from raylora.data.template_process import CONVERSATIONS, check_template, template_failure
from raylora.errors import TemplateLimitError, UserError
from raylora.records import Example, Message
from tests.helpers.chunks import write_dataset
from tests.helpers.templates import TEMPLATES
from tests.helpers.tiny import save_model

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}" + "{% endfor %}" * 3
SWELLS = "{% set n = namespace(x='a') %}{% for i in range(25) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
ASKED = "{% if messages[0]['content'] == 'now' %}"
EXAMPLE = Example((Message("user", "x"),), "y", "x")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (LOOPS, "does not end within"),
        ("{{ 'x' * 10**10 }}", "takes more than 2 GiB of memory"),
        ("{{ '%10000000000d' % 1 }}", "takes more than 2 GiB of memory"),
        (SWELLS, "makes far longer texts"),
        ("{{ raise_exception('no') }}", ""),
        ("{{ 1 / 0 }}", ""),
    ],
)
def test_limits(tokenizer, monkeypatch, template, says):
    monkeypatch.setattr(template_process, "SECONDS", 1.0)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    found = template_failure(tokenizer, CONVERSATIONS[:1])
    assert says in found if says else found == ""


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_models_are_within_them(tokenizer, monkeypatch, name):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[name])
    check_template(tokenizer, "m")


def test_it_costs_little(tokenizer):
    check_template(tokenizer, "m")
    started = time.perf_counter()
    check_template(tokenizer, "m")
    assert time.perf_counter() - started < 0.3


def test_a_rendered_text_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", SWELLS)
    with pytest.raises(TemplateLimitError, match=r"makes 33,554,432 characters of a conversation of 1"):
        render_chat(tokenizer, EXAMPLE.messages, False)


@pytest.mark.slow
@pytest.mark.parametrize("template", [LOOPS, "{{ 'x' * 10**10 }}"])
def test_the_command_ends_in_one_line(tmp_path, monkeypatch, template):
    monkeypatch.setattr(template_process, "SECONDS", 2.0)
    model = save_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    write_dataset(tmp_path / "data" / "chunk_1", "a")
    options = ["--model", str(model), "--quantization", "none", "--output", str(tmp_path / "out")]
    data = ["--chunk", "chunk_1", "--data-root", str(tmp_path / "data"), "--mmlu", "demo", "--dry-run"]
    for words in (["batch", *data, *options], ["mmlu", "--questions", "demo", "--prompt-style", "chat", *options]):
        with pytest.raises(UserError, match=r"^--model .*: its chat template (does not end|takes more)"):
            call_command(words[0], words[1:])


@pytest.mark.slow
def test_a_dataset_that_sets_it_off_costs_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(template_process, "SECONDS", 2.0)
    model = save_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(f"{ASKED}{LOOPS}{{% endif %}}{TEMPLATES['chatml']}")
    chunk = tmp_path / "data" / "chunk_1"
    write_dataset(chunk, "good")
    (chunk / "bad.json").write_text(json.dumps([{"question": "now", "answer": "x"}]))
    options = ["--model", str(model), "--quantization", "none", "--output", str(tmp_path / "out"), "--mmlu", "demo"]
    assert call_command("batch", ["--chunk", "chunk_1", "--data-root", str(chunk.parent), *options, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "does not end" in shown
    assert "good" in shown
