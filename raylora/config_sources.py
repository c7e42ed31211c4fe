"""Where options come from: a YAML file, the environment, ``.env`` and the command line, in rising order of strength."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from raylora.errors import UserError, without_secrets

POSITIONAL = get_args(CliPositionalArg)[1]
"""Marks an option that has no name on the command line, but a place."""


def split_commas(value: Any) -> Any:
    """``a,b`` as ``("a", "b")``, and JSON, which is how ``CliApp.serialize`` writes a tuple."""
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        return tuple(json.loads(value))
    return tuple(part.strip() for part in value.split(",") if part.strip())


class _Environment(EnvSettingsSource):
    """The variables that are ours; ``MODEL_NAME`` is another name for ``RAYLORA_MODEL``."""

    def __call__(self) -> dict[str, Any]:
        own = {*self.settings_cls.model_fields} - self.settings_cls.not_from_environment  # type: ignore[attr-defined]
        values = {name: value for name, value in super().__call__().items() if name in own}
        if "model" in own and (model := self.env_vars.get("model_name")):
            values.setdefault("model", model)
        return values


class _DotEnv(_Environment, DotEnvSettingsSource):
    """``.env``, which may hold settings of other programs too."""


SETTINGS = SettingsConfigDict(
    env_prefix="RAYLORA_",
    env_file=".env",
    extra="forbid",
    frozen=True,
    defer_build=True,  # 25 ms a class, of which a command uses one
    cli_kebab_case=True,
    cli_implicit_flags=True,
    cli_hide_none_type=True,
    cli_avoid_json=True,
)


class Settings(BaseSettings):
    """Where options come from."""

    model_config = SETTINGS
    not_from_environment: ClassVar[frozenset[str]] = frozenset()
    """Options that are another thing than those of the same name that all commands share."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Strongest first: arguments, ``.env``, the environment. Command line and YAML are put around them."""
        return init_settings, _DotEnv(settings_cls), _Environment(settings_cls)

    def settings_of(self, *groups: type[BaseModel]) -> dict[str, Any]:
        """The options of these groups as plain JSON values."""
        dump = self.model_dump(mode="json")
        return {name: dump[name] for group in groups for name in group.model_fields}


FILES = {"bash": "_shtab_compgen_files", "zsh": "_files"}
"""What shtab's completion calls where a file is meant."""
S = TypeVar("S", bound=Settings)


