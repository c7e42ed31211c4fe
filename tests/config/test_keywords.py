"""The options as types hold the same options as their classes."""

from __future__ import annotations

import typing

import pytest
from pydantic import BaseModel, TypeAdapter

from raylora.config import keywords
from raylora.config.method import Method
from raylora.config.options import MmluOptions, ModelOptions
from raylora.config.run import CommonOptions, Config, EvaluationConfig


@pytest.mark.parametrize(
    ("types", "options", "left_out"),
    [
        (keywords.CommonKeywords, CommonOptions, set()),
        (keywords.ModelKeywords, ModelOptions, {"model"}),
        (keywords.QuestionKeywords, MmluOptions, {"mmlu", "max_samples"}),
        (keywords.EvaluationKeywords, EvaluationConfig, {"model", "mmlu", "max_samples"}),
        (keywords.MethodKeywords, Method, set()),
        (keywords.RunKeywords, Config, {"chunk", "max_samples", "dry_run"}),
        (keywords.FolderKeywords, Config, {"chunk", "dry_run"}),
        (keywords.ConfigKeywords, Config, set()),
    ],
)
def test_every_option_has_a_type(types, options: type[BaseModel], left_out):
    assert set(typing.get_type_hints(types)) == {*options.model_fields} - left_out


def test_the_types_take_each_options_default_and_its_choices():
    defaults = {name: field.get_default(call_default_factory=True) for name, field in Config.model_fields.items()}
    hints = typing.get_type_hints(keywords.ConfigKeywords)
    for name, field in Config.model_fields.items():
        TypeAdapter(hints[name]).validate_python(defaults[name])
        if typing.get_origin(field.annotation) is typing.Literal:
            assert hints[name] == field.annotation, name
        may_be_none = type(None) in typing.get_args(field.annotation)
        assert (type(None) in typing.get_args(hints[name])) == may_be_none, name
