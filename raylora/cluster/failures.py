"""What an error says of the place where results are kept."""

from __future__ import annotations

import errno
import os
import re

from raylora.errors import CannotGoOnError, ErrorKind, MachineError, RemoteError
from raylora.storage.store import Store

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""What the system says where no result can be kept."""


def store_failure(error: BaseException | None, store: Store) -> CannotGoOnError | None:
    """What an error, or what it came from, says of the store; None where it says nothing of it."""
    while error is not None and not isinstance(error, MachineError):  # whose own disks may be full
        if isinstance(error, RemoteError):
            return CannotGoOnError(error.strerror, kind=ErrorKind.STORAGE)
        if (number := _error_number(error)) in NO_ROOM:
            return CannotGoOnError(f"{store.root}: {os.strerror(number)}: make room", kind=ErrorKind.STORAGE)
        error = error.__cause__ or error.__context__
    return None


def _error_number(error: BaseException) -> int:
    """The system's number of an error; safetensors, written in Rust, has it in its text alone."""
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(in_text[1]) if in_text else 0)
