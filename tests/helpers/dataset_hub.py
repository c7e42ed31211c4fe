"""A server of this machine in the place of the Hugging Face hub: folders as repositories of datasets."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_that_must_stand_nowhere"


@dataclass
class Repository:
    """Files by branch, and whether a token is needed to see them."""

    branches: dict[str, dict[str, bytes]]
    needs: str = ""
    """``private`` or ``gated``; empty: for all."""

    def commit(self, branch: str) -> str:
        """Of what the branch holds now."""
        found = hashlib.sha1(branch.encode())
        for name, data in sorted(self.branches[branch].items()):
            found.update(name.encode() + b"\0" + data)
        return found.hexdigest()

    def find(self, revision: str) -> str | None:
        """The branch by its name or by its commit."""
        return next((b for b in self.branches if revision in {b, self.commit(b)}), None)


@dataclass
class Hub:
    """What the server has, and what it was asked for."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """Method and path."""
    endpoint: str = ""
    code_of_missing: str = "RepoNotFound"
    """How it names a repository that is not there."""

    def add(self, name: str, files: Mapping[str, bytes | str], branch: str = "main", needs: str = "") -> None:
        data = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        repository = self.repositories.setdefault(name, Repository({}, needs))
        repository.branches[branch] = data

    def commit(self, name: str, branch: str = "main") -> str:
        return self.repositories[name].commit(branch)

    def downloads(self) -> list[str]:
        """The files whose bytes were asked for."""
        return sorted(r.partition("/resolve/")[2].partition("/")[2] for r in self.requests if r.startswith("GET /data"))


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            is_api = path.startswith("/api/datasets/")
            rest = path.removeprefix("/api").removeprefix("/datasets/")
            asked = re.split("/(?:revision|tree|resolve)/", rest)[0]
            if asked not in hub.repositories:
                self._refuse(404 if self.headers.get("Authorization") else 401, hub.code_of_missing)
                return
            name = asked
            repository = hub.repositories[name]
            has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if repository.needs == "private" and not has_token:
                self._refuse(401, "RepoNotFound")
                return
            if repository.needs == "gated" and not has_token and not is_api:
                self._refuse(403, "GatedRepo")
                return
            verb, _, rest = rest.removeprefix(f"{name}/").partition("/")
            known = [*repository.branches, *map(repository.commit, repository.branches)]
            revision = next((r for r in known if f"{rest}/".startswith(f"{r}/")), "")
            branch = repository.find(revision)
            if branch is None:
                self._refuse(404, "RevisionNotFound")
                return
            files, commit = repository.branches[branch], repository.commit(branch)
            if verb == "revision":
                self._send(_json({"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}), {}, True)
            elif verb == "tree":
                entries = [
                    {"type": "file", "path": f, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for f, d in files.items()
                ]
                self._send(_json(entries), {}, True)
            elif (data := files.get(rest[len(revision) + 1 :])) is not None:
                headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
                self._send(data, headers, with_body)
            else:
                self._refuse(404, "EntryNotFound", commit)

        def _refuse(self, status: int, code: str, commit: str = "") -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            if commit:
                self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, data: bytes, headers: Mapping[str, str], with_body: bool) -> None:
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
