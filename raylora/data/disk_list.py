"""Pieces of bytes by number: in memory while they are few, then in a temporary file without a name.

Such a file is gone when its process is, however that ends: nothing is left to clean up, and nothing can be stale.
"""

from __future__ import annotations

import threading
from array import array
from tempfile import SpooledTemporaryFile

from raylora.errors import ErrorKind, MachineError
from raylora.storage.places import cache_folder

MEMORY_BYTES = 16 << 20
"""More than this goes to disk."""


class DiskList:
    """An append-only list of byte strings. Eight bytes a piece stay in memory."""

    def __init__(self) -> None:
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _no_room(error) from None
        self._file = SpooledTemporaryFile(max_size=MEMORY_BYTES, dir=str(folder))  # noqa: SIM115 - it lives as long as we do
        self._ends = array("q", [0])
        self._lock = threading.Lock()

    def append(self, piece: bytes) -> None:
        """Add a piece. All are added before the first is read.

        Raises:
            MachineError: the disk is full.
        """
        try:
            self._file.write(piece)
        except OSError as error:
            raise _no_room(error) from None
        self._ends.append(self._ends[-1] + len(piece))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> bytes:
        begin, end = self._ends[number], self._ends[number + 1]
        with self._lock:
            try:
                self._file.seek(begin)  # writes out what a full disk may refuse
                return self._file.read(end - begin)
            except OSError as error:
                raise _no_room(error) from None


def _no_room(error: OSError) -> MachineError:
    text = f"{cache_folder()}: cannot keep a large dataset here: {error.strerror}"
    return MachineError(f"{text}; set RAYLORA_CACHE to a folder with room", kind=ErrorKind.CACHE_FULL)
