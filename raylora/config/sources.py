"""Where options come from: a YAML file, the environment, ``.env``, the command line. The later one counts."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationError
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

from raylora.errors import UserError
from raylora.storage.places import check_regular, read_regular
from raylora.texts import without_secrets

POSITIONAL = get_args(CliPositionalArg)[1]
"""In the metadata of an option that is positional on the command line."""


def split_commas(value: Any) -> Any:
    """Text as a tuple: ``a,b``, or a JSON list, as ``CliApp.serialize`` writes a tuple. Other values as they are."""
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        return tuple(json.loads(value))
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _split_pairs(value: Any) -> Any:
    """``KEY=NAME,KEY=NAME``, or a mapping, as a tuple of such pairs; a name may have commas."""
    if isinstance(value, dict):
        return tuple(f"{key}={name}" for key, name in value.items())
    if isinstance(value, str) and not value.startswith("["):
        return tuple(part.strip() for part in re.split(r",(?=\s*\w+=)", value) if part.strip())
    return split_commas(value)


def _check_pairs(pairs: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what is no pair, and a key or a name that is given twice."""
    parts = [(key.strip(), name.strip()) for key, _, name in (text.partition("=") for text in pairs)]
    if not all(key and name for key, name in parts):
        raise ValueError("expected KEY=NAME, such as question=q,answer=a")
    if any(len({*names}) < len(names) for names in zip(*parts, strict=True)):
        raise ValueError("a name stands in it twice")
    return tuple(f"{key}={name}" for key, name in parts)


NamePairs = Annotated[
    tuple[str, ...],
    BeforeValidator(_split_pairs, json_schema_input_type=tuple[str, ...] | dict[str, str] | str),
    AfterValidator(_check_pairs),
]
"""Pairs ``KEY=NAME``."""


_PATTERN = re.compile(r"(?s)(.+)=([^=]+)")
"""``NAME=NUMBER``."""


