"""The service's cluster as the manifests say it, of simulated machines: a head, two workers and
the Redis of `fault-tolerance`. What KubeRay adds to pods is added here as it does."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from gma.service.http.keys import hash_of, new_key
from tests.deploy import kustomize
from tests.deploy.manifests import Manifest, serve_config, service
from tests.deploy.simulation.network import Host, Network
from tests.deploy.simulation.pod import Pod, shell, words
from tests.service.asgi import save_checkpoint

KUBERNETES = Path(__file__).parents[3] / "deploy" / "kubernetes"
COMPONENTS = ("fault-tolerance", "model-volume")

HEAD, REDIS = "gma-head-svc.gma.svc.cluster.local", "gma-redis"
UNITS = {"Mi": 2**20, "Gi": 2**30}

# What is not as in the manifests: a tiny model that takes its time, fewer threads, and documents
# that may lie open for as long as a busy machine takes to lose a head and find another.
ARGUMENTS = {"cores": 1, "threads": 1, "rows": 1, "chunk_tokens": 8, "idle_timeout_s": 900}

PATIENCE_S = 240
"""For what Ray takes long for on two busy cores."""


class Cluster:
    """Pods, by what the manifests call them, and the service in them."""

    def __init__(self, network: Network, folder: Path) -> None:
        self._network = network
        self._folder = folder
        overlay = {
            "resources": [str(KUBERNETES / "cpu")],
            "components": [str(KUBERNETES / name) for name in COMPONENTS],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
        manifests = kustomize.build(folder)
        self._cluster = service(manifests)["rayClusterConfig"]
        (redis,) = (each for each in manifests if each["kind"] == "StatefulSet")
        self._redis = redis["spec"]["template"]["spec"]
        self.config = serve_config(service(manifests))
        self.config["applications"][0]["args"] |= ARGUMENTS
        self.shared = folder / "shared"
        self.shared.mkdir()
        self.shared.chmod(0o777)
        self._keys, model = folder / "keys", folder / "model"
        save_checkpoint(model / "checkpoint")
        self._keys.mkdir()
        self._sources = {"api-keys": self._keys, "model": model}
        self._token = secrets.token_hex(32)
        self._password = secrets.token_hex(16)
        self._names: dict[str, str] = {}
        self._numbers = itertools.count(10)
        self._made = itertools.count()
        self.key = new_key()
        self.let_pass(self.key)
        self.pods: list[Pod] = []
        self.head: Pod
        self.workers: list[Pod] = []

    # What Kubernetes does.

    def let_pass(self, *keys: str) -> None:
        """Replace the Secret's file as Kubernetes does: at once, by another."""
        new = self._keys / "new"
        new.write_text("".join(f"{hash_of(key)}\n" for key in keys))
        new.chmod(0o444)
        new.rename(self._keys / "api-keys")

    def host(self, name: str) -> Host:
        """A machine that there was not yet."""
        number = next(self._numbers)
        return self._network.host(f"{name}{number}", number)

    def _pod(self, host: Host, spec: Manifest) -> Pod:
        pod = Pod(
            host,
            spec,
            folder=self._folder / f"{host.namespace}-{next(self._made)}",
            sources=self._sources,
            names=self._names,
            shared=self.shared,
        )
        self.pods.append(pod)
        return pod

    def _named(self, **addresses: str) -> None:
        self._names |= addresses
        for pod in self.pods:
            pod.resolve(self._names)

    def start_redis(self, host: Host) -> Pod:
        self._named(**{REDIS: host.address})
        pod = self._pod(host, self._redis)
        (container,) = self._redis["containers"]
        pod.start("redis", container["command"], {"PASSWORD": self._password})
        return pod

    # What KubeRay does.

    def start_head(self, host: Host) -> Pod:
        self._named(**{HEAD: host.address})
        options = self._cluster["gcsFaultToleranceOptions"]
        return self._start(
            host,
            self._cluster["headGroupSpec"],
            {"head": "true", "no-monitor": "true", "redis-password": self._password},
            {
                "RAY_ADDRESS": "127.0.0.1:6379",
                "RAY_REDIS_ADDRESS": options["redisAddress"],
                "REDIS_PASSWORD": self._password,
                "RAY_external_storage_namespace": "gma",
            },
        )

    def start_worker(self, host: Host) -> Pod:
        return self._start(
            host,
            self._cluster["workerGroupSpecs"][0],
            {"address": f"{HEAD}:6379"},
            {"RAY_ADDRESS": f"{HEAD}:6379", "FQ_RAY_IP": HEAD},
        )

    def _start(
        self, host: Host, group: Manifest, parameters: dict[str, str], variables: dict[str, str]
    ) -> Pod:
        spec = group["template"]["spec"]
        ray, metrics = spec["containers"]
        memory = ray["resources"]["limits"]["memory"]
        parameters |= {
            "memory": str(int(memory[:-2]) * UNITS[memory[-2:]]),
            "metrics-export-port": "8080",
            "dashboard-agent-listen-port": "52365",
            "block": "true",
            "object-store-memory": str(80 * 2**20),  # KubeRay has Ray take a share of memory
            **group["rayStartParams"],
        }
        variables |= {
            "RAY_PORT": "6379",
            "RAY_AUTH_MODE": self._cluster["authOptions"]["mode"],
            "RAY_AUTH_TOKEN": self._token,
            "RAY_CLUSTER_NAME": "gma",
            "RAY_CLOUD_INSTANCE_ID": host.namespace,
            "RAY_timeout_ms_task_wait_for_death_info": "0",
            "RAY_gcs_server_request_timeout_seconds": "5",
            "RAY_SERVE_KV_TIMEOUT_S": "5",
            **{each["name"]: each["value"] for each in ray["env"]},
        }
        pod = self._pod(host, spec)
        pod.start("ray", shell(f"ulimit -n 65536; ray start {words(parameters)}"), variables)
        pod.start("metrics", metrics["command"], {})
        return pod

    def serve(self, config: Manifest) -> None:
        """Hand a Serve config to the head."""
        self._dashboard("PUT", "/api/serve/applications/", json=config).raise_for_status()

    def status(self) -> Manifest:
        """What Serve says of the application."""
        told = self._dashboard("GET", "/api/serve/applications/").raise_for_status().json()
        application: Manifest = told["applications"].get("gma", {})
        return application

    def _dashboard(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self._token}"}
        url = f"{url_of(self._names[HEAD], 8265)}{path}"
        return httpx.request(method, url, headers=headers, timeout=PATIENCE_S, **more)

    def replicas(self, deployment: str) -> list[str]:
        """The addresses of the machines on which replicas of a deployment run."""
        told = self.status().get("deployments", {}).get(deployment, {}).get("replicas", [])
        return [each["node_ip"] for each in told if each["state"] == "RUNNING"]

    def run_on_head(self, name: str, command: list[str], **environment: str) -> None:
        """Run a command in the head's pod, as who asks a cluster for something does."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
        self.head.start(name, command, token | {"RAY_ADDRESS": "127.0.0.1:6379"} | environment)

    def is_ready(self, pod: Pod) -> bool:
        """What the pod's readiness probe finds."""
        url = f"{url_of(pod.host.address, 8000)}/-/healthz"
        return httpx.get(url, timeout=10).status_code == 200

    def gateways_of(self, pod: Pod) -> int:
        """How many gateways the pod's proxy has to choose from.

        While it has none, what comes goes to a proxy of Serve's on the head.
        """
        text = httpx.get(f"{url_of(pod.host.address, 9101)}/metrics", timeout=10).text
        name = 'haproxy_backend_active_servers{proxy="http-gma"}'
        (count,) = (x.split()[-1] for x in text.splitlines() if x.startswith(name))
        return int(float(count))

    def close(self) -> None:
        """End all pods."""
        for pod in self.pods:
            pod.kill()


