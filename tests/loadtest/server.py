"""An HTTP server in this process whose every behaviour is known."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

METRICS = """\
# TYPE gma_queue_seconds histogram
gma_queue_seconds_bucket{{le="0.1"}} {count}
gma_queue_seconds_bucket{{le="1.0"}} {count}
gma_queue_seconds_bucket{{le="+Inf"}} {count}
gma_queue_seconds_count {count}
gma_queue_seconds_sum {sum}
gma_documents_in_flight 1.0
gma_resident_memory_bytes{{pid="1",role="gateway"}} 1e+08
gma_resident_memory_peak_bytes{{pid="1",role="gateway"}} 2e+08
gma_resident_memory_peak_bytes{{pid="2",role="gateway"}} 3e+08
gma_resident_memory_peak_bytes{{pid="3",role="worker"}} 4e+08
"""


class Server:
    """It answers at once, unless it is told otherwise."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200
        self.answer: dict[str, Any] = {}
        """What to say in an answer, in place of the truth."""
        self.error_event: str | None = None
        self.metrics = True
        self.stall_after: int | None = None
        """After so many documents nothing is answered for `stall_s`."""
        self.stall_s = 0.0
        self.hang = threading.Event()
        """Set, it lets documents go that `status` 0 holds."""
        self._lock = threading.Lock()

    def document(self, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """Status and body of the answer."""
        with self._lock:  # which a stall holds
            self.bodies.append(body)
            self.headers.append(headers)
            if len(self.bodies) == self.stall_after:
                time.sleep(self.stall_s)
        if self.status == 0:
            self.hang.wait()
        if self.status not in (0, 200):
            return self.status, b"{}"
        usage = {"bytes": len(body), "tokens": len(body) // 4, "chunks": 1}
        answer = {"label": "x", "usage": usage, "timing_ms": {"queue": 2.0, "total": 3.0}}
        answer |= self.answer
        if headers.get("accept") != "application/x-ndjson":
            return 200, json.dumps(answer).encode()
        last = {"event": "result", **answer}
        if self.error_event:
            last = {"event": "error", "error": "", "error_type": self.error_event}
        return 200, b"".join(
            json.dumps(event).encode() + b"\n" for event in ({"event": "progress"}, last)
        )

    def exposition(self) -> str:
        with self._lock:
            count = len(self.bodies)
        return METRICS.format(count=count, sum=0.05 * count)


@contextmanager
def running() -> Iterator[Server]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            self._reply(*server.document(body, headers))

        def do_GET(self) -> None:
            found = self.path == "/metrics" and server.metrics
            self._reply(200 if found else 404, server.exposition().encode())

        def _reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            """Clients may leave."""

    with Listener(("127.0.0.1", 0), Handler) as listener:
        server.url = f"http://127.0.0.1:{listener.server_address[1]}"
        serve = partial(listener.serve_forever, poll_interval=0.01)  # so that it soon shuts down
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.hang.set()
            listener.shutdown()
