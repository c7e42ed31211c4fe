"""The card of an adapter on the hub: ``README.md``, its front matter for the hub, the rest for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from raylora import __version__
from raylora.config.method import Method
from raylora.config.options import MmluOptions, ModelOptions
from raylora.model.sources import HubModel
from raylora.records import ResultRow
from raylora.report.harness_results import FURTHER_SET
from raylora.texts import shown_line, without_secrets

OF_ASKING = [name for name in (*ModelOptions.model_fields, *MmluOptions.model_fields) if name != "model"]


def card_of(row: ResultRow, base: HubModel | None, base_name: str, base_hash: str) -> str:
    """The card's text.

    Args:
        base: the base on the hub; None where it is not known to be there.
        base_name: what it is called otherwise.
        base_hash: of its files, or of its name and commit.
    """
    v = row.values
    front: dict[str, Any] = {"base_model": base.name, "base_model_relation": "adapter"} if base else {}
    front |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["raylora", "lora"]}
    revision = f"revision `{base.revision}`" if base and base.revision else f"files' SHA-256 `{base_hash}`"
    lines = [
        f"# {_code(v['dataset'])}",
        "",
        f"A LoRA adapter of {_code(base.name if base else base_name)} ({revision}), trained on one dataset by "
        f"raylora {__version__}.",
        "",
        *_change_lines(v),
        "",
        "| what | value |",
        "| --- | --- |",
        f"| dataset | {_code(v['dataset'])} |",
        f"| SHA-256 of its file | {_code(v.get('data_hash'))} |",
        f"| examples | {v.get('num_examples')} |",
        f"| seed | {v.get('seed')} |",
        f"| raylora | {__version__} |",
        *(f"| {name} | {_code(v[name])} |" for name in _settings(v)),
        "",
    ]
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return "\n".join(["---", text.rstrip(), "---", "", *lines])


def _settings(values: dict[str, Any]) -> list[str]:
    """The names of the row's settings: of the training, of the model, of the questions."""
    names = [*Method.model_fields, *OF_ASKING]
    return [name for name in dict.fromkeys(names) if name != "seed" and values.get(name) not in (None, "")]


def _change_lines(values: dict[str, Any]) -> list[str]:
    """What the training did to each set of questions; a line where none was asked."""
    if values.get("accuracy_change") is None:
        return ["What it does to MMLU was not measured."]
    names = [match[1] for key in values if (match := FURTHER_SET.fullmatch(key)) and values[key] is not None]
    table = [_set_line(values, "MMLU, or what was asked in its place", "")]
    table += [_set_line(values, name, f"[{name}]") for name in names]
    header = ["| questions | number | base | adapter | change | 95% interval | p (McNemar) |"]
    return [*header, "| --- | --- | --- | --- | --- | --- | --- |", *table]


def _set_line(values: dict[str, Any], name: str, suffix: str) -> str:
    def of(column: str) -> Any:
        return values.get(f"{column}{suffix}")

    def number(column: str, form: str) -> str:
        return "not known" if of(column) is None else format(of(column), form)

    cells = [
        name,
        number("total_questions", "d"),
        number("base_overall_accuracy", ".4f"),
        number("overall_accuracy", ".4f"),
        number("accuracy_change", "+.4f"),
        f"{number('accuracy_change_low', '+.4f')} to {number('accuracy_change_high', '+.4f')}",
        number("mcnemar_p_value", ".3g"),
    ]
    return f"| {' | '.join(cells)} |"


def _code(value: Any) -> str:
    """A value in backticks, with nothing in it that ends a cell, the code or the line."""
    text = shown_line(" ".join(str(value).split())).replace("`", "'").replace("|", "/")
    return f"`{text}`"


def shared_config(path: Path, base: HubModel | None, base_name: str) -> bytes:
    """``adapter_config.json`` for others: the base by its name on the hub, or without the folders of this machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base.name if base else without_secrets(base_name)
    return json.dumps(config, indent=2, ensure_ascii=False).encode("utf-8")
