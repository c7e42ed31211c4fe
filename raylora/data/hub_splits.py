"""Which files of a hub's repository are a configuration and a split of it.

As ``datasets`` has it: what the README's metadata says (``configs``), else the names of files and folders. No code of a
repository is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fsspec.utils import glob_translate

from raylora.data.dataset_files import JSON, KINDS, LINES, METADATA, kind_of, natural_order, split_of, standard_split
from raylora.errors import NoFilesError, UserError

TRAIN = "train"
MAX_SHOWN = 12
"""Configurations, or splits, that an error lists."""
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b.*")
_CONVERTED = re.compile(r"\d{4}\.parquet")
"""A file of the hub's own conversion, ``config/split/0000.parquet``."""


@dataclass(frozen=True)
class HubConfig:
    """A configuration of the README's metadata."""

    name: str
    data_dir: str
    data_files: dict[str, tuple[str, ...]]
    """Patterns by split; empty where names say what the splits are."""
    is_default: bool


@dataclass(frozen=True)
class Choice:
    """What was chosen of a repository."""

    config: str
    """Empty where the repository has one without a name."""
    split: str
    """Empty where the files belong to none."""
    files: tuple[str, ...]


def configs_of(metadata: Any) -> list[HubConfig]:
    """The configurations that a README's metadata names; parts of another form than the hub's count as not there."""
    found = metadata.get("configs") if isinstance(metadata, dict) else None
    configs = []
    for entry in found if isinstance(found, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("config_name", "default"), str):
            folder = entry.get("data_dir")
            configs.append(
                HubConfig(
                    entry.get("config_name", "default"),
                    _plain(folder) if isinstance(folder, str) else "",
                    _patterns(entry.get("data_files")),
                    entry.get("default") is True,
                )
            )
    return configs


def _patterns(data_files: Any) -> dict[str, tuple[str, ...]]:
    if isinstance(data_files, str):
        return {TRAIN: (data_files,)}
    if isinstance(data_files, dict):
        return {str(split): _texts(paths) for split, paths in data_files.items()}
    patterns: dict[str, tuple[str, ...]] = {}
    for entry in data_files if isinstance(data_files, list) else []:
        split, paths = (entry.get("split", TRAIN), entry.get("path")) if isinstance(entry, dict) else (TRAIN, entry)
        patterns[str(split)] = patterns.get(str(split), ()) + _texts(paths)
    return patterns


