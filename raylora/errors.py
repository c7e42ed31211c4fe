"""Every exception of raylora. The text of a user's mistake is one line that names the file, the place and the fix."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from enum import StrEnum

from raylora.texts import without_secrets


class ErrorKind(StrEnum):
    """What went wrong, for programs. An error row has it in ``error_kind``; the report says what to do about each."""

    # A dataset's file
    DATA = "data"
    TRUNCATED_FILE = "truncated_file"
    NOT_UTF8 = "not_utf8"
    BAD_RECORDS = "bad_records"
    CHAT_TEMPLATE = "chat_template"
    NO_SUPERVISED_TOKEN = "no_supervised_token"
    # Other input: options, questions, models, adapters
    USAGE = "usage"
    QUESTIONS = "questions"
    MODEL = "model"
    TARGET_MODULES = "target_modules"
    ADAPTER = "adapter"
    CHANGED_MEANWHILE = "changed_meanwhile"
    DATASET_GONE = "dataset_gone"
    # A training
    DIVERGED = "diverged"
    BASE_CHANGED = "base_changed"
    # A machine
    OUT_OF_MEMORY = "out_of_memory"
    NODE_OUT_OF_MEMORY = "node_out_of_memory"
    DOES_NOT_FIT = "does_not_fit"
    GPU = "gpu"
    CACHE_FULL = "cache_full"
    TIMEOUT = "timeout"
    WORKER_DIED = "worker_died"
    NODE_LOST = "node_lost"
    # A whole run: in no row
    STORAGE = "storage"
    CLUSTER = "cluster"
    STOPPED = "stopped"

    UNKNOWN = "unknown"
    """An exception that is not raylora's own, or a row that an older version wrote, without a kind."""

    @classmethod
    def _missing_(cls, value: object) -> ErrorKind:
        return cls.UNKNOWN


class RayloraError(Exception):
    """The base class of raylora's exceptions. The text is for people, ``kind`` for programs; both survive pickling.

    No secret is in the text, whatever it is made of.
    """

    kind = ErrorKind.UNKNOWN

    def __init__(self, *args: object, kind: ErrorKind | None = None) -> None:
        super().__init__(*(without_secrets(arg) if isinstance(arg, str) else arg for arg in args))
        if kind is not None:
            self.kind = kind


class OneLineError(RayloraError):
    """One whose text says all: a notebook shows it without a traceback, as the commands do."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class UserError(OneLineError, ValueError):
    """Something the user can fix. Its text is one line that names the file, the place and the fix."""

    kind = ErrorKind.USAGE


class HubError(RayloraError):
    """A push failed. The text is one line; ``of_all``: no other repository can be pushed to either."""

    def __init__(self, text: str, of_all: bool = False) -> None:
        super().__init__(text, of_all)
        self.text, self.of_all = text, of_all

    def __str__(self) -> str:
        return self.text


class NoRepositoryError(UserError):
    """The hub has no such dataset, or does not show it."""


class NoRevisionError(UserError):
    """A dataset of the hub has no such branch, tag or commit."""


class NoFilesError(UserError):
    """The repository holds no file of a dataset that is read here."""


class MachineError(OneLineError):
    """This machine cannot do the work, and another one may: the data is not the cause.

    Attributes:
        of_dataset: the cause is one dataset's, and others may be read here.
    """

    of_dataset = False


class DatasetError(MachineError):
    """A dataset is not what the run was planned with: it is gone, or was changed, at least on this machine."""

    of_dataset = True


class TemplateLimitError(UserError):
    """A chat template made a far longer text of a conversation than it was told."""

    kind = ErrorKind.CHAT_TEMPLATE


class TrainingDivergedError(UserError):
    """A training's loss became infinite or NaN."""

    kind = ErrorKind.DIVERGED


class BadRecordError(RayloraError, ValueError):
    """A record cannot be used. The text says why, ``place`` where in the record."""

    kind = ErrorKind.BAD_RECORDS

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(reason)
        self.place = place


