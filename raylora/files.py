"""Places that users name: local paths, and what fsspec reads (``s3://``, ``gs://``, ...). The only importer of fsspec.

Data and questions are read through ``location``: a local path stays a plain ``pathlib.Path``, a URI becomes a path of
universal-pathlib, which has the same methods. Results on an object store are written and read through ``Remote``, a
handful of operations on whole objects, each of which happens or does not. Credentials come from where the libraries
of fsspec look for them (``AWS_PROFILE``, an instance's role, ...), never through here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar, cast
from urllib.request import url2pathname

from pydantic import AfterValidator, PlainSerializer, PlainValidator

from raylora.records import UserError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""The extra of raylora that a protocol needs."""
MAX_TRIES = 5
"""Of an operation on an object store that has answered before; each wait is twice as long as the last, from 1 s."""
NEVER = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
"""What no second try changes."""

T = TypeVar("T")


class RemoteError(OSError):
    """An object store did not do what it was asked. ``strerror`` names the object and the cause, in one line."""

    def __init__(self, place: str, cause: str) -> None:
        super().__init__(errno.EIO, f"{place}: {cause}")
        self._of = (place, cause)

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str]]:
        return type(self), self._of


@contextlib.contextmanager
def writing(option: str, place: Path) -> Iterator[None]:
    """Around what writes to a place that the user gave: what cannot be written is a line that names the option."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {place}: cannot be written to: {error.strerror}") from error


# Places


def location(text: str | Path) -> Path:
    """A place as users write it: a local path (``file://`` too), or a URI as a path with pathlib's methods.

    Raises:
        UserError: the URI holds a password or a query, its protocol is unknown, or the package for it is missing.
    """
    if not isinstance(text, str):
        if not hasattr(text, "joinpath"):  # a number or nothing, out of a YAML file
            raise UserError("expected a path")
        return text
    if "://" not in text:
        return Path(text)
    protocol, _, rest = text.partition("://")
    if "?" in rest or ":" in rest.rpartition("@")[0]:
        raise UserError(
            f"{without_secrets(text)}: no password and no query may stand in it: they would end up in logs; give "
            "credentials in the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS)"
        )
    if protocol == "file":
        return Path(url2pathname(rest.removeprefix("localhost")))
    _check_protocol(text, protocol)
    from upath import UPath

    return cast(Path, UPath(text.rstrip("/"), use_listings_cache=False))  # see Remote


def _check_protocol(text: str, protocol: str) -> None:
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        mend = f"pip install 'raylora[{extra}]'" if extra else one_line(error)
        raise UserError(f"{text}: needs a package more: {mend}") from None
    except ValueError:
        raise UserError(f"{text}: {protocol}:// is no protocol that fsspec knows") from None


def is_remote(path: Path) -> bool:
    """Whether a location is no path of this machine."""
    return not isinstance(path, Path)


def without_secrets(text: str) -> str:
    """A URI that may be shown: user, password and query are left out."""
    return re.sub(r"://\S*@", "://...@", re.sub(r"(://[^?\s]*)\?\S*", r"\1?...", text))


def _checked(text: str | None) -> str | None:
    if text is not None and "://" in text:
        location(text)
    return text


Location = Annotated[Path, PlainValidator(location), PlainSerializer(str, when_used="json")]
"""An option that is a place."""
LocationText = Annotated[str, AfterValidator(_checked)]
"""An option that may be a place, or a name of ours."""


def cache_folder() -> Path:
    """Where this machine keeps what can be made again: ``RAYLORA_CACHE``, or ``~/.cache/raylora``."""
    return Path(os.environ.get("RAYLORA_CACHE") or Path.home() / ".cache" / "raylora")


# What goes wrong


def one_line(error: BaseException) -> str:
    return without_secrets(" ".join(str(error).split())[:300]) or type(error).__name__


def reason(error: OSError) -> str:
    """Why something cannot be read: the system's words, or those of a library of fsspec."""
    if error.strerror:
        return str(error.strerror)
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return "No such file or directory" if missing else one_line(error)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """While something remote is read: what a client library raises becomes one line.

    Raises:
        UserError: no credentials, no such host, ...; an ``OSError`` stays what it is.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error


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
