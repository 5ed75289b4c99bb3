"""A network of its own for simulated machines: a bridge, and a link to each, in namespaces."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

# Set aside for benchmarks and for documentation: no machine is reached by them.
IPV4 = IPv4Network("198.18.0.0/24")
IPV6 = IPv6Network("2001:db8::/64")

TOOLS = ("ip", "unshare", "nsenter", "setpriv", "redis-server")

CLONE_NEWNET = 0x40000000


def lacks() -> str | None:
    """What this machine lacks for it, or None."""
    if os.geteuid():
        return "needs root, for namespaces"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}"
    probe = ["unshare", "--net", "--pid", "--fork", "--mount", "ip", "link", "set", "lo", "up"]
    if subprocess.run(probe, check=False, capture_output=True).returncode:
        return "may not make namespaces"
    return None


def run(*command: str) -> None:
    """Raises CalledProcessError."""
    subprocess.run(command, check=True, capture_output=True)


@dataclass(frozen=True)
class Host:
    """A machine's place in the network: a namespace with one address."""

    namespace: str
    address: str

    def cut(self, cut: bool = True) -> None:
        """Unplug its cable, or plug it in again."""
        run("ip", "-n", self.namespace, "link", "set", "eth0", "down" if cut else "up")
        if not cut:  # with the link went its route
            _route(self)


def _route(host: Host) -> None:
    gateway = str(_network(host.address)[1])
    run("ip", "-n", host.namespace, "route", "replace", "default", "via", gateway)


def _network(address: str) -> IPv4Network | IPv6Network:
    return IPV6 if ":" in address else IPV4


class Network:
    """Where hosts reach each other, and nothing else is."""

    def __init__(self, name: str, *, ipv6: bool = False) -> None:
        self._name = name
        self._network = IPV6 if ipv6 else IPV4
        self._hosts: list[Host] = []

    @contextmanager
    def up(self) -> Iterator[None]:
        """Make it, and move this thread into it: it reaches the hosts, and so does what it starts.
        All of it is gone afterwards."""
        run("ip", "netns", "add", self._name)
        try:
            for command in (
                ("link", "set", "lo", "up"),
                ("link", "add", "bridge", "type", "bridge"),
                ("link", "set", "bridge", "up"),
                self._addressed(1, "bridge"),
            ):
                run("ip", "-n", self._name, *command)
            with _entered(self._name):
                yield
        finally:
            for name in [self._name, *(host.namespace for host in self._hosts)]:
                run("ip", "netns", "delete", name)

    def host(self, name: str, number: int) -> Host:
        """Add one whose address ends in `number`, as no other's does."""
        host = Host(f"{self._name}-{name}", str(self._network[number]))
        run("ip", "netns", "add", host.namespace)
        self._hosts.append(host)
        port = f"port{len(self._hosts)}"
        peer = ("peer", "name", "eth0", "netns", host.namespace)
        run("ip", "-n", self._name, "link", "add", port, "type", "veth", *peer)
        run("ip", "-n", self._name, "link", "set", port, "master", "bridge", "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("link", "set", "eth0", "up"),
            self._addressed(number, "eth0"),
        ):
            run("ip", "-n", host.namespace, *command)
        _route(host)
        return host

    def _addressed(self, number: int, device: str) -> Sequence[str]:
        address = f"{self._network[number]}/{self._network.prefixlen}"
        # Without the second in which IPv6 asks whether somebody has it.
        return ("address", "add", address, "dev", device, *(["nodad"] if ":" in address else []))


@contextmanager
def _entered(namespace: str) -> Iterator[None]:
    """Be in a network namespace, with this thread alone."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(path: Path) -> None:
        with path.open() as file:
            if libc.setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"can't enter {path}")

    with Path("/proc/thread-self/ns/net").open() as before:
        enter(Path("/run/netns") / namespace)
        try:
            yield
        finally:
            enter(Path(f"/proc/self/fd/{before.fileno()}"))
