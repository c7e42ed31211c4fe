"""What is damaged in the store: one line for each product, and products whose place something else has taken."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raylora.errors import ErrorKind, UserError
from raylora.storage.digests import damaged_files, unseal

log = logging.getLogger("raylora.damage")
"""Its lines are in the experiment's log too."""
_noted: set[tuple[str, object]] = set()

FILES = {".json", ".jsonl", ".parquet", ".csv", ".txt", ".lock", ".safetensors"}
TABLES = {
    "results.csv", "results.parquet", "results.jsonl", "run.json", "report.html", "transfer.csv", "transfer.parquet",
    "transfer_table.csv", "summary.csv", "subjects.csv", "ranking.csv", "run.owner",
}  # fmt: skip
OWN_FOLDER = re.compile(r"[0-9a-f]{12}$")
"""How the name of an experiment's folder ends, and that of a base's."""


def note_damaged(place: object, version: object = None, then: str = "it is made again") -> None:
    """Log that a product is damaged, once a process.

    Args:
        place: the product, as users find it.
        version: tells one content of it from another, such as its file's time.
    """
    text = f"{place}: damaged: {then}"
    if (text, version) not in _noted:
        _noted.add((text, version))
        log.warning("%s", text)


def is_noted(text: str) -> bool:
    """Whether this process has noted it: a worker may find the same."""
    return any(text == noted for noted, _ in _noted)


def note_file(path: Path, shown: object = None, then: str = "it is made again") -> None:
    """``note_damaged`` of a local file."""
    with contextlib.suppress(OSError):
        note_damaged(shown or path, path.stat().st_mtime_ns, then)


class _Teller(logging.Handler):
    def __init__(self, tell: Callable[[str], Any]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone costs the line, and nothing else
            self._tell(record.getMessage())


@contextlib.contextmanager
def damage_told(tell: Callable[[str], Any]) -> Iterator[None]:
    """Inside, ``tell`` is called with the line of each damaged product that this process finds."""
    handler = _Teller(tell)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The JSON product in a file; None where there is none, or it is damaged, which is noted."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if (value := unseal(data)) is None:
        note_file(path)
    return value


def check_places(root: Path) -> None:
    """Check that nothing has taken the place of a product in a store's folder: no folder or link that of a file.

    A link would lead what is written elsewhere, and a folder cannot be replaced without deleting what is in it.

    Raises:
        UserError: something has.
    """
    for name in TABLES:
        if (root / name).is_dir():
            raise _misplaced(root / name, "a folder, where a file belongs")
    for place in (root / "experiments", root / "base"):
        for entry in _entries(place):
            if entry.is_dir():
                _check_folder(entry.path)
            elif OWN_FOLDER.search(entry.name):
                raise _misplaced(entry.path, "no folder, where one belongs")


def _check_folder(folder: str | Path) -> None:
    for entry in _entries(folder):
        is_folder = entry.name == "adapter" or entry.name.endswith(".journal")
        if not is_folder and Path(entry.name).suffix not in FILES:
            continue
        belongs = "a folder" if is_folder else "a file"
        if entry.is_symlink():
            raise _misplaced(entry.path, f"a link, where {belongs} belongs")
        if entry.is_dir() != is_folder:
            raise _misplaced(entry.path, f"{'a file' if is_folder else 'a folder'}, where {belongs} belongs")
        if is_folder:
            _check_folder(entry.path)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def _misplaced(path: str | Path, what: str) -> UserError:
    return UserError(f"{path}: {what}: move it away: what was there is made again", kind=ErrorKind.STORAGE)


def check_adapter_of_run(folder: Path) -> None:
    """Check that an adapter that a run has made is what it wrote; others have nothing to be checked by.

    Raises:
        UserError: it is not.
    """
    if folder.name != "adapter":
        return
    try:
        marker = unseal((folder.parent / "train.json").read_bytes()) or {}
    except OSError:
        return
    digests = marker.get("files")
    names = [n for n in digests if n.startswith("adapter/")] if isinstance(digests, dict) else []
    if damaged := damaged_files(folder.parent, names, digests):
        fix = f"remove {folder.parent / 'result.json'} and run the same batch command again: it is trained again"
        raise UserError(f"{folder.parent / damaged[0]}: damaged: {fix}", kind=ErrorKind.ADAPTER)
