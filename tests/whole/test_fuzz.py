"""Readers against broken input: a result or one line that names the file, soon, and never anything else."""

from __future__ import annotations

import io
import json
import random
import re
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylora.config.run import load_config
from raylora.data.datasets import read_dataset
from raylora.data.record_forms import FORMS
from raylora.errors import UserError
from raylora.mmlu.question_set import DEMO_QUESTIONS
from raylora.mmlu.questions import load_questions
from tests.helpers.dataset_files import KINDS

DEMO = DEMO_QUESTIONS.parent
MARKS = [
    b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b"null", b"NaN",
    b"1e999", b"\\ud800", b"-", b"[[[[", b'{"messages":', b'{"a":' * 50, "é".encode(), "\u2028".encode(),
    b"!!python/object:os.system", b"&a [*a, *a]", b"\t", b"- ", b"%", b"\r\n",
]  # fmt: skip


PLACE = re.compile(r"\b(line|byte|record|question|column|row|row group) \d+|[\w ]+: .*, got |in .*\.yaml")
WHOLE = re.compile(
    r"empty|no (JSON|CSV|Parquet|Arrow|question|record)|none of its|not YAML|lines, found|ends|holds|mapping|must|needs"
)
"""What a message names: a place, or what is wrong with the whole file."""


def sources() -> list[tuple[str, bytes]]:
    """Small real files: each format of datasets, questions, and configurations."""
    found = []
    for path in sorted((DEMO / "chunk_demo").iterdir()):
        raw = path.read_bytes()
        try:
            records = json.loads(raw)
            small = json.dumps(records[:3] if isinstance(records, list) else records)[:4000].encode()
        except ValueError:
            small = b"\n".join(raw.splitlines()[:3])
        found.append((path.suffix, small))
    for form in FORMS:
        found.append((".json", json.dumps([form.example] * 2).encode()))
    found.append((".jsonl", b"\n".join(json.dumps(form.example).encode() for form in FORMS)))
    found.append((".jsonl", b"\n".join([json.dumps(FORMS[0].example["messages"]).encode()] * 3)))
    turns = [{**FORMS[0].example, "date": None}] * 3
    pairs = [{"question": f"{i}+{i}?", "answer": str(2 * i), "history": None} for i in range(4)]
    for name, make in KINDS.items():  # each kind of file, of text and of nested columns
        found += [(ending_of(name), make(pairs))] * 2
        found.append((ending_of(name), make(turns)))
        found.append((f"shards/train-0{ending_of(name)}", make(pairs)))
    questions = json.loads((DEMO / "questions.json").read_text())[:4]
    found.append(("questions.json", json.dumps(questions).encode()))
    found.append(("questions.csv", b'"What?",a,b,c,d,A\n"Why, then?",1,2,3,4,B\n'))
    table = pa.Table.from_pylist([{k: q[k] for k in ("subject", "question", "choices", "answer")} for q in questions])
    for compression in ("none", "snappy"):
        pq.write_table(table, out := io.BytesIO(), compression=compression)
        found.append(("questions.parquet", out.getvalue()))
    found.append(("questions/test/a.parquet", out.getvalue()))
    found.append(("questions/test/a_test.csv", b'"What?",a,b,c,d,A\n'))
    for path in sorted((DEMO.parents[1] / "configs").glob("*.yaml")):
        found.append((".yaml", path.read_bytes()))
    return found


def ending_of(name: str) -> str:
    return name[name.index(".") :]


def mutate(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(out) + 1)
        kind = rng.randrange(7)
        if kind == 0:
            out[place : place + rng.choice((1, 1, 5, 50))] = b""
        elif kind == 1:
            out[place:place] = rng.choice(MARKS)
        elif kind == 2 and out:
            out[min(place, len(out) - 1)] = rng.randrange(256)
        elif kind == 3:
            del out[place:]
        elif kind == 4:
            end = rng.randrange(len(out) + 1)
            out[place:place] = out[min(place, end) : max(place, end)][:2000]
        elif kind == 5:
            out[place : place + 1] = rng.choice(MARKS)
        else:
            del out[: rng.randrange(min(len(out), 20) + 1)]
    return bytes(out)


def read(kind: str, path: Path, salvage: bool) -> None:
    if kind == ".yaml":
        load_config(["--config", str(path)])
    elif kind.startswith("questions/"):
        load_questions(path.parents[1])
    elif kind.startswith("questions"):
        load_questions(path)
    else:
        names = {"question": "answer", "answer": "question"} if len(path.name) % 2 else None
        read_dataset(path.parent if kind.startswith("shards") else path, salvage, columns=names)


def check(folder: Path, num_inputs: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    counts = {"read": 0, "refused": 0}
    known = sources()
    for _ in range(num_inputs):
        kind, data = rng.choice(known)
        path = folder / kind if "/" in kind else folder / (f"fuzz{kind}" if kind.startswith(".") else kind)
        for old in [*folder.glob("questions/test/*"), *folder.glob("shards/*")]:
            old.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mutate(rng, data))
        started = time.thread_time()  # of this thread: a busy machine takes its time
        try:
            read(kind, path, salvage=rng.random() < 0.3)
            counts["read"] += 1
        except UserError as error:
            counts["refused"] += 1
            message = str(error)
            assert "\n" not in message, (message, path.read_bytes())
            is_of_folder = "shards: none of its" in message or "questions: no question in it" in message
            named = folder / kind.partition("/")[0] if is_of_folder else path
            assert named.name in message, (message, path.read_bytes())
            assert PLACE.search(message) or WHOLE.search(message), f"what place? {message}"
            assert len(message) < 1500
        except Exception as error:
            raise AssertionError(f"seed {seed}: {kind}: {path.read_bytes()!r}") from error
        assert time.thread_time() - started < 5, path.read_bytes()  # some milliseconds
    return counts


def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_NAME", "demo")
    counts = check(tmp_path, 600, seed=0)
    assert min(counts.values()) > 30, counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_twenty_thousand_mutated_files(tmp_path, monkeypatch, seed):
    monkeypatch.setenv("MODEL_NAME", "demo")
    assert sum(check(tmp_path, 2000, seed).values()) == 2000
