"""Examples kept on disk are those kept in memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.data import examples
from raylora.data.datasets import read_dataset, sample_examples
from raylora.records import Example, Message
from tests.helpers.formats import PAIRS


def test_examples_on_disk_are_those_in_memory(tmp_path, on_disk, monkeypatch):
    content = [
        *({"question": q, "answer": a} for q, a in PAIRS),
        {"context_text": "Cats purr.", "qa_pairs": [{"question": "Who?", "output": "Cats \u2028 é 😀"}] * 2},
        {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant", "user", "assistant")]},
        {"text": "A text of no question."},
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "content": "R"},
                {"role": "assistant", "content": "bad", "weight": 0},
                {"role": "user", "content": "Again"},
                {"role": "assistant", "content": "A"},
            ],
            "tools": [{"name": "f"}],
        },
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    stored = read_dataset(path)
    assert not isinstance(stored.examples, tuple)
    assert list((tmp_path / "cache").iterdir()) == []  # the file has no name
    monkeypatch.setattr(examples, "MEMORY_CHARS", 10**9)
    kept = read_dataset(path)
    assert isinstance(kept.examples, tuple)
    assert tuple(stored.examples) == kept.examples
    assert stored.examples[-1] == kept.examples[-1]
    assert tuple(stored.examples[3:30:7]) == kept.examples[3:30:7]
    assert stored.seed == kept.seed
    for size in (0, 1, 7, 1000):
        assert list(sample_examples(stored.examples, size, 5)) == list(sample_examples(kept.examples, size, 5))
    with pytest.raises(IndexError):
        stored.examples[len(stored.examples)]


def test_examples_go_to_disk_where_they_are_too_many(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(examples, "MEMORY_CHARS", 40)
    few = [Example((Message("user", "q" * 9),), "a", "q" * 9)] * 4
    assert isinstance(examples.keep_examples(few), tuple)
    stored = examples.keep_examples([*few, *few])
    assert isinstance(stored, examples.StoredExamples)
    assert list(stored) == [*few, *few]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=32, max_size=32) | st.just(bytes(32)), min_size=1, max_size=9))
def test_rows_are_sorted_as_bytes_are(rows):
    order = examples.sorted_rows(np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 32))
    assert order.tolist() == sorted(range(len(rows)), key=lambda i: rows[i])
