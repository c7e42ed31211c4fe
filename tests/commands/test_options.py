"""Every option of every command can be set from every source, and as text."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from raylora.commands.run_command import PROGRAM, Command, Group
from raylora.config.sources import POSITIONAL, Settings, load_settings

pytestmark = pytest.mark.usefixtures("empty_folder")
CANDIDATES = ("some/place", "2", "0.5", "4", "100", "accuracy_change", "results/a", '{"cpu": "1GiB"}')
"""Tried of an option without a list of its values."""
GIVEN = {
    "grid": '{"lora_r": [8, 4], "target_modules": ["all-linear", "q_proj,v_proj"]}',
    "target_modules": "q_proj,v_proj",
    "modules_to_save": "lm_head,norm",
    "rank_pattern": "q_proj=4,layers.0.mlp.up_proj=2",
    "alpha_pattern": "q_proj=0.5,v_proj=8",
    "leave_out": "semantic,text",
    "questions": "arc=a.json,b=b.json",
    "adapter": "a/b,c",
    "columns": "question=q,answer=a",
    "template_date": "2025-01-02",
    "dataset": "hf://datasets/org/name@v1/en:test,some/file.json",
    "quantization": "8bit",  # int8_activations asks for it
}


def settings_classes(group: Group) -> Iterator[type[Settings]]:
    for part in group.commands.values():
        yield from [part.settings] if isinstance(part, Command) else settings_classes(part)


CLASSES = [c for c in dict.fromkeys(settings_classes(PROGRAM)) if c.model_fields]


def fitting_text(name: str, option: FieldInfo) -> str:
    """A value of an option as text, made from the option's type, and not its default."""
    if name in GIVEN:
        return GIVEN[name]
    kinds = [option.annotation, *typing.get_args(option.annotation)]
    words = [w for kind in kinds if typing.get_origin(kind) is typing.Literal for w in typing.get_args(kind)]
    if words:
        is_list = typing.get_origin(option.annotation) is tuple
        return ",".join(words[:2]) if is_list else str(next(w for w in words if w != option.default))
    return "true" if bool in kinds else next(text for text in CANDIDATES if is_value(option, text))


def is_value(option: FieldInfo, text: str) -> bool:
    try:
        return TypeAdapter(typing.Annotated[option.annotation, option]).validate_python(text) != option.default
    except ValidationError:
        return False


def read_from(source: str, settings: type[Settings], texts: Mapping[str, Any], monkeypatch) -> dict[str, Any]:
    """The options' values, all of them set in one source, but for positional ones outside of Python."""
    positional = [name for name, option in settings.model_fields.items() if POSITIONAL in option.metadata]
    argv = [texts[name] for name in positional]
    others = {name: text for name, text in texts.items() if name not in positional}
    variables = {f"RAYLORA_{n.upper()}": t for n, t in others.items() if n not in settings.not_from_environment}
    if source == "Python":
        return load_settings(settings, None, "raylora", **texts).model_dump()
    if source == "command line":
        flags = [f"--{name.replace('_', '-')}" for name, text in others.items() if text == "true"]
        named = {n: t for n, t in others.items() if t != "true"}
        words = [word for name, text in named.items() for word in (f"--{name.replace('_', '-')}", text)]
        argv += [*flags, *words]
    elif source.startswith("YAML"):
        Path("a.yaml").write_text(yaml.safe_dump(others))
        argv += ["--config", "a.yaml"]
    elif source == ".env":
        Path(".env").write_text("".join(f"{name}='{text}'\n" for name, text in variables.items()))
    with monkeypatch.context() as environment:
        for name, text in variables.items() if source == "environment" else ():
            environment.setenv(name, text)
        found = load_settings(settings, argv, "raylora").model_dump()
    return found


SOURCES = ("command line", "environment", ".env", "YAML", "Python")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("settings", CLASSES, ids=lambda settings: settings.__name__)
def test_every_option_can_be_set_as_text_from_every_source(settings, source, monkeypatch):
    texts = {name: fitting_text(name, option) for name, option in settings.model_fields.items()}
    expected = read_from("command line", settings, texts, monkeypatch)
    same = {n for n, v in expected.items() if v == settings.model_fields[n].default} - {"quantization"}
    assert not same, "the values that are tried are not the defaults"
    if source in {"environment", ".env"}:
        expected |= {name: settings.model_fields[name].default for name in settings.not_from_environment}
    assert read_from(source, settings, texts, monkeypatch) == expected
    if source == "YAML":  # and as YAML itself writes numbers, lists and mappings
        assert read_from(source, settings, {n: _as_yaml(text) for n, text in texts.items()}, monkeypatch) == expected


def _as_yaml(text: str) -> Any:
    value = yaml.safe_load(text)
    return text.split(",") if isinstance(value, str) and "," in text else value
