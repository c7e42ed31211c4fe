"""Every exception of raylora. A user's mistake is one line that names the file, the place and the fix."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from enum import StrEnum


class ErrorKind(StrEnum):
    """What went wrong, for programs. An error row has it in ``error_kind``; the report has a fix for each."""

    # Of a dataset's file
    DATA = "data"
    TRUNCATED_FILE = "truncated_file"
    NOT_UTF8 = "not_utf8"
    BAD_RECORDS = "bad_records"
    CHAT_TEMPLATE = "chat_template"
    NO_SUPERVISED_TOKEN = "no_supervised_token"
    # Of what else is given
    USAGE = "usage"
    QUESTIONS = "questions"
    MODEL = "model"
    TARGET_MODULES = "target_modules"
    ADAPTER = "adapter"
    CHANGED_MEANWHILE = "changed_meanwhile"
    # Of a training
    DIVERGED = "diverged"
    BASE_CHANGED = "base_changed"
    # Of a machine
    OUT_OF_MEMORY = "out_of_memory"
    NODE_OUT_OF_MEMORY = "node_out_of_memory"
    DOES_NOT_FIT = "does_not_fit"
    GPU = "gpu"
    CACHE_FULL = "cache_full"
    TIMEOUT = "timeout"
    WORKER_DIED = "worker_died"
    NODE_LOST = "node_lost"
    # Of a run: in no row
    STORAGE = "storage"
    CLUSTER = "cluster"
    STOPPED = "stopped"

    UNKNOWN = "unknown"
    """An exception that is none of raylora's, or the row of a raylora that wrote no kinds."""

    @classmethod
    def _missing_(cls, value: object) -> ErrorKind:
        return cls.UNKNOWN


class RayloraError(Exception):
    """What all exceptions of raylora are. The text is for people, ``kind`` for programs; both survive pickling."""

    kind = ErrorKind.UNKNOWN

    def __init__(self, *args: object, kind: ErrorKind | None = None) -> None:
        super().__init__(*args)
        if kind is not None:
            self.kind = kind


class UserError(RayloraError, ValueError):
    """Something the user can fix. Its text is one line that names the file, the place and the fix."""

    kind = ErrorKind.USAGE


class MachineError(RayloraError):
    """This machine cannot do what is asked, where another one may: nothing that the data is to blame for."""


class TrainingDivergedError(UserError):
    """The loss is no number any more."""

    kind = ErrorKind.DIVERGED


class BadRecordError(RayloraError, ValueError):
    """Why a record cannot be used; ``place`` says where in it."""

    kind = ErrorKind.BAD_RECORDS

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(reason)
        self.place = place


class NotJsonError(RayloraError, ValueError):
    """Where text is no JSON: ``pos`` in the window, ``line`` and ``column`` in the file."""

    kind = ErrorKind.DATA

    def __init__(self, message: str, pos: int = 0, line: int = 1, column: int = 1) -> None:
        super().__init__(message)
        self.message, self.pos, self.line, self.column = message, pos, line, column


class RemoteError(RayloraError, OSError):
    """An object store did not do what it was asked. ``strerror`` names the object and the cause, in one line."""

    kind = ErrorKind.STORAGE

    def __init__(self, place: str, cause: str) -> None:
        super().__init__(errno.EIO, f"{place}: {cause}")
        self._of = (place, cause)

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str]]:
        return type(self), self._of


class OutOfMemoryError(RayloraError, RuntimeError):
    """An allocation failed in a worker, and nothing smaller could be tried: torch's error, or Python's."""

    kind = ErrorKind.OUT_OF_MEMORY


class DoesNotFitError(RayloraError, RuntimeError):
    """The model does not fit this GPU; another one may be larger, or free."""

    kind = ErrorKind.DOES_NOT_FIT


class BaseChangedError(RayloraError, RuntimeError):
    """The base's weights were harmed: a process of its own is needed to go on."""

    kind = ErrorKind.BASE_CHANGED


class StoppedError(RayloraError, RuntimeError):
    """The run ended before all rows were there; what is finished is kept."""

    kind = ErrorKind.STOPPED


class ClusterLostError(RayloraError, RuntimeError):
    """Ray itself went away, or parts of it that no retry brings back. What is stored is not lost."""

    kind = ErrorKind.CLUSTER


class WorkerFailedError(RayloraError):
    """A worker died, hung or raised; the text says how, in one line."""


class MachineFailedError(WorkerFailedError):
    """A worker could not do on its machine what could be done on the command's."""


class NodeLostError(WorkerFailedError):
    """A worker's node is gone, and the worker with it."""

    kind = ErrorKind.NODE_LOST


class CannotGoOnError(RayloraError):
    """Results cannot be kept, or no worker starts: trying again is of no use before somebody fixes that."""


class SinkError(RayloraError):
    """Carries the error that ends the run as its first argument: to the text of one Ray Data adds words of its own."""


def kind_of(error: BaseException) -> ErrorKind:
    return error.kind if isinstance(error, RayloraError) else ErrorKind.UNKNOWN


@contextlib.contextmanager
def errors_are(kind: ErrorKind) -> Iterator[None]:
    """A user's mistake that is found meanwhile, and has no closer kind, is of this one. A decorator as well."""
    try:
        yield
    except UserError as error:
        if error.kind is ErrorKind.USAGE:
            error.kind = kind
        raise


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