class OptionParser(argparse.ArgumentParser):
    """A parser whose errors are ``UserError``, and whose options are those of settings."""

    def __init__(self, **options: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"allow_abbrev": False, "formatter_class": form, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")

    def add_options(self, settings: type[Settings]) -> None:
        """Every field of ``settings``, and ``--config``; what is parsed goes to ``settings_from_command``."""
        source = CliSettingsSource[Any](settings, root_parser=self, add_argument_method=_add_option)
        _add_option(
            self, "--config", type=Path, metavar="FILE", help="YAML file of these options, such as configs/demo.yaml"
        )
        self.set_defaults(_source=source)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """What is on the command line, by the options' names.

        Raises:
            UserError: there is no such option, or it lacks its value.
            SystemExit: 0, after ``--help``.
        """
        given, unknown = self.parse_known_args(argv)
        if unknown:
            word = unknown[0].partition("=")[0]
            near = closest_option(given._source.settings_cls, word.lstrip("-").replace("-", "_"))
            raise UserError(f"unknown option {unknown[0]}: {near}")
        return vars(given)


def _add_option(parser: argparse.ArgumentParser, *names: str, **how: Any) -> None:
    """An option with its name in dashes, which help shows, and in underscores; a list takes values until the next."""
    is_place = how.get("metavar") in {"Path", "FILE"} or not names[0].startswith("-")
    if how.get("nargs") == "*" and names[0].startswith("-"):
        how |= {"action": "extend", "nargs": "+"}
    option = parser.add_argument(*names, **how)
    if is_place:
        setattr(option, "complete", FILES)  # noqa: B010 (an attribute that only shtab knows)
    hidden = {**how, "help": argparse.SUPPRESS}
    for name in option.option_strings:
        if "-" in name[2:]:
            if how.get("action") is argparse.BooleanOptionalAction:
                hidden["action"] = "store_false" if name.startswith("--no-") else "store_true"
            parser.add_argument("--" + name[2:].replace("-", "_"), **hidden)


def load_settings(settings: type[S], argv: list[str] | None, prog: str, **overrides: Any) -> S:
    """The options of a command: YAML, environment, ``.env``, and ``argv`` (or ``overrides`` from Python).

    Raises:
        UserError: one line that names the option and what fits.
        SystemExit: 0, after ``--help``.
    """
    given: Mapping[str, Any] = {}
    if argv is not None:
        parser = OptionParser(prog=prog, description=settings.__doc__)
        parser.add_options(settings)
        given = parser.parse(argv)
    return settings_from_command(settings, given, **overrides)


def settings_from_command(settings: type[S], given: Mapping[str, Any], **overrides: Any) -> S:
    """The options of a command whose command line was parsed: ``given`` is what ``OptionParser.parse`` returned.

    Raises:
        UserError: one line that names the option and what fits.
    """
    words = {name: value for name, value in given.items() if name in settings.model_fields}
    yaml_path: Path | None = given.get("config")
    yaml_values = _read_yaml(yaml_path) if yaml_path else {}
    variables = _read_variables(settings)

    class _Command(settings):  # type: ignore[valid-type, misc]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *args: Any, **kwargs: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            stronger = super().settings_customise_sources(settings_cls, *args, **kwargs)
            strongest = [given["_source"](parsed_args=words)] if given else []
            return (*strongest, *stronger, _YamlValues(settings_cls, yaml_values))

    try:
        values = _Command(**overrides).model_dump()
    except ValidationError as error:
        place = _place_of(error, words, variables, yaml_path, yaml_values)
        raise UserError(_explain(settings, error, place)) from None
    except SettingsError as error:
        raise UserError(_explain_settings_error(settings, error)) from None
    return settings.model_construct(**values)


class _YamlValues(YamlConfigSettingsSource):
    """Values of a YAML file that was read already."""

    def __init__(self, settings_cls: type[BaseSettings], values: dict[str, Any]) -> None:
        PydanticBaseSettingsSource.__init__(self, settings_cls)
        self._values = values

    def __call__(self) -> dict[str, Any]:
        return self._values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise UserError(f"--config {path}:{place} not YAML: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected `option: value` lines, found a {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _read_variables(settings: type[Settings]) -> Mapping[str, Collection[str]]:
    """The variables of ``.env`` and of the environment, in small letters, by where they stand; the strongest first.

    Raises:
        UserError: ``.env`` cannot be read, or a name is nearly one of ours: it would change nothing, silently.
    """
    try:
        dotenv = _DotEnv(settings).env_vars
    except UnicodeDecodeError as error:
        raise UserError(f".env: not UTF-8 at byte {error.start}") from None
    variables = {".env": dotenv, "the environment": _Environment(settings).env_vars}
    for place, names in variables.items():
        _check_names(place, names, settings)
    return variables


def _check_names(place: str, variables: Collection[str], settings: type[Settings]) -> None:
    """Variables with our prefix that are no options at all belong to another command, or to somebody else."""
    known = {*settings.model_fields, *_every_option()}
    for variable in variables:
        name = variable.removeprefix("raylora_")
        if name != variable and name not in known and (close := difflib.get_close_matches(name, known, 1, 0.8)):
            raise UserError(f"{variable.upper()} in {place}: no option; did you mean RAYLORA_{close[0].upper()}?")


def _every_option() -> set[str]:
    """The options of all commands that are imported: the batch command's are among them always."""
    classes = [Settings]
    for settings in classes:
        classes += settings.__subclasses__()
    return {name for settings in classes for name in settings.model_fields}


def closest_option(settings: type[Settings], name: str) -> str:
    close = difflib.get_close_matches(name, settings.model_fields, n=1)
    return f"did you mean {close[0]}?" if close else "see --help for what there is"


def _place_of(
    error: ValidationError,
    words: Mapping[str, Any],
    variables: Mapping[str, Collection[str]],
    yaml_path: Path | None,
    yaml_values: Mapping[str, Any],
) -> str:
    """Where the value that does not fit stands, in the order of what is stronger; nothing for the command line."""
    name = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else ""
    if name in words:
        return ""
    given = [place for place, names in variables.items() if f"raylora_{name}" in names]
    return given[0] if given else str(yaml_path) if name in yaml_values else ""


def _explain(settings: type[Settings], error: ValidationError, place: str) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "configuration"
    if first["type"] == "extra_forbidden":
        return f"unknown option {name}{f' in {place}' if place else ''}: {closest_option(settings, name)}"
    if place:
        shown = f"{place}: {f'RAYLORA_{name.upper()}' if place in {'.env', 'the environment'} else name}"
    else:
        shown = _on_command_line(settings, name)
    message = first["msg"].removeprefix("Value error, ")
    given = without_secrets(str(first["input"]))[:80]
    return " ".join(f"{shown}: {message[0].lower() + message[1:]}, got {given!r}".split())


def _on_command_line(settings: type[Settings], name: str) -> str:
    option = settings.model_fields.get(name)
    return name.upper() if option and POSITIONAL in option.metadata else "--" + name.replace("_", "-")


def _explain_settings_error(settings: type[Settings], error: SettingsError) -> str:
    """A value that should be JSON: the library names the field, and not what would fit."""
    text = " ".join(str(error).split())
    if match := re.search(r'(?:encountered for |for field )"?(\w+)', text):
        return f"--{match[1].replace('_', '-')}: expected JSON: {settings.model_fields[match[1]].description}"
    return text
