"""An HTTP proxy before an object store, which answers some requests with a fault in place of the store.

with StoreProxy("http://127.0.0.1:5000") as proxy:
    proxy.inject("500", times=3)      # the next three requests
    ...  # AWS_ENDPOINT_URL=proxy.url
"""

from __future__ import annotations

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

STATUS = {"500": 500, "503": 503, "404": 404, "412": 412}
CODES = {500: "InternalError", 503: "SlowDown", 404: "NoSuchKey", 412: "PreconditionFailed"}
SLOW_SECONDS = 3.0
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class StoreProxy:
    """Forwards all requests to ``target``, but those that a fault was injected for.

    Attributes:
        url: where it listens, on the loopback interface.
    """

    def __init__(self, target: str) -> None:
        self._lock = threading.Lock()
        self._faults: list[str] = []
        proxy, address = self, urlsplit(target).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.take(self.command, dict(self.headers))
                if fault in STATUS:
                    self._answer(STATUS[fault])
                    return
                if fault == "slow":
                    time.sleep(SLOW_SECONDS)
                if fault == "cut":  # the store does as it is asked, and its answer is lost
                    self._forward(body)
                    self.close_connection = True
                    return
                status, headers, data = self._forward(body)
                self.send_response_only(status)
                for key, value in headers:
                    if key.lower() not in HOP_BY_HOP:
                        self.send_header(key, value)
                length = next((v for k, v in headers if k.lower() == "content-length"), None)
                self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                connection = http.client.HTTPConnection(address, timeout=60)
                try:
                    connection.request(self.command, self.path, body=body, headers=dict(self.headers))
                    answer = connection.getresponse()
                    return answer.status, answer.getheaders(), answer.read()
                finally:
                    connection.close()

            def _answer(self, status: int) -> None:
                text = f"<Error><Code>{CODES[status]}</Code><Message>injected</Message></Error>".encode()
                self.send_response_only(status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> StoreProxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def inject(self, fault: str, times: int = 1) -> None:
        """The next ``times`` requests that can have it get ``fault``: a key of ``STATUS``, ``slow`` or ``cut``."""
        with self._lock:
            self._faults += [fault] * times

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def num_left(self) -> int:
        """Faults that struck nothing yet."""
        return len(self._faults)

    def take(self, method: str, headers: dict[str, str]) -> str:
        """The fault of this request, which is used up by it; empty: none."""
        is_conditional = any(name.lower() in {"if-match", "if-none-match"} for name in headers)
        with self._lock:
            for fault in self._faults:
                # A store says 404 to who reads, and 412 to who writes on a condition.
                if (fault == "404" and method not in {"GET", "HEAD"}) or (fault == "412" and not is_conditional):
                    continue
                self._faults.remove(fault)
                return fault
        return ""