class NotJsonError(RayloraError, ValueError):
    """Text is not JSON from here on: ``pos`` in the part that was parsed, ``line`` and ``column`` in the file."""

    kind = ErrorKind.DATA

    def __init__(self, message: str, pos: int = 0, line: int = 1, column: int = 1) -> None:
        super().__init__(message)
        self.message, self.pos, self.line, self.column = message, pos, line, column


class RemoteError(RayloraError, OSError):
    """An operation on an object store failed. ``strerror`` names the object and the cause, in one line."""

    kind = ErrorKind.STORAGE

    def __init__(self, place: str, cause: str) -> None:
        super().__init__(errno.EIO, f"{place}: {cause}")
        self._arguments = (place, cause)

    # OSError would be unpickled with its own arguments, the number and the text.
    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str]]:
        return type(self), self._arguments


class LockLostError(RemoteError):
    """Another run took the output over, or may have: this one writes nothing more."""


class OutOfMemoryError(RayloraError, RuntimeError):
    """An allocation of torch or Python failed in a worker, and no smaller batch was left to try."""

    kind = ErrorKind.OUT_OF_MEMORY


class DoesNotFitError(RayloraError, RuntimeError):
    """The model does not fit into the free memory of this GPU; another one may be larger, or less used."""

    kind = ErrorKind.DOES_NOT_FIT


class BaseChangedError(RayloraError, RuntimeError):
    """A stage changed the base model: only a new process, which loads it again, can go on."""

    kind = ErrorKind.BASE_CHANGED


class DamagedError(RayloraError, ValueError):
    """A product of an earlier run is not what was written: it is made again."""

    kind = ErrorKind.STORAGE


class PartialInputError(RayloraError, RuntimeError):
    """A module got a part of a pass's tokens only, as experts do: groups of tokens cannot be followed there."""


class StoppedError(OneLineError, RuntimeError):
    """The run ended before every experiment had a row; what is finished is kept."""

    kind = ErrorKind.STOPPED


class ClusterLostError(RayloraError, RuntimeError):
    """Ray failed in a way that no retry repairs. What is stored is not lost."""

    kind = ErrorKind.CLUSTER


class WorkerFailedError(RayloraError):
    """A worker died, hung or raised; the text says how, in one line."""


class MachineFailedError(WorkerFailedError):
    """A worker raised MachineError: its machine cannot do the work, and another one may.

    Attributes:
        of_dataset: see ``MachineError``.
    """

    def __init__(self, *args: object, kind: ErrorKind | None = None, of_dataset: bool = False) -> None:
        super().__init__(*args, kind=kind)
        self.of_dataset = of_dataset


class NodeLostError(WorkerFailedError):
    """A worker's node is gone, and the worker with it."""

    kind = ErrorKind.NODE_LOST


class CannotGoOnError(RayloraError):
    """Results cannot be stored, or no worker starts: the run ends, as each further try would fail as well."""


class SinkError(RayloraError):
    """Carries the error that ends the run as its first argument, as Ray Data adds words of its own to a text."""


def kind_of(error: BaseException) -> ErrorKind:
    """An exception's kind; UNKNOWN if it is not raylora's."""
    return error.kind if isinstance(error, RayloraError) else ErrorKind.UNKNOWN


@contextlib.contextmanager
def errors_are(kind: ErrorKind) -> Iterator[None]:
    """Give each UserError that is raised inside, and has no kind of its own, this one. A decorator as well."""
    try:
        yield
    except UserError as error:
        if error.kind is ErrorKind.USAGE:
            error.kind = kind
        raise


# The texts of errors


def one_line(error: BaseException) -> str:
    """An error's text on one line, its first 300 characters, without secrets; its type's name if it has no text."""
    return without_secrets(" ".join(str(error).split()))[:300] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's text, up to 300 characters: texts of Ray's errors hold whole tracebacks."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def reason(error: OSError) -> str:
    """Why a file cannot be read: the system's text, or the error's own where a library of fsspec gives no such text."""
    if error.strerror:
        return str(error.strerror)
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return "No such file or directory" if missing else one_line(error)
