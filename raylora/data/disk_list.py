"""A list of byte strings: in memory while it is small, then in a temporary file without a name.

The system deletes a file without a name when its process ends, however it ends, so that there is nothing to clean up.
"""

from __future__ import annotations

import threading
from array import array
from tempfile import SpooledTemporaryFile

from raylora.storage.places import cache_error, cache_folder, caching

MEMORY_BYTES = 16 << 20
"""A list of more bytes than this, 16 MiB, goes to disk."""


class DiskList:
    """An append-only list of byte strings. Eight bytes an item, its end in the file, stay in memory.

    Raises:
        MachineError: the cache folder cannot be made.
    """

    def __init__(self) -> None:
        folder = cache_folder()
        with caching("a large dataset"):
            folder.mkdir(parents=True, exist_ok=True)
        self._file = SpooledTemporaryFile(max_size=MEMORY_BYTES, dir=str(folder))  # noqa: SIM115 - open as long as the list lives
        self._ends = array("q", [0])
        self._lock = threading.Lock()

    def append(self, item: bytes) -> None:
        """Add an item. All are added before the first is read, as reading moves the file's position.

        Raises:
            MachineError: the disk is full.
        """
        try:
            self._file.write(item)
        except OSError as error:
            raise cache_error("a large dataset", error) from None
        self._ends.append(self._ends[-1] + len(item))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> bytes:
        """The item at ``number``. Raises UserError where the disk is full."""
        begin, end = self._ends[number], self._ends[number + 1]
        with self._lock:
            try:
                self._file.seek(begin)  # the first time it writes what is buffered, and a full disk may refuse that
                return self._file.read(end - begin)
            except OSError as error:
                raise cache_error("a large dataset", error) from None
