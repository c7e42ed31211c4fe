"""Whole objects on an object store, by fsspec."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from raylora.errors import RemoteError, one_line, reason

MAX_TRIES = 5
"""Of an operation on an object store that has answered before; each wait is twice as long as the last, from 1 s."""
NEVER = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
"""What no second try changes."""

T = TypeVar("T")


# Objects


class Remote:
    """A folder on an object store. Names are relative to it, with ``/``. There is no rename and nothing is appended.

    Every method raises ``RemoteError`` where the store does not answer, or says no.
    """

    def __init__(self, place: str) -> None:
        from fsspec.core import url_to_fs

        self.place = place
        # A listing that was kept would not show what others write.
        self._fs, self._root = url_to_fs(place, use_listings_cache=False)
        self._has_answered = False

    def read(self, name: str) -> bytes | None:
        """The whole object; None where there is none."""
        found: bytes | None = self._call(name, lambda: _or_none(lambda: self._fs.cat_file(self._path(name))))
        return found

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """Those of the objects that are there, asked for side by side."""
        return self._call("", lambda: self._read_many(names)) if names else {}

    def _read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        by_path = {self._path(name): name for name in names}
        found = self._fs.cat([*by_path], on_error="return")
        for value in found.values():
            if isinstance(value, Exception) and not isinstance(value, FileNotFoundError):
                raise value
        return {by_path[path]: value for path, value in found.items() if isinstance(value, bytes)}

    def write(self, name: str, data: bytes) -> None:
        self._call(name, lambda: self._fs.pipe_file(self._path(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that must not be there yet: False where it is. Of many who try at once, one succeeds."""

        def create() -> bool:
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                # Perhaps by our own first try, whose answer was lost.
                return bool(self._fs.cat_file(self._path(name)) == data)
            return True

        return self._call(name, create)

    def upload(self, name: str, path: Path) -> None:
        """A file, or every file below a folder."""
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            there = "/".join((name, *file.relative_to(path).parts))
            self._call(there, partial(self._fs.put_file, str(file), self._path(there)))

    def download(self, name: str, path: Path) -> bool:
        """An object, or all below a name, into a new ``path``; False where there is none. Not atomic on this side."""
        names = self.list(name)
        for found in names:
            target = path.joinpath(*PurePosixPath(found).relative_to(name).parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._call(found, partial(self._fs.get_file, self._path(found), str(target)))
        return bool(names)

    def list(self, name: str) -> list[str]:
        """The names of the object itself and of all objects below it."""
        start = len(self._root.rstrip("/")) + 1
        found = self._call(name, lambda: _or_none(lambda: self._fs.find(self._path(name)))) or []
        names = [path[start:] for path in found]
        # A name with .. in it is nobody's of ours, and must not lead out of a folder here.
        return sorted(n for n in names if not n.endswith("/") and ".." not in PurePosixPath(n).parts)

    def remove(self, name: str) -> None:
        """The object, or all below the name; nothing where there is none."""
        assert name, "the whole folder is never removed: other things may lie in it"
        self._call(name, lambda: _or_none(lambda: self._fs.rm(self._path(name), recursive=True)))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")

    def _call(self, name: str, do: Callable[[], T]) -> T:
        """One operation, with patience where the store has answered before."""
        for seconds in [2.0**i for i in range(MAX_TRIES - 1)]:
            try:
                return self._answered(do())
            except Exception as error:
                if isinstance(error, NEVER) or not self._has_answered:
                    raise self._error(name, error) from error
            time.sleep(seconds)
        try:
            return do()
        except Exception as error:
            raise self._error(name, error) from error

    def _answered(self, value: T) -> T:
        self._has_answered = True
        return value

    def _error(self, name: str, error: Exception) -> RemoteError:
        cause = reason(error) if isinstance(error, OSError) else one_line(error)
        return RemoteError(f"{self.place}/{name}".rstrip("/"), cause)


def _or_none(do: Callable[[], Any]) -> Any:
    with contextlib.suppress(FileNotFoundError):
        return do()
    return None
