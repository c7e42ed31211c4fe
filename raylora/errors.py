"""Every exception of raylora. A user's mistake is one line that names the file, the place and the fix."""

from __future__ import annotations

import errno
import re


class UserError(ValueError):
    """Something the user can fix. Its text is one line that names the file, the place and the fix."""


class MachineError(UserError):
    """This machine cannot do what is asked, where another one may: nothing that the data is to blame for."""


class TrainingDivergedError(UserError):
    """The loss is no number any more."""


class BadRecordError(ValueError):
    """Why a record cannot be used; ``place`` says where in it."""

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(reason)
        self.place = place


class NotJsonError(ValueError):
    """Where text is no JSON: ``pos`` in the window, ``line`` and ``column`` in the file."""

    def __init__(self, message: str, pos: int, line: int, column: int) -> None:
        super().__init__(message)
        self.message, self.pos, self.line, self.column = message, pos, line, column


class RemoteError(OSError):
    """An object store did not do what it was asked. ``strerror`` names the object and the cause, in one line."""

    def __init__(self, place: str, cause: str) -> None:
        super().__init__(errno.EIO, f"{place}: {cause}")
        self._of = (place, cause)

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str]]:
        return type(self), self._of


class DoesNotFitError(RuntimeError):
    """The model does not fit this GPU; another one may be larger, or free."""


class BaseChangedError(RuntimeError):
    """The base's weights were harmed: a process of its own is needed to go on."""


class StoppedError(RuntimeError):
    """The run ended before all rows were there; what is finished is kept."""


class ClusterLostError(RuntimeError):
    """Ray itself went away, or parts of it that no retry brings back. What is stored is not lost."""


class WorkerFailedError(Exception):
    """A worker died, hung or raised; the text says how, in one line."""


class MachineFailedError(WorkerFailedError):
    """A worker could not do on its machine what could be done on the command's."""


class NodeLostError(WorkerFailedError):
    """A worker's node is gone, and the worker with it."""


class CannotGoOnError(Exception):
    """Results cannot be kept, or no worker starts: trying again is of no use before somebody fixes that."""


# Their texts


def without_secrets(text: str) -> str:
    """A URI that may be shown: user, password and query are left out."""
    return re.sub(r"://\S*@", "://...@", re.sub(r"(://[^?\s]*)\?\S*", r"\1?...", text))


def one_line(error: BaseException) -> str:
    return without_secrets(" ".join(str(error).split())[:300]) or type(error).__name__


def reason(error: OSError) -> str:
    """Why something cannot be read: the system's words, or those of a library of fsspec."""
    if error.strerror:
        return str(error.strerror)
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return "No such file or directory" if missing else one_line(error)
