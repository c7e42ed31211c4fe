"""Errors that mean that no result can be stored: a full or read-only disk, an object store that does not work."""

from __future__ import annotations

import errno
import os
import re

from raylora.errors import CannotGoOnError, ErrorKind, MachineError, RemoteError
from raylora.storage.store import Store

FIXES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "make room elsewhere, or mount it for writing again",
    errno.EIO: "look at the disk",
}
"""What to do, by the system's error numbers for that: full, the quota is used up, read-only, damaged."""


def store_failure(error: BaseException | None, store: Store) -> CannotGoOnError | None:
    """The error that ends the run, if ``error`` or a cause of it means that the store cannot be written; else None."""
    # A MachineError is not about the store: what is full is a worker's own disk, such as that of its cache.
    while error is not None and not isinstance(error, MachineError):
        if isinstance(error, RemoteError):
            return CannotGoOnError(error.strerror, kind=ErrorKind.STORAGE)
        if fix := FIXES.get(number := _error_number(error)):
            return CannotGoOnError(f"{store.root}: {os.strerror(number)}: {fix}", kind=ErrorKind.STORAGE)
        error = error.__cause__ or error.__context__
    return None


def _error_number(error: BaseException) -> int:
    """An error's ``errno``, or 0. Errors of safetensors, which is written in Rust, have it only in their text."""
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(in_text[1]) if in_text else 0)