def split_patterns(value: Any) -> Any:
    """``NAME=NUMBER,...`` as a tuple of texts; a YAML file may give ``{name: number}``."""
    return tuple(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else split_commas(value)


def check_patterns(patterns: tuple[str, ...], is_rank: bool) -> tuple[str, ...]:
    """Refuse what is no ``NAME=NUMBER`` above 0, and two numbers for one name.

    Raises:
        ValueError: it is so.
    """
    fits = re.compile(r"[1-9]\d{0,3}" if is_rank else r"\d*\.?\d+(e[+-]?\d+)?")
    for text in patterns:
        found = _PATTERN.fullmatch(text)
        if not found or not fits.fullmatch(found[2].strip()) or float(found[2]) == 0:
            raise ValueError(f"{text} is no NAME={'RANK, a number from 1 to 9999' if is_rank else 'ALPHA'}")
    if len(patterns_by_name(patterns)) < len(patterns):
        raise ValueError("two numbers for one name")
    return patterns


def patterns_by_name(patterns: tuple[str, ...]) -> dict[str, str]:
    """The numbers of such patterns by name, as text."""
    found = (_PATTERN.fullmatch(text) for text in patterns)
    return {match[1].strip(): match[2].strip() for match in found if match}


def read_json(value: Any) -> Any:
    """Text as the JSON value that it holds. Other values as they are.

    The command line and variables are read before; this is for text in a YAML file, or from Python.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"expected JSON: {error}") from None


class _Environment(EnvSettingsSource):
    """The environment variables that set options. ``MODEL_NAME`` counts where ``RAYLORA_MODEL`` is not set."""

    def __call__(self) -> dict[str, Any]:
        names = {*self.settings_cls.model_fields} - self.settings_cls.not_from_environment  # type: ignore[attr-defined]
        values = {name: value for name, value in super().__call__().items() if name in names}
        if "model" in names and (model := self.env_vars.get("model_name")):
            values.setdefault("model", model)
        return values


class _DotEnv(_Environment, DotEnvSettingsSource):
    """The same variables in ``.env``, which may hold those of other programs too."""


SETTINGS = SettingsConfigDict(
    env_prefix="RAYLORA_",
    env_file=".env",
    extra="forbid",
    frozen=True,
    defer_build=True,  # building a class takes 25 ms, and a command uses one of many
    cli_kebab_case=True,
    cli_implicit_flags=True,
    cli_hide_none_type=True,
    cli_avoid_json=True,
)


class Settings(BaseSettings):
    """Where options come from."""

    model_config = SETTINGS
    not_from_environment: ClassVar[frozenset[str]] = frozenset()
    """Options that no variable sets: under this name other commands have another option, whose variable it is."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Strongest first: arguments, ``.env``, the environment.

        ``settings_from_command`` puts the command line before them, and YAML after them.
        """
        return init_settings, _DotEnv(settings_cls), _Environment(settings_cls)

    def settings_of(self, *groups: type[BaseModel]) -> dict[str, Any]:
        """The options of these groups as plain JSON values."""
        dump = self.model_dump(mode="json")
        return {name: dump[name] for group in groups for name in group.model_fields}


FILES = {"bash": "_shtab_compgen_files", "zsh": "_files"}
"""By shell, the function of shtab's script that completes a file's name."""
S = TypeVar("S", bound=Settings)


class OptionParser(argparse.ArgumentParser):
    """A parser that raises ``UserError``, and takes its options from the fields of ``Settings`` classes."""

    def __init__(self, **options: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"allow_abbrev": False, "formatter_class": form, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")

    def add_options(self, settings: type[Settings]) -> None:
        """Add an option for every field of ``settings``, and ``--config``.

        Give what ``parse`` then returns to ``settings_from_command``.
        """
        source = CliSettingsSource[Any](settings, root_parser=self, add_argument_method=_add_option)
        _add_option(
            self, "--config", type=Path, metavar="FILE", help="YAML file of these options, such as configs/demo.yaml"
        )
        self.set_defaults(_source=source)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """The values on the command line by option name (with underscores), and the parser's own entries.

        Raises:
            UserError: an option is unknown or lacks its value.
            SystemExit: 0, after ``--help``.
        """
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            option = unknown[0].partition("=")[0]
            hint = closest_option(parsed._source.settings_cls, option.lstrip("-").replace("-", "_"))
            raise UserError(f"unknown option {unknown[0]}: {hint}")
        return vars(parsed)


def _add_option(parser: argparse.ArgumentParser, *names: str, **arguments: Any) -> None:
    """Add an option named with dashes, and the same with underscores, which help does not show.

    An option of a list takes all values up to the next option.
    """
    is_path = arguments.get("metavar") in {"Path", "FILE"} or not names[0].startswith("-")
    if arguments.get("nargs") == "*" and names[0].startswith("-"):
        arguments |= {"action": "extend", "nargs": "+"}
    option = parser.add_argument(*names, **arguments)
    if is_path:
        setattr(option, "complete", FILES)  # noqa: B010 (an attribute that only shtab knows)
    hidden = {**arguments, "help": argparse.SUPPRESS}
    for name in option.option_strings:
        if "-" in name[2:]:
            if arguments.get("action") is argparse.BooleanOptionalAction:
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
    command_values = {name: value for name, value in given.items() if name in settings.model_fields}
    yaml_path: Path | None = given.get("config")
    yaml_values = _read_yaml(yaml_path) if yaml_path else {}
    variables = _read_variables(settings)

    class _Command(settings):  # type: ignore[valid-type, misc]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *args: Any, **kwargs: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            sources = super().settings_customise_sources(settings_cls, *args, **kwargs)
            command_line = [given["_source"](parsed_args=command_values)] if given else []
            return (*command_line, *sources, _YamlValues(settings_cls, yaml_values))

    try:
        made = _Command(**overrides)
    except ValidationError as error:
        place = _place_of(error, command_values, variables, yaml_path, yaml_values)
        raise UserError(explain(settings, error, place)) from None
    except SettingsError as error:
        raise UserError(_explain_settings_error(settings, error)) from None
    return settings.model_construct(_fields_set=made.model_fields_set, **made.model_dump())


class _YamlValues(YamlConfigSettingsSource):
    """Values of a YAML file that was read already."""

    def __init__(self, settings_cls: type[BaseSettings], values: dict[str, Any]) -> None:
        PydanticBaseSettingsSource.__init__(self, settings_cls)
        self._values = values

    def __call__(self) -> dict[str, Any]:
        return self._values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(read_regular(path.expanduser()).decode("utf-8-sig"))
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
    """The variables of ``.env`` and of the environment in lower case, by these two places, the stronger one first.

    Raises:
        UserError: ``.env`` is not UTF-8, or a variable's name is nearly one of ours: it would silently set nothing.
    """
    try:
        check_regular(Path(".env"))
        dotenv = _DotEnv(settings).env_vars
    except UnicodeDecodeError as error:
        raise UserError(f".env: not UTF-8 at byte {error.start}") from None
    variables = {".env": dotenv, "the environment": _Environment(settings).env_vars}
    for place, names in variables.items():
        _check_names(place, names, settings)
    return variables


def _check_names(place: str, variables: Collection[str], settings: type[Settings]) -> None:
    """Raise UserError for a variable with our prefix that is nearly an option of some command.

    A name that is like none of them is accepted: another program may use the prefix.
    """
    option_names = {*settings.model_fields, *_every_option()}
    for variable in variables:
        name = variable.removeprefix("raylora_")
        if name == variable or name in option_names:
            continue
        if close := difflib.get_close_matches(name, option_names, 1, 0.8):
            raise UserError(f"{variable.upper()} in {place}: no option; did you mean RAYLORA_{close[0].upper()}?")


def _every_option() -> set[str]:
    """The options of all commands whose classes are imported."""
    classes = [Settings]
    for settings in classes:
        classes += settings.__subclasses__()
    return {name for settings in classes for name in settings.model_fields}


def closest_option(settings: type[BaseModel], name: str) -> str:
    """A hint for somebody who gave an unknown option: the one with the closest name, if any is close."""
    close = difflib.get_close_matches(name, settings.model_fields, n=1)
    return f"did you mean {close[0]}?" if close else "see --help for what there is"


def _place_of(
    error: ValidationError,
    command_values: Mapping[str, Any],
    variables: Mapping[str, Collection[str]],
    yaml_path: Path | None,
    yaml_values: Mapping[str, Any],
) -> str:
    """Where the bad value comes from: of the places that set it the strongest. Empty for the command line."""
    name = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else ""
    if name in command_values:
        return ""
    places = [place for place, names in variables.items() if f"raylora_{name}" in names]
    return places[0] if places else str(yaml_path) if name in yaml_values else ""


def explain(settings: type[BaseModel], error: ValidationError, place: str = "") -> str:
    """The first of pydantic's errors in one line: the option, what would fit, and what was given.

    Args:
        place: where the value comes from; empty: the command line or Python.
    """
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "configuration"
    if first["type"] == "extra_forbidden":
        return f"unknown option {name}{f' in {place}' if place else ''}: {closest_option(settings, name)}"
    if place:
        option = f"{place}: {f'RAYLORA_{name.upper()}' if place in {'.env', 'the environment'} else name}"
    else:
        option = _on_command_line(settings, name)
    message = first["msg"].removeprefix("Value error, ")
    value = without_secrets(str(first["input"]))[:80]
    return " ".join(f"{option}: {message[0].lower() + message[1:]}, got {value!r}".split())


def _on_command_line(settings: type[BaseModel], name: str) -> str:
    """An option as it is written on the command line: ``--num-epochs``; ``TABLE`` if it is positional."""
    option = settings.model_fields.get(name)
    return name.upper() if option and POSITIONAL in option.metadata else "--" + name.replace("_", "-")


def _explain_settings_error(settings: type[Settings], error: SettingsError) -> str:
    """An error about a value that should be JSON, in one line. pydantic's own does not say what would fit."""
    text = " ".join(str(error).split())
    if match := re.search(r'(?:encountered for |for field )"?(\w+)', text):
        return f"--{match[1].replace('_', '-')}: expected JSON: {settings.model_fields[match[1]].description}"
    return text
