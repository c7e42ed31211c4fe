"""What a failure is known by."""

from __future__ import annotations

from raylora.cluster.failures import store_failure
from raylora.errors import MachineError
from raylora.storage.store import Store


def test_a_full_disk_is_known_by_whoever_says_it(tmp_path):
    from safetensors import SafetensorError

    store = Store(tmp_path)
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "No space left on device: make room" in str(store_failure(full, store))
    wrapped = RuntimeError("could not be saved")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert store_failure(wrapped, store)
    assert "Read-only file system: make room elsewhere" in str(store_failure(OSError(30, "read-only"), store))
    assert "Input/output error: look at the disk" in str(store_failure(OSError(5, "broken"), store))
    assert store_failure(RuntimeError("something else (os error 2)"), store) is None
    elsewhere = MachineError("/tmp/spool: No space left on device")
    elsewhere.__cause__ = OSError(28, "No space left on device")
    assert store_failure(elsewhere, store) is None, "the cache's disk is not that of the results"