def _texts(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    return tuple(text for text in values if isinstance(text, str)) if isinstance(values, list) else ()


def _plain(path: str) -> str:
    """A path within a repository without ``./`` and slashes around it."""
    return str(PurePosixPath(path.lstrip("/"))).removeprefix(".").strip("/")


def choose(tree: Collection[str], metadata: Any, config: str, split: str) -> Choice:
    """The files of a configuration and a split.

    Args:
        tree: the paths of all files of the repository.
        metadata: of its README, parsed.
        config: a configuration's name, or a folder or a file of the repository; empty: its default, or its only one.
        split: empty: ``train``.

    Raises:
        NoFilesError: there is no file of a dataset at all, or the metadata names only others.
        UserError: there is no such configuration or split, or there are several and none is given.
    """
    tree = [path for path in tree if not any(p.startswith((".", "__")) for p in path.split("/"))]
    data = [path for path in tree if kind_of(path) and path.rpartition("/")[2] not in METADATA]
    configs = configs_of(metadata)
    names = [c.name for c in configs]
    if config and config not in names:
        if config in data:
            if split:
                raise UserError(f"{config} is one file: name no split with it")
            return Choice(config, "", (config,))
        return _choose_folder(data, config, split, names)
    if configs:
        chosen = next((c for c in configs if c.name == config), None) or _default_config(configs)
        return _choose_config(tree, data, chosen, split)
    if not data:
        raise NoFilesError("no file of a dataset in it")
    base = _common_folder(data)
    if (folders := _folders_in(data, base)) and not any(split_of(name) for name in folders):
        raise _several_configs(folders)
    return _choose_split("", _splits_of(data, base), split)


def _default_config(configs: list[HubConfig]) -> HubConfig:
    defaults = [c for c in configs if c.is_default] or [c for c in configs if c.name == "default"] or configs
    if len(defaults) > 1:
        raise _several_configs([c.name for c in configs])
    return defaults[0]


def _several_configs(names: Collection[str]) -> UserError:
    return UserError(f"it has several configurations, {_listed(names)}: name one: .../NAME/CONFIG")


def _choose_config(tree: list[str], data: list[str], config: HubConfig, split: str) -> Choice:
    if not config.data_files:
        inside = [path for path in data if path.startswith(f"{config.data_dir}/" if config.data_dir else "")]
        if not inside:
            raise NoFilesError(f"no file of a dataset for its configuration {config.name}")
        return _choose_split(config.name, _splits_of(inside, config.data_dir), split)
    splits = {}
    for name, patterns in config.data_files.items():
        wanted = [pattern for p in patterns if (pattern := _glob(config.data_dir, p))]
        splits[name] = [path for path in tree if any(pattern.fullmatch(path) for pattern in wanted)]
    if not any(kind_of(path) for files in splits.values() for path in files):
        raise NoFilesError(f"no file of a dataset for its configuration {config.name}")
    return _choose_split(config.name, splits, split)


def _glob(folder: str, pattern: str) -> re.Pattern[str] | None:
    """What a pattern matches; None where it is none. The address of another repository matches nothing."""
    try:
        return re.compile(glob_translate("/".join(filter(None, [folder, _plain(pattern)]))))
    except re.error:
        return None


def _choose_folder(data: list[str], config: str, split: str, names: list[str]) -> Choice:
    """A folder as a configuration: of the repository, or of the one folder that holds everything."""
    base = _common_folder(data)
    for folder in (config, f"{base}/{config}"):
        if inside := [path for path in data if path.startswith(f"{folder}/")]:
            return _choose_split(config, _splits_of(inside, folder), split)
    if not data and not names:
        raise NoFilesError("no file of a dataset in it")
    there = names or _folders_in(data, base)
    has = f"it has {_listed(there)}" if there else "it has none: leave it out"
    raise UserError(f"no configuration, folder or dataset file {config!r} in it: {has}")


def _common_folder(data: Iterable[str]) -> str:
    """The deepest folder that all files lie in and that is named after no split; empty for the repository's root."""
    parts = [_folders(path) for path in data]
    base: list[str] = []
    for names in zip(*parts, strict=False):
        if len({*names}) > 1 or split_of(names[0]):
            break
        base.append(names[0])
    return "/".join(base)


def _folders(path: str) -> list[str]:
    """The folders that a file lies in, but for the one that its split is by the hub's conversion."""
    *folders, name = path.split("/")
    return folders[:-1] if _CONVERTED.fullmatch(name) else folders


def _folders_in(data: Iterable[str], base: str) -> list[str]:
    """The folders right below ``base``, if every file lies in one of several."""
    rest = [_folders(path.removeprefix(f"{base}/" if base else "")) for path in data]
    folders = {names[0] for names in rest if names}
    return sorted(folders, key=natural_order) if len(folders) > 1 and all(rest) else []


def _splits_of(files: Iterable[str], base: str) -> dict[str, list[str]]:
    """Files by the split that their names say, below ``base``. Where none says any, all are ``train``."""
    splits: dict[str, list[str]] = {}
    unnamed: dict[str, list[str]] = {}
    for path in files:
        *folders, name = path.removeprefix(f"{base}/" if base else "").split("/")
        shard = _SHARD.fullmatch(name)
        if folders and _CONVERTED.fullmatch(name):
            split = folders[-1]
        elif shard:
            split = shard[1]
            if not split_of(split):
                unnamed.setdefault(split, []).append(path)
                continue
        else:
            split = next((found for part in (name, *reversed(folders)) if (found := split_of(part))), "")
        splits.setdefault(standard_split(split), []).append(path)
    if splits.keys() - {""} or len(unnamed) > 1:
        splits.pop("", None)  # as datasets has it: where files are named after splits, those are the dataset
        return {**splits, **unnamed}
    return {TRAIN: [*splits.get("", ()), *(path for files in unnamed.values() for path in files)]}


def _choose_split(config: str, splits: Mapping[str, list[str]], split: str) -> Choice:
    wanted = split or TRAIN
    names = {name for name, files in splits.items() if files}
    exact = [n for n in names if n == wanted] or [n for n in names if standard_split(n) == standard_split(wanted)]
    if not exact:
        what = f"no split {wanted}" + (f" in its configuration {config}" if config else "")
        fix = "" if split else ": name one: ...:SPLIT"
        raise UserError(f"{what}: it has {_listed(sorted(names))}{fix}")
    return Choice(config, exact[0], _of_one_kind(splits[exact[0]]))


def _of_one_kind(files: list[str]) -> tuple[str, ...]:
    """The files of the kind that most are of, as ``datasets`` takes them; JSON and its lines count as one."""
    kinds = {path: JSON if kind_of(path) is LINES else kind_of(path) for path in files}
    counts = Counter(kind for kind in kinds.values() if kind)
    if not counts:
        raise NoFilesError(f"none of its files is one of a dataset ({_listed(files)})")
    most = max(counts.values())
    best = [kind for kind in KINDS if counts.get(kind) == most]
    if len(best) > 1:
        some = [next(path for path, kind in kinds.items() if kind is b) for b in best]
        raise UserError(f"as many files of one kind as of another, {_listed(some)}: name one file in place of CONFIG")
    return tuple(sorted((path for path, kind in kinds.items() if kind is best[0]), key=natural_order))


def check_complete(files: Iterable[str]) -> None:
    """Check that of shards ``x-00000-of-00003`` all are there.

    Raises:
        UserError: some are not.
    """
    shards: dict[tuple[str, int], int] = {}
    for path in files:
        if found := re.search(r"(.*)-\d{5}-of-(\d{5})\b", path):
            key = found[1], int(found[2])
            shards[key] = shards.get(key, 0) + 1
    for (name, total), num in shards.items():
        if num < total:
            raise UserError(f"only {num} of the {total} shards of {name} are there")


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:MAX_SHOWN])
    return f"{shown} and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else shown
