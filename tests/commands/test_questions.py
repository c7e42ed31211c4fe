"""``raylora questions mmlu``, with a server of this machine in the hub's place."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylora.mmlu.questions import load_questions

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [
    {"question": f"What is {i}?", "subject": s, "choices": ["ä", "two", "three", "four"], "answer": i % 4}
    for s in ("anatomy", "virology")
    for i in range(3)
]


@pytest.fixture
def hub(tmp_path):
    """Serves the files of a folder as the hub serves those of a dataset; yields its address."""
    folder = tmp_path / "hub"
    (folder / "all").mkdir(parents=True)
    for split, rows in (("test", ROWS), ("dev", ROWS[:2])):
        pq.write_table(pa.Table.from_pylist(rows), folder / "all" / f"{split}-00000-of-00001.parquet")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self._answer(with_body=False)

        def do_GET(self):
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = folder / self.path.partition("/resolve/main/")[2]
            if not self.path.startswith("/datasets/cais/mmlu/resolve/main/") or not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = path.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(folder: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    program = "from raylora.commands.run_command import program; program()"
    command = [sys.executable, "-c", program, "questions", "mmlu", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=folder, timeout=200
    )


def test_both_splits_lie_where_they_are_looked_for(hub, tmp_path):
    result = run(tmp_path, hub)
    assert result.returncode == 0, result.stderr
    assert "test_all_subjects.json: 6 questions of 2 subjects" in result.stdout
    test, dev = (tmp_path / "mmlu_dataset" / f"{split}_all_subjects.json" for split in ("test", "dev"))
    assert [q.choices[0] for q in load_questions(test)] == ["ä"] * 6
    assert json.loads(dev.read_text()) == ROWS[:2]
    assert sorted(path.name for path in (tmp_path / "mmlu_dataset").iterdir()) == [dev.name, test.name]


@pytest.mark.parametrize("what", [pytest.param("no server", marks=pytest.mark.slow), "no revision"])
def test_a_hub_that_has_nothing_is_one_line(hub, tmp_path, what):
    endpoint, revision = ("http://127.0.0.1:9", "main") if what == "no server" else (hub, "nowhere")
    result = run(tmp_path, endpoint, "--revision", revision)
    assert result.returncode == 2, result.stdout
    assert "cais/mmlu" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "mmlu_dataset").exists()
