"""A client that sends bytes as they are, and tells what comes back."""

from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Self

from tests.service.asgi import PATIENCE_S


@dataclass
class Reply:
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)

    def json(self) -> Any:
        return json.loads(self.body)


class Raw:
    """A connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def send_on(self, data: bytes) -> None:
        """Send it again and again. Raises ConnectionError once the connection is no more."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            self.send(data)

    def end(self) -> None:
        """Close the sending side."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset_on_close(self) -> None:
        """Let what is closed end with a reset, and nothing that was sent be delivered after it."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def reply(self) -> Reply | None:
        """The next answer that is not an interim one; None if the connection is closed."""
        while (line := self._line()) is not None:
            status = int(line.split()[1])
            headers: dict[str, str] = {}
            while field := self._line():
                name, _, value = field.partition(":")
                headers[name.lower()] = value.strip()
            if status >= 200:
                return Reply(status, headers, self._body(headers))
        return None

    def _line(self) -> str | None:
        try:
            line = self._file.readline()
        except ConnectionResetError:
            return None
        return line.decode("latin-1").rstrip("\r\n") if line else None

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return self._file.read(int(headers["content-length"]))
        body = b""
        while size := int(self._line() or "0", 16):
            body += self._file.read(size)
            self._file.readline()
        self._file.readline()
        return body
