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
"""Tries of one operation. The waits between them are 1, 2, 4 and 8 s."""
FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
"""Errors that trying again does not change."""

T = TypeVar("T")


class Remote:
    """A folder on an object store. Names are relative to it, with ``/``. An object cannot be renamed or appended to.

    Every method raises ``RemoteError`` where the store does not answer or refuses.
    """

    def __init__(self, place: str) -> None:
        from fsspec.core import url_to_fs

        self.place = place
        # fsspec keeps listings of folders, which would not show what other machines write.
        self._fs, self._root = url_to_fs(place, use_listings_cache=False)
        self._has_answered = False

    def read(self, name: str) -> bytes | None:
        """The whole object; None where there is none."""
        data: bytes | None = self._call(name, lambda: _or_none(lambda: self._fs.cat_file(self._path(name))))
        return data

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """The contents by name of those objects that exist, read in parallel."""
        return self._call("", lambda: self._read_many(names)) if names else {}

    def _read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        names_by_path = {self._path(name): name for name in names}
        results = self._fs.cat([*names_by_path], on_error="return")
        for result in results.values():
            if isinstance(result, Exception) and not isinstance(result, FileNotFoundError):
                raise result
        return {names_by_path[path]: result for path, result in results.items() if isinstance(result, bytes)}

    def write(self, name: str, data: bytes) -> None:
        """Write an object, in place of an old one."""
        self._call(name, lambda: self._fs.pipe_file(self._path(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that must not exist yet; False where it does. Of several that try at once, one succeeds."""

        def create() -> bool:
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                # It may be ours: ``_call`` tries again where the first try was written and its answer was lost.
                return bool(self._fs.cat_file(self._path(name)) == data)
            return True

        return self._call(name, create)

    def upload(self, name: str, path: Path) -> None:
        """Write a file, or every file below a folder."""
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            object_name = "/".join((name, *file.relative_to(path).parts))
            self._call(object_name, partial(self._fs.put_file, str(file), self._path(object_name)))

    def download(self, name: str, path: Path) -> bool:
        """Copy an object, or all below a name, to a new local ``path``, not atomically; False where there is none."""
        object_names = self.list(name)
        for object_name in object_names:
            target = path.joinpath(*PurePosixPath(object_name).relative_to(name).parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._call(object_name, partial(self._fs.get_file, self._path(object_name), str(target)))
        return bool(object_names)

    def list(self, name: str) -> list[str]:
        """The names of the object itself and of all objects below it, sorted."""
        start = len(self._root.rstrip("/")) + 1
        paths = self._call(name, lambda: _or_none(lambda: self._fs.find(self._path(name)))) or []
        names = [path[start:] for path in paths]
        # raylora writes no name with .. in it; somebody else's must not lead out of the folder of downloads.
        return sorted(n for n in names if not n.endswith("/") and ".." not in PurePosixPath(n).parts)

    def remove(self, name: str) -> None:
        """Delete the object, or all below the name, if there are any."""
        assert name, "the whole folder is never removed: other things may lie in it"
        self._call(name, lambda: _or_none(lambda: self._fs.rm(self._path(name), recursive=True)))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")

    def _call(self, name: str, do: Callable[[], T]) -> T:
        """Run one operation, up to ``MAX_TRIES`` times if this store has answered before.

        One that has not is likely misspelt, or has no credentials here: its first error is raised at once.
        """
        for seconds in [2.0**i for i in range(MAX_TRIES - 1)]:
            try:
                result = do()
                self._has_answered = True
                return result
            except Exception as error:
                if isinstance(error, FINAL_ERRORS) or not self._has_answered:
                    raise self._error(name, error) from error
            time.sleep(seconds)
        try:
            return do()
        except Exception as error:
            raise self._error(name, error) from error

    def _error(self, name: str, error: Exception) -> RemoteError:
        cause = reason(error) if isinstance(error, OSError) else one_line(error)
        return RemoteError(f"{self.place}/{name}".rstrip("/"), cause)


def _or_none(do: Callable[[], Any]) -> Any:
    """What ``do`` returns; None where it finds no such object."""
    with contextlib.suppress(FileNotFoundError):
        return do()
    return None
