"""Whole objects on an object store, by fsspec."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from raylora.errors import RemoteError, one_line, reason

PATIENCE_SECONDS = 40.0
"""A store that answers nothing for so long is given up. Tries begin 1, 2, 4 and then 8 s apart."""
FIRST_PATIENCE_SECONDS = 4.0
"""One that has answered nothing so far is likely misspelt, or takes no credentials of ours: it is asked three times."""
MISSING_SECONDS = 0.2
"""What is not found is asked for once more after this time: stores say 404 for a moment of what is there."""
FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
"""Errors that trying again does not change."""
S3_TIMEOUTS = {"connect_timeout": 10, "read_timeout": 30, "retries": {"total_max_attempts": 1}}
"""Of one request, in seconds. Without retries of boto's own: 5 of its, 5 of s3fs's and ours made 200 s in all."""

T = TypeVar("T")


class Remote:
    """A folder on an object store. Names are relative to it, with ``/``. An object cannot be renamed or appended to.

    Every method raises ``RemoteError`` where the store does not answer or refuses.

    Args:
        has_answered: whether it is known to answer, as to the process that this one works for.
    """

    def __init__(self, place: str, has_answered: bool = False) -> None:
        from fsspec.core import url_to_fs

        self.place = place
        # fsspec keeps listings of folders, which would not show what other machines write.
        self._fs, self._root = url_to_fs(place, use_listings_cache=False, **one_try(place))
        if hasattr(self._fs, "retries"):
            self._fs.retries = 1  # s3fs's own tries; they are made here
        self._has_answered = has_answered
        self._failing_since: float | None = None
        """When the first of the operations failed that have failed since the last answer; of all threads."""

    def read(self, name: str) -> bytes | None:
        """The whole object; None where there is none."""
        data: bytes | None = self._call_or_none(name, lambda: self._fs.cat_file(self._path(name)))
        return data

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """The contents by name of those objects that exist, read in parallel."""
        if not names:
            return {}
        found = self._call("", lambda: self._read_many(names))
        if missing := [name for name in names if name not in found]:
            time.sleep(MISSING_SECONDS)
            found |= self._call("", lambda: self._read_many(missing))
        return found

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
                try:
                    return bool(self._fs.cat_file(self._path(name)) == data)
                except FileNotFoundError as error:
                    raise OSError("the object is said to exist, and cannot be read") from error
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
        paths = self._call_or_none(name, lambda: self._fs.find(self._path(name))) or []
        names = [path[start:] for path in paths]
        # raylora writes no name with .. in it; somebody else's must not lead out of the folder of downloads.
        return sorted(n for n in names if not n.endswith("/") and ".." not in PurePosixPath(n).parts)

    def remove(self, name: str) -> None:
        """Delete the object, or all below the name, if there are any."""
        assert name, "the whole folder is never removed: other things may lie in it"
        self._call_or_none(name, lambda: self._fs.rm(self._path(name), recursive=True))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")

    def _call_or_none(self, name: str, do: Callable[[], T]) -> T | None:
        """As ``_call``; None where ``do`` finds no such object."""
        try:
            return self._call(name, do)
        except RemoteError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def _call(self, name: str, do: Callable[[], T]) -> T:
        """Run one operation, again and again until the store is given up."""
        waits = itertools.chain([1.0, 2.0, 4.0], itertools.repeat(8.0))
        was_missing = False
        while True:
            try:
                return self._answered(do())
            except FileNotFoundError as error:
                if was_missing:
                    raise self._error(name, self._answered(error)) from error
                was_missing, wait = True, MISSING_SECONDS
            except Exception as error:
                wait = next(waits)
                if isinstance(error, FINAL_ERRORS) or self._is_given_up(wait):
                    raise self._error(name, error) from error
            time.sleep(wait)

    def _answered(self, answer: T) -> T:
        self._has_answered, self._failing_since = True, None
        return answer

    def _is_given_up(self, wait: float) -> bool:
        """Whether the store has not answered for so long that it is not asked again after ``wait`` seconds."""
        now = time.monotonic()
        # Counted for all operations together: else each of those at the end of a run would wait as long again.
        since = self._failing_since = self._failing_since or now
        return now + wait - since > (PATIENCE_SECONDS if self._has_answered else FIRST_PATIENCE_SECONDS)

    def _error(self, name: str, error: Exception) -> RemoteError:
        cause = reason(error) if isinstance(error, OSError) else one_line(error)
        return RemoteError(f"{self.place}/{name}".rstrip("/"), cause)


def one_try(place: str) -> dict[str, Any]:
    """Options of fsspec for S3 by which a request is sent once and does not wait for ever; what the user set, stays."""
    from fsspec.config import conf

    if place.partition("://")[0] not in {"s3", "s3a"}:
        return {}
    return {"config_kwargs": {**S3_TIMEOUTS, **conf.get("s3", {}).get("config_kwargs", {})}}
