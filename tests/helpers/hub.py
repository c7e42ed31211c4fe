"""A server of this machine in the hub's place, for what huggingface_hub's own client pushes to a model's repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_OnlyForTheStandIn0123456789abcdef"


@dataclass
class Hub:
    """What was pushed, and how the server behaves."""

    endpoint: str
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Of each repository, its files by name."""
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    """The repository of each commit."""
    refuses: dict[str, int] = field(default_factory=dict)
    """A status code for each request whose path holds this text."""
    is_open: threading.Event = field(default_factory=threading.Event)
    """Until it is set, no request is answered."""
    lfs: dict[str, bytes] = field(default_factory=dict)

    def environment(self, **more: str) -> dict[str, str]:
        """Variables for a process that is to take it for the hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            **more,
        }


@contextmanager
def hub_server() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            hub.is_open.wait()
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            refused = next((code for part, code in hub.refuses.items() if part in self.path), None)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._answer(401, {"error": "Invalid username or password."})
            elif refused:
                self._answer(refused, {"error": "the stand-in refuses"})
            elif self.path == "/api/repos/create":
                self._create(json.loads(body))
            elif self.path == "/api/validate-yaml":
                self._answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                modes = {True: "lfs", False: "regular"}
                answers = [
                    {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                    for f in files
                ]
                self._answer(200, {"files": answers})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**o, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
                self._answer(200, {"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                self._commit(body)
            else:
                self._answer(404, {"error": f"the stand-in has no {self.path}"})

        def do_PUT(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.lfs[self.path.rpartition("/")[2]] = body
            self._answer(200, {})

        def _create(self, asked: dict) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.files:
                self._answer(409, {"error": "You already created this model repo", "url": f"{hub.endpoint}/{name}"})
                return
            hub.files[name] = {}
            hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self._answer(200, {"url": f"{hub.endpoint}/{name}", "name": name})

        def _commit(self, body: bytes) -> None:
            repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[repository][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[repository][value["path"]] = hub.lfs[value["oid"]]
            hub.commits.append(repository)
            oid = hashlib.sha1(body).hexdigest()
            url = f"{hub.endpoint}/{repository}/commit/{oid}"
            self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

        def _answer(self, code: int, value: dict) -> None:
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    hub.is_open.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.is_open.set()
        server.shutdown()
        server.server_close()
