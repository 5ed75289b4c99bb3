"""A pod of the manifests as processes of this machine: namespaces, a read-only root, its volumes,
its user, and its containers' commands."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.deploy.dockerfile import Dockerfile
from tests.deploy.simulation.network import Host

ROOT = Path(__file__).parents[3]

# This machine's in place of the image's: programs and libraries, and where ours are.
SYSTEM = ("/bin", "/lib", "/lib64", "/opt", "/sbin", "/sys", "/usr", "/dev")
PYTHON = (ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve())

SHARED = "/shared"

IMAGE = Dockerfile((ROOT / "Dockerfile").read_text()).environment("cpu") | {
    "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
}


class Pod:
    """What a pod's namespaces hold. It runs nothing yet."""

    def __init__(
        self,
        host: Host,
        spec: Mapping[str, Any],
        *,
        folder: Path,
        sources: Mapping[str, Path],
        names: Mapping[str, str],
        shared: Path,
    ) -> None:
        """`folder`: of its own, for logs. `sources`: what lies in volumes that are no emptyDir.
        `names`: addresses of this machine's network, by name. `shared`: a folder that all pods may
        write to, at SHARED, where a deployment would have an object store."""
        self.host = host
        self._shared = shared
        self._spec = spec
        self._folder = folder
        self._containers: dict[str, subprocess.Popen[bytes]] = {}
        root = folder / "root"
        root.mkdir(parents=True)
        self._hosts = folder / "hosts"
        self.resolve(names)
        script = self._root_script(root, sources)
        namespaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--ipc", "--uts"]
        self._pause = subprocess.Popen(
            ["ip", "netns", "exec", host.namespace, *namespaces, "sh", "-euc", script],
            stdout=subprocess.PIPE,
        )
        assert self._pause.stdout
        if not self._pause.stdout.readline():
            raise RuntimeError(f"{host.namespace}: its root can't be made")
        self._first = _child(self._pause.pid)

    def resolve(self, names: Mapping[str, str]) -> None:
        """What its names are from now on, in place of DNS."""
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        lines += [f"{address} {name}" for name, address in names.items()]
        self._hosts.write_text("\n".join([*lines, ""]))

    def _root_script(self, root: Path, sources: Mapping[str, Path]) -> str:
        """Makes a root of mounts that can only be read, and of the pod's volumes."""
        volumes = {volume["name"]: volume for volume in self._spec.get("volumes", [])}
        mounts = {
            mount["mountPath"]: volumes.get(mount["name"], {"emptyDir": {}})
            for container in self._spec["containers"]
            for mount in container.get("volumeMounts", [])
        }
        at = {path: f"{root}{path}" for path in [*map(str, PYTHON), *SYSTEM, *mounts]}
        lines = [
            f"mount -t tmpfs -o mode=755 root {root}",
            f"mkdir {root}/etc {root}/proc {root}/tmp",  # noqa: S108
            f"cp -a /etc/. {root}/etc",
            f"echo gma:x:{self._user}:{self._user}::/tmp:/bin/false >> {root}/etc/passwd",
            f"mount --bind {self._hosts} {root}/etc/hosts",
            # There is no DNS, and whoever asks is to hear so at once.
            f"rm -f {root}/etc/resolv.conf && echo nameserver 127.0.0.1 > {root}/etc/resolv.conf",
            f"mount -t proc proc {root}/proc",
        ]
        for path in SYSTEM:
            if Path(path).is_symlink():
                lines.append(f"cp -P {path} {at[path]}")
            elif Path(path).exists():
                lines.append(f"mkdir -p {at[path]} && mount --rbind {path} {at[path]}")
                lines.append(f"mount -o remount,bind,ro {at[path]}")
        lines.append(f"mount -t tmpfs -o mode=1777 shm {root}/dev/shm")  # noqa: S108
        lines.append(f"mkdir {root}{SHARED} && mount --bind {self._shared} {root}{SHARED}")
        for path, volume in mounts.items():
            source = sources.get(volume.get("name", ""))
            lines.append(f"mkdir -p {at[path]}")
            if source is None:
                lines.append(f"mount -t tmpfs -o mode=1777 volume {at[path]}")
            else:
                lines.append(f"mount --bind {source} {at[path]}")
                lines.append(f"mount -o remount,bind,ro {at[path]}")
        for path in map(str, PYTHON):  # after /tmp, in which they may be
            lines.append(f"mkdir -p {at[path]} && mount --rbind {path} {at[path]}")
            lines.append(f"mount -o remount,bind,ro {at[path]}")
        first = "echo made; exec sleep infinity"
        lines += [f"mount -o remount,ro {root}", f"exec chroot {root} sh -c '{first}'"]
        return "\n".join(lines)

    @property
    def _user(self) -> int:
        user: int = self._spec["securityContext"]["runAsUser"]
        return user

    def start(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        """Run a container's command in the pod."""
        enter = ["nsenter", f"--target={self._first}", "--all", "--root", "--wd"]
        privileges = [
            *("setpriv", f"--reuid={self._user}", f"--regid={self._user}", "--clear-groups"),
            *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
        ]
        variables = IMAGE | dict(environment)
        with (self._folder / f"{name}.log").open("ab") as log:
            self._containers[name] = subprocess.Popen(
                [*enter, *privileges, "env", "--chdir=/tmp", *command],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def terminate(self, name: str) -> None:
        """SIGTERM to a container's first process, as Kubernetes says that it is to go."""
        os.kill(_child(self._containers[name].pid), signal.SIGTERM)

    def ended(self, name: str) -> bool:
        """Whether a container's first process has."""
        return self.status(name) is not None

    def status(self, name: str) -> int | None:
        """The exit status of a container's first process; None while it runs."""
        return self._containers[name].poll()

    def log(self, name: str) -> str:
        """What a container has said."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def kill(self) -> None:
        """End it, all its processes at once and without a word; nothing if it is ended."""
        self._pause.kill()
        self._pause.wait()
        for container in self._containers.values():
            container.wait()


def _child(pid: int) -> int:
    """The process that a tool forked to run a command."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def shell(script: str) -> list[str]:
    """The command that a container's shell runs."""
    return ["bash", "-c", "--", script]


def words(parameters: Mapping[str, str]) -> str:
    """Parameters of `ray start`, as the operator writes them."""
    return " ".join(
        f"--{name}" if value == "true" else f"--{name}={shlex.quote(value)}"
        for name, value in sorted(parameters.items())
    )
