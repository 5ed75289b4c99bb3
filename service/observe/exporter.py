"""Metrics of one machine's processes over HTTP, where no gateway may be on it."""

from __future__ import annotations

import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gma.service.observe import metrics


class Exporter(ThreadingHTTPServer):
    """Answers GET /metrics from the folder that PROMETHEUS_MULTIPROC_DIR names."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        """Port 0 takes a free one, and `::` all addresses, of IPv4 too. Raises OSError if it can't
        listen there."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if self.path != "/metrics":
            self.send_error(404)
            return
        content = metrics.scrape()
        self.send_response(200)
        self.send_header("content-type", metrics.CONTENT_TYPE_LATEST)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Nothing: it is asked every few seconds."""
