"""What is kept on disk takes no memory, and a disk without room is one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from raylora.data import examples
from raylora.data.datasets import read_dataset
from raylora.errors import ErrorKind, MachineError
from raylora.planning.plan import DEMO_FOLDER


def test_a_disk_without_room_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(examples, "MEMORY_CHARS", 0)
    with pytest.raises(MachineError, match="RAYLORA_CACHE") as raised:
        read_dataset(DEMO_FOLDER / "chunk_demo" / "country_facts.json")
    assert raised.value.kind is ErrorKind.CACHE_FULL


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """100,000 records against 20,000: as Python objects, 80,000 more take 400 MB; on disk they must not take 60."""
    from benchmarks.load import write_dataset

    script = """
import sys
from pathlib import Path
from raylora.data.datasets import read_dataset, sample_examples
from raylora.data.encoding import StoredEncoded, encode_each
from tests.helpers.tiny import make_tokenizer
dataset = read_dataset(Path(sys.argv[1]))
ordered = sample_examples(dataset.examples, 0, dataset.seed)
encoded = StoredEncoded(encode_each(make_tokenizer(), ordered, 1024))
assert len(encoded) == len(dataset.examples) == int(sys.argv[2])
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""
    peaks = []
    for num in (20_000, 100_000):
        path = write_dataset(tmp_path / f"{num}.json", num)
        command = [sys.executable, "-c", script, str(path), str(num)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024)
    assert peaks[1] - peaks[0] < 60
