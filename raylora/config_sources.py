"""Where options come from: a YAML file, the environment, ``.env`` and the command line, in rising order of strength."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from raylora.errors import UserError, without_secrets


def split_commas(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


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
    cli_kebab_case=True,
    cli_implicit_flags=True,
    cli_exit_on_error=False,
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


S = TypeVar("S", bound=Settings)


def load_settings(settings: type[S], argv: list[str] | None, prog: str, **overrides: Any) -> S:
    """The options of a command: YAML, environment, ``.env``, and ``argv`` (or ``overrides`` from Python).

    Raises:
        UserError: one line that names the option and what fits.
        SystemExit: 0, after ``--help``.
    """
    argv = list(argv or [])
    yaml_path, argv = _take_config_option(argv)
    yaml_values = _read_yaml(yaml_path) if yaml_path else {}
    variables = _read_variables(settings)

    class _Command(settings):  # type: ignore[valid-type, misc]
        model_config = SettingsConfigDict(cli_prog_name=prog)

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *args: Any, **kwargs: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            stronger = super().settings_customise_sources(settings_cls, *args, **kwargs)
            strongest = [CliSettingsSource[Any](settings_cls, cli_parse_args=argv)] if argv else []
            return (*strongest, *stronger, _YamlValues(settings_cls, yaml_values))

    _Command.__doc__ = settings.__doc__
    try:
        values = _Command(**overrides).model_dump()
    except ValidationError as error:
        raise UserError(_explain(settings, error, _place_of(error, argv, variables, yaml_path, yaml_values))) from None
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


def _take_config_option(argv: list[str]) -> tuple[Path | None, list[str]]:
    """``--config FILE`` says where options come from; it is none itself."""
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv):
                raise UserError("--config: name a YAML file, such as configs/demo.yaml")
            return Path(argv[i + 1]), argv[:i] + argv[i + 2 :]
        if word.startswith("--config="):
            return Path(word.partition("=")[2]), argv[:i] + argv[i + 1 :]
    return None, argv


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
    argv: Sequence[str],
    variables: Mapping[str, Collection[str]],
    yaml_path: Path | None,
    yaml_values: Mapping[str, Any],
) -> str:
    """Where the value that does not fit stands, in the order of what is stronger; nothing for the command line."""
    name = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else ""
    if any(word.partition("=")[0] == "--" + name.replace("_", "-") for word in argv):
        return ""
    given = [place for place, names in variables.items() if f"raylora_{name}" in names]
    return given[0] if given else str(yaml_path) if name in yaml_values else ""


def _explain(settings: type[Settings], error: ValidationError, place: str) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "configuration"
    if first["type"] == "extra_forbidden":
        return f"unknown option {name}{f' in {place}' if place else ''}: {closest_option(settings, name)}"
    in_variable = place in {".env", "the environment"}
    flag = f"{place}: {f'RAYLORA_{name.upper()}' if in_variable else name}" if place else "--" + name.replace("_", "-")
    message = first["msg"].removeprefix("Value error, ")
    given = without_secrets(str(first["input"]))[:80]
    return " ".join(f"{flag}: {message[0].lower() + message[1:]}, got {given!r}".split())


def _explain_settings_error(settings: type[Settings], error: SettingsError) -> str:
    text = " ".join(str(error).split()).removeprefix("error parsing CLI: ")
    if "unrecognized arguments:" in text:
        word = text.partition("unrecognized arguments:")[2].split()[0]
        return (
            f"unknown option {word}: {closest_option(settings, word.lstrip('-').partition('=')[0].replace('-', '_'))}"
        )
    # What is left are values that should be JSON: the library names the field, and not what would fit.
    if match := re.search(r'(?:encountered for |for field )"?(\w+)', text):
        return f"--{match[1].replace('_', '-')}: expected JSON: {settings.model_fields[match[1]].description}"
    return text