def url_of(address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{port}"


def until(condition: Callable[[], object], what: str, *, seconds: float = PATIENCE_S) -> None:
    """Ask until it is so; a connection that is refused is no answer yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (httpx.TransportError, httpx.HTTPStatusError):
            pass
        time.sleep(0.5)
    raise TimeoutError(f"{what}: not within {seconds:g} s")


@contextmanager
def started(network: Network, folder: Path, *, workers: int = 2) -> Iterator[Cluster]:
    """A cluster that serves nothing yet."""
    cluster = Cluster(network, folder)
    try:
        cluster.start_redis(cluster.host("redis"))
        cluster.head = cluster.start_head(cluster.host("head"))
        until(lambda: cluster.status() is not None, "a head")
        cluster.workers += [cluster.start_worker(cluster.host("worker")) for _ in range(workers)]
        yield cluster
    finally:
        cluster.close()


@contextmanager
def running(network: Network, folder: Path, *, workers: int = 2) -> Iterator[Cluster]:
    """A cluster that answers."""
    with started(network, folder, workers=workers) as cluster:
        cluster.serve(cluster.config)
        until(lambda: cluster.status().get("status") == "RUNNING", "the application")
        until(lambda: all(map(cluster.is_ready, cluster.workers)), "the workers' proxies")
        yield cluster
