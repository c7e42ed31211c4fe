"""Places that users name: local paths, and URIs that fsspec can read (``s3://``, ``gs://``, ...).

Data and questions are read through ``location``: a local path stays a plain ``pathlib.Path``, a URI becomes a path of
universal-pathlib, which has the same methods. Results on an object store go through ``objects.Remote``. Credentials are
found by the libraries below fsspec (``AWS_PROFILE``, an instance's role, ...) and never pass through raylora.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast
from urllib.request import url2pathname

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, PlainValidator

from raylora.errors import ErrorKind, MachineError, RayloraError, UserError, one_line
from raylora.texts import without_secrets

_ARCHIVE = "what is inside an archive is not read: unpack it, and give its folder"
USELESS = {
    "memory": "memory:// is one process's own, and a run has several: give a folder, or s3://bucket/folder",
    **dict.fromkeys(("zip", "tar", "libarchive"), _ARCHIVE),
}
"""What is said of protocols that fsspec has and a run cannot use."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""By protocol, the extra of raylora that installs its package."""


@contextlib.contextmanager
def writing(option: str, place: Path) -> Iterator[None]:
    """For code that writes to a place that the user gave with ``option``.

    Raises:
        UserError: in place of an ``OSError``; one line that names the option and the place.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {place}: cannot be written to: {error.strerror}") from error


def location(text: str | Path) -> Path:
    """A place as users write it: a local path (``~`` and ``file://`` too), or a URI as a path with pathlib's methods.

    Raises:
        UserError: the URI holds a password or a query, its protocol is unknown or of no use here, or the package for it
            is missing.
    """
    if not isinstance(text, str):
        if not hasattr(text, "joinpath"):  # a number or nothing, out of a YAML file
            raise UserError("expected a path")
        return expanded(text) if isinstance(text, Path) else text
    if "://" not in text:
        return expanded(Path(text))
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

    path = UPath(text.rstrip("/"), use_listings_cache=False)  # as in objects.Remote
    if protocol not in EXTRAS:  # these two need no more than the URI
        try:
            path.fs.protocol  # noqa: B018 - makes the file system
        except Exception as error:  # whatever a file system of fsspec raises that lacks a host, a name, ...
            raise UserError(f"{text}: {protocol}:// cannot be used here: {one_line(error)}") from error
    return cast(Path, path)


def expanded(path: Path) -> Path:
    """A local path with the home folder in place of a leading ``~``, as a shell does it; others as they are."""
    return Path(os.path.expanduser(path)) if str(path).startswith("~") else path  # noqa: PTH111 - keeps an unknown ~x


def _check_protocol(text: str, protocol: str) -> None:
    from fsspec import get_filesystem_class

    if use := USELESS.get(protocol):
        raise UserError(f"{text}: {use}")
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        fix = f"pip install 'raylora[{extra}]'" if extra else one_line(error)
        raise UserError(f"{text}: needs a package more: {fix}") from None
    except ValueError:
        raise UserError(f"{text}: {protocol}:// is no protocol that fsspec knows") from None


def check_regular(path: Path) -> None:
    """Check that a local path is no pipe, socket or device: what a run reads is read again, and a pipe may never end.

    Raises:
        UserError: it is one. What cannot be looked at raises nothing: opening it will say why.
    """
    if is_remote(path):
        return
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a null character in its name
        return
    if not stat.S_ISDIR(mode):
        _check_mode(path, mode)


def _check_mode(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: a pipe or a device, which cannot be read twice: write its content into a file")


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read, which must be no pipe, socket or device. Asked of what was opened: a name may be swapped.

    Raises:
        UserError: it is one.
        OSError, ValueError: it cannot be opened.
    """
    if is_remote(path):
        return cast(BinaryIO, path.open("rb"))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer does not wait
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        _check_mode(path, mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path) -> bytes:
    """What a file holds; raises as ``open_regular``."""
    with open_regular(path) as file:
        return file.read()


def local_path(value: Any) -> Any:
    """Of an option that takes no URI: its text as a path, with ``~`` expanded. Other values as they are.

    Raises:
        ValueError: it is a URI, such as ``s3://...``.
    """
    if "://" in str(value):
        raise ValueError("only what lies on this machine is read here: copy it first")
    return expanded(Path(value)) if isinstance(value, str | Path) else value


LocalPath = Annotated[Path, BeforeValidator(local_path)]
"""An option that is a place on this machine."""


def is_remote(path: object) -> bool:
    """Whether a place is a URI's path, or a name on a hub, and not a local path."""
    return not isinstance(path, Path)


def _validate_uri(text: str | None) -> str | None:
    if text is not None and "://" in text:
        location(text)
    return text


Location = Annotated[Path, PlainValidator(location, json_schema_input_type=str), PlainSerializer(str, when_used="json")]
"""An option that is a place."""
LocationText = Annotated[str, AfterValidator(_validate_uri)]
"""An option that may be a place or a name that raylora knows, such as ``demo``."""


def cache_folder() -> Path:
    """This machine's folder for files that can be made again: ``RAYLORA_CACHE``, or ``~/.cache/raylora``."""
    return Path(os.environ.get("RAYLORA_CACHE") or Path.home() / ".cache" / "raylora")


def cache_error(what: str, error: BaseException) -> MachineError:
    """The error of a cache that has no room for what is needed there."""
    cause = getattr(error, "strerror", None) or one_line(error)
    text = f"{cache_folder()}: cannot keep {what} here: {cause}; set RAYLORA_CACHE to a folder with room"
    return MachineError(text, kind=ErrorKind.CACHE_FULL)


@contextlib.contextmanager
def caching(what: str) -> Iterator[None]:
    """For code that writes to the cache what cannot be done without.

    Raises:
        MachineError: in place of an ``OSError``; one line that names the cache.
    """
    try:
        yield
    except OSError as error:
        raise cache_error(what, error) from error


@contextlib.contextmanager
def reading(path: object) -> Iterator[None]:
    """For code that reads a place: whatever a client library raises of a remote one becomes one line.

    Raises:
        UserError: no credentials, no such host, ...
        OSError: as it was raised.
    """
    try:
        yield
    except (RayloraError, OSError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error
