"""Datasets of the Hugging Face hub by name: ``hf://datasets/org/name[@revision][/config][:split]``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

from pydantic import PlainSerializer, PlainValidator

from raylora.errors import UserError
from raylora.storage.places import location
from raylora.texts import without_secrets

PREFIX = "hf://"
FORM = "hf://datasets/ORG/NAME[@REVISION][/CONFIG][:SPLIT]"
_NAME = re.compile(
    r"datasets/(?P<first>[^/@:]+)(?:/(?P<second>[^/@:]+))?"
    # A revision with slashes is written with %2F, but for the hub's own.
    r"(?:@(?P<revision>refs/(?:convert|pr)/[\w-]+|[^/:]+))?"
    r"(?:/(?P<config>[^@:]+?))?/?(?::(?P<split>[^/]*))?"
)
_REPOSITORY = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
_SPLIT = re.compile(r"[\w-]+(?:\.[\w-]+)*")
MAX_PART = 96
"""Characters of a repository's name, as the hub has it."""
COMMIT = re.compile(r"[0-9a-f]{40}")


class HubDataset(str):
    """A dataset's name on the hub: the text as users write it, and its parts.

    Attributes:
        repository: ``org/name``, or the name alone of one of the hub's own.
        revision: a branch, a tag or a commit; empty for ``main``.
        config: a configuration, a folder or a file of the repository; empty where its default is meant.
        split_name: empty for ``train``.
    """

    repository: str
    revision: str
    config: str
    split_name: str

    def __new__(cls, repository: str, revision: str = "", config: str = "", split: str = "") -> HubDataset:
        quoted = revision if revision.startswith("refs/") else revision.replace("/", "%2F")
        parts = [("@", quoted), ("/", config), (":", split)]
        text = f"{PREFIX}datasets/{repository}" + "".join(mark + part for mark, part in parts if part)
        self = super().__new__(cls, text)
        self.repository, self.revision, self.config, self.split_name = repository, revision, config, split
        return self

    def __getnewargs__(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.repository, self.revision, self.config, self.split_name)

    def at(self, revision: str) -> HubDataset:
        """The same at another revision."""
        return HubDataset(self.repository, revision, self.config, self.split_name)

    @property
    def name(self) -> str:
        """A name for rows, which is a file's name too: ``org--name``, with what else was given behind it."""
        parts = [*self.repository.split("/"), *self.config.split("/"), self.split_name, self.revision[:12]]
        return "--".join(re.sub(r"[^\w.-]+", "_", part) for part in parts if part)

    @property
    def canonical(self) -> HubDataset | None:
        """What the same text means, if it is not ``org/name`` but the hub's own ``name`` with a configuration."""
        first, _, second = self.repository.partition("/")
        if not second or self.revision:
            return None
        return HubDataset(first, "", f"{second}/{self.config}".rstrip("/"), self.split_name)


DatasetPlace = Path | HubDataset
"""Where a dataset is: a file or a folder of shards, or a name on the hub."""


def dataset_location(text: str | DatasetPlace) -> DatasetPlace:
    """A place of a dataset as users write it: as ``location`` reads it, or a name on the hub.

    Raises:
        UserError: it can be none.
    """
    if isinstance(text, HubDataset):
        return text
    if not isinstance(text, str) or not text.strip().lower().startswith(PREFIX):
        return location(text)
    return _hub_dataset(text.strip())


def _hub_dataset(text: str) -> HubDataset:
    shown = without_secrets(text if text.isprintable() else ascii(text)[1:-1])
    found = _NAME.fullmatch(text[len(PREFIX) :])
    if found is None or "?" in text:
        raise UserError(f"{shown}: expected {FORM}")
    first, second, config = found["first"], found["second"], found["config"] or ""
    repository = f"{first}/{second}" if second else first
    if (
        not _REPOSITORY.fullmatch(repository)
        or "--" in repository
        or ".." in repository
        or len(repository) > MAX_PART
        or repository.endswith((".", "-"))
    ):
        raise UserError(f"{shown}: {repository!r} is no name of a repository: expected {FORM}")
    revision = unquote(found["revision"] or "")
    if not revision.isprintable() or " " in revision or ({"", ".", ".."} & {*revision.split("/")} and revision):
        raise UserError(f"{shown}: {revision!r} is no revision: give a branch, a tag or a commit")
    if not config.isprintable() or ({"", ".", ".."} & {*config.split("/")} and config):
        raise UserError(f"{shown}: {config!r} is no configuration: expected {FORM}")
    split = found["split"]
    if split is not None and not _SPLIT.fullmatch(split):
        fix = "; --max-records N takes the first N records" if "[" in split else ""
        raise UserError(f"{shown}: {split!r} is no split: give one, such as train{fix}")
    return HubDataset(repository, revision, config, split or "")


DatasetLocation = Annotated[
    DatasetPlace, PlainValidator(dataset_location, json_schema_input_type=str), PlainSerializer(str, when_used="json")
]
"""An option that is a dataset's place."""
