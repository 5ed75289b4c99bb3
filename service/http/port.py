"""The port of the service on one machine."""

from __future__ import annotations

import socket

SEND_BYTES = 64 * 1024
"""Of answers that the kernel holds for a client until it has taken them; it counts twice that."""


def bound(host: str, port: int, *, shared: bool) -> socket.socket:
    """A socket that is bound there, `shared` with other processes. Raises OSError."""
    reuse = (socket.SO_REUSEADDR, socket.SO_REUSEPORT) if shared else (socket.SO_REUSEADDR,)
    return _bind(host, port, *reuse)


def claimed(host: str, port: int) -> socket.socket:
    """A socket that does not listen, beside which only `shared` ones can be bound, and those of
    this user alone. Raises OSError."""
    return _bind(host, port, socket.SO_REUSEPORT)


def _bind(host: str, port: int, *options: int) -> socket.socket:
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if found.family == socket.AF_INET6:
            # Of `::`, IPv4 is a part, whatever this machine's default.
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        for option in options:
            found.setsockopt(socket.SOL_SOCKET, option, 1)
        # Its connections inherit it. By itself the kernel would hold megabytes for one that does
        # not read.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        found.bind((host, port))
    except OSError:
        found.close()
        raise
    return found
