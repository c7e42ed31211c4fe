"""The names of a run's datasets, in rows and in the ids of its experiments."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from raylora.data.dataset_files import name_and_ending
from raylora.storage.hub_names import DatasetPlace, HubDataset


@dataclass(frozen=True)
class NamedDataset:
    """A dataset of a run."""

    place: DatasetPlace
    name: str
    """As rows have it: no other dataset of the run has the same."""
    identity: tuple[str, ...]
    """What the ids of its experiments are made from; each begins with the first part."""


def name_datasets(places: Sequence[DatasetPlace]) -> list[NamedDataset]:
    """Each place once, with its name: the shortest of those it may have that no other place has as well.

    A file's are: without its ending, with it, and with more and more of the folders that it lies in.
    """
    unique = list({_full(place): place for place in places}.values())
    names = {_full(place): _names(place) for place in unique}
    depth = dict.fromkeys(names, 0)

    def name(full: str) -> str:
        return names[full][min(depth[full], len(names[full]) - 1)]

    while True:
        counts = Counter(map(name, names))
        same = [full for full in names if counts[name(full)] > 1 and depth[full] < len(names[full]) - 1]
        if not same:
            break
        for full in same:
            depth[full] += 1
    return [
        NamedDataset(place, name(_full(place)), _identity(place, name(_full(place)), depth[_full(place)]))
        for place in unique
    ]


def place_text(place: DatasetPlace) -> str:
    """A place in full, as printable text."""
    return printable(_full(place))


def _full(place: DatasetPlace) -> str:
    return str(place) if isinstance(place, HubDataset) else str(place.absolute())


def _names(place: DatasetPlace) -> list[str]:
    if isinstance(place, HubDataset):
        return [place.name, str(place)]
    parts = [part.strip("/\\") for part in place.absolute().parts]
    folders = ["/".join(parts[-num:]) for num in range(2, len(parts) + 1)]
    return [name_and_ending(place)[0], place.name, *folders]


def _identity(place: DatasetPlace, name: str, depth: int) -> tuple[str, ...]:
    if isinstance(place, HubDataset):
        return (place.name, str(place))
    # A folder is part of it only where two files have one name: results may be moved with their data.
    return (*map(printable, name_and_ending(place)), *([printable(name)] if depth > 1 else []))


def printable(name: str) -> str:
    """A file's name as text that can be written as UTF-8: a byte that is not UTF-8 becomes ``\\xe9`` or the like."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_utf8(place: DatasetPlace) -> bool:
    """Whether the name of a place can be written as UTF-8."""
    return isinstance(place, HubDataset) or printable(place.name) == place.name
