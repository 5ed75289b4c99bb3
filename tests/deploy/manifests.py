"""What must hold of the manifests of a variant, beyond what an API server would check."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import (
    DeploymentSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from gma.service.app import deployments as app
from gma.service.settings import Settings, SettingsError

Manifest = dict[str, Any]

SCHEMAS = yaml.safe_load((Path(__file__).parent / "schemas.yaml").read_text())

# Dashboard and jobs, GCS, client server, agent.
CLOSED = {8265, 6379, 10001, 52365}
OPEN = {8000}

RAY_CONTAINERS = ("ray-head", "ray-worker")


def problems(manifests: list[Manifest]) -> list[str]:
    """Everything that is wrong, a line each."""
    found = [line for manifest in manifests for line in schema_problems(manifest)]
    if found:
        return found  # the rest relies on their shape
    found += serve_problems(service(manifests))
    if found:
        return found
    return [
        *drain_problems(service(manifests)),
        *pod_problems(service(manifests)),
        *capacity_problems(service(manifests)),
        *network_problems(manifests),
        *selector_problems(manifests),
    ]


def service(manifests: list[Manifest]) -> Manifest:
    """The spec of the RayService."""
    (found,) = (each["spec"] for each in manifests if each["kind"] == "RayService")
    spec: Manifest = found
    return spec


def serve_config(spec: Manifest) -> Manifest:
    """The Serve config in a RayService's spec."""
    config: Manifest = yaml.safe_load(spec["serveConfigV2"])
    return config


def schema_problems(manifest: Manifest) -> Iterator[str]:
    kind = manifest.get("kind")
    if kind not in SCHEMAS:
        yield f"{kind} is no kind that is known here"
        return
    validator = jsonschema.Draft202012Validator({"$defs": SCHEMAS["$defs"], **SCHEMAS[kind]})
    for error in validator.iter_errors(manifest):
        yield f"{kind} {'.'.join(map(str, error.absolute_path))}: {error.message}"


def serve_problems(spec: Manifest) -> Iterator[str]:
    """Check the Serve config by Ray's own schema and by what the service makes of it."""
    config = serve_config(spec)
    try:
        ServeDeploySchema.model_validate(config)
    except (ValidationError, ImportError, AttributeError) as error:  # it imports the policy
        yield f"Serve config: {error}"
        return
    yield from _unknown(config, ServeDeploySchema)
    (application,) = config["applications"]
    yield from _unknown(application, ServeApplicationSchema)
    module, _, name = application["import_path"].partition(":")
    if not hasattr(importlib.import_module(module), name):
        yield f"there is no {application['import_path']}"
    try:
        settings = Settings.load(**application["args"])
        if settings.device == "auto":
            yield "args: the device is not said"
    except SettingsError as error:
        yield f"args: {error}"
    for deployment in application["deployments"]:
        yield from _unknown(deployment, DeploymentSchema)
        yield from _unknown(deployment.get("ray_actor_options", {}), RayActorOptionsSchema)
        if deployment["name"] not in (app.GATEWAY, app.WORKER):
            yield f"there is no deployment {deployment['name']}"
        scaling = deployment.get("autoscaling_config")
        if scaling:
            yield from _unknown(scaling, AutoscalingConfig)
            try:
                policy = AutoscalingConfig.model_validate(scaling).policy
                policy.get_policy()(**policy.policy_kwargs)
            except (ValueError, TypeError, ImportError, AttributeError) as error:
                yield f"autoscaling policy: {error}"


def _unknown(config: Manifest, schema: type[BaseModel]) -> Iterator[str]:
    """Find unknown fields, which Ray's schemas let pass."""
    for name in config.keys() - schema.model_fields.keys():
        yield f"Serve config: {schema.__name__} has no field {name}"


def _settings(spec: Manifest) -> Settings:
    return Settings.load(**serve_config(spec)["applications"][0]["args"])


def _pods(spec: Manifest) -> list[Manifest]:
    cluster = spec["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def _environment(container: Manifest) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container.get("env", [])}


def drain_problems(spec: Manifest) -> Iterator[str]:
    """Check that whatever ends while documents are read waits longer than the service does."""
    patience = _settings(spec).shutdown_timeout_s
    waits = {"rayClusterDeletionDelaySeconds": spec.get("rayClusterDeletionDelaySeconds", 60)}
    for pod in _pods(spec):
        container = pod["spec"]["containers"][0]
        hard_stop = _environment(container).get("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", 120)
        grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
        waits[f"{container['name']}: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] = int(hard_stop)
        waits[f"{container['name']}: terminationGracePeriodSeconds"] = grace
    for name, seconds in waits.items():
        if seconds <= patience:
            yield f"{name} is {seconds}, not longer than shutdown_timeout_s, {patience}"
    if spec.get("upgradeStrategy", {}).get("type") != "NewCluster":
        yield "an upgrade starts no second cluster"


def pod_problems(spec: Manifest) -> Iterator[str]:
    """Check for what Kubernetes calls restricted, for a read-only root, and for probes."""
    images = set()
    if spec["rayClusterConfig"].get("authOptions", {}).get("mode") != "token":
        yield "Ray asks nobody for a token"
    for pod in _pods(spec):
        if pod["spec"].get("enableServiceLinks") is not False:
            yield "the service's own Services become GMA_ variables, which are no settings"
        security = pod["spec"].get("securityContext", {})
        if not security.get("runAsNonRoot") or not security.get("runAsUser"):
            yield "a pod may run as root"
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield "a pod has no seccomp profile"
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"]:
            name = container["name"]
            images.add(container["image"])
            security = container.get("securityContext", {})
            if not security.get("readOnlyRootFilesystem"):
                yield f"{name}: its root file system can be written"
            if security.get("allowPrivilegeEscalation") is not False:
                yield f"{name}: it may gain privileges"
            if security.get("capabilities", {}).get("drop") != ["ALL"]:
                yield f"{name}: it has capabilities"
            if "resources" not in container:
                yield f"{name}: it has no resources"
            elif "memory" not in container["resources"]["limits"]:
                yield f"{name}: its memory has no limit"
            mounts = {m["mountPath"]: m for m in container.get("volumeMounts", [])}
            for mount in mounts.values():
                if mount["name"] not in volumes:
                    yield f"{name}: there is no volume {mount['name']}"
            if "/tmp" not in mounts:  # noqa: S108
                yield f"{name}: it has nowhere to write"
            if name in RAY_CONTAINERS:
                yield from _ray_problems(container, mounts, volumes, _settings(spec))
    if len(images) != 1:
        yield f"pods run different images: {', '.join(sorted(images))}"


def _ray_problems(
    container: Manifest, mounts: Manifest, volumes: Manifest, settings: Settings
) -> Iterator[str]:
    name = container["name"]
    if not {"livenessProbe", "readinessProbe"} <= container.keys():
        yield f"{name}: KubeRay's own probes need wget, which the image lacks"
    if _environment(container).get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        yield f"{name}: its proxy is the slow one"
    if _environment(container).get("RAY_LOG_TO_STDERR") != "1":
        yield f"{name}: its logs are files that go with the pod"
    keys = settings.api_keys_file
    mount = mounts.get(str(PurePosixPath(keys).parent)) if keys else None
    if not (mount and "secret" in volumes.get(mount["name"], {})):
        yield f"{name}: its API keys are no Secret"


def capacity_problems(spec: Manifest) -> Iterator[str]:
    """Check that replicas find pods, and that pods have what their replicas ask for."""
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    deployments = {
        each["name"]: each for each in serve_config(spec)["applications"][0]["deployments"]
    }
    worker, gateway = deployments[app.WORKER], deployments[app.GATEWAY]
    scaling, settings = worker["autoscaling_config"], _settings(spec)
    if (scaling["min_replicas"], scaling["max_replicas"]) != (
        group["minReplicas"],
        group["maxReplicas"],
    ):
        yield "workers scale between other numbers than their pods"
    options = worker["ray_actor_options"]
    requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    if group["rayStartParams"].get("num-cpus") != requests["cpu"]:
        yield "Ray counts other cores than the pod asks for"
    if options.get("num_gpus", 0) != int(requests.get("nvidia.com/gpu", 0)):
        yield "a worker does not have the GPUs of its pod"
    if (settings.device == "cuda") != bool(options.get("num_gpus")):
        yield f"a worker on {settings.device} asks for {options.get('num_gpus', 0)} GPUs"
    if settings.cores != int(requests["cpu"]):
        yield "the service counts on other cores than its pod asks for"
    if options["num_cpus"] < settings.threads:
        yield "a worker computes with more threads than it asks for"
    if not options.get("num_gpus") and 2 * options["num_cpus"] <= int(requests["cpu"]):
        yield "two workers fit into a pod"
    asked = settings.gateways * gateway["ray_actor_options"]["num_cpus"]
    room = group["minReplicas"] * (int(requests["cpu"]) - options["num_cpus"])
    if asked > room:
        yield f"gateways ask for {asked} cores, and workers leave them {room}"
    limit = scaling["policy"]["policy_kwargs"]["tokens_per_worker"]
    if limit < 2 * settings.inbox_tokens:
        yield "one long document asks for a second worker"


def network_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Check that others reach HTTP, and no port at which Ray takes orders."""
    labels = [pod["metadata"].get("labels", {}) for pod in _pods(service(manifests))]
    policies = [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"]
    for pod in labels:
        mine = [p for p in policies if _selects(p["podSelector"], pod)]
        if not mine:
            yield f"no policy closes the ports of {pod}"
        for rule in (rule for policy in mine for rule in policy["ingress"]):
            ports = {each["port"] for each in rule.get("ports", [])}
            sources = rule.get("from", [])
            if not sources and (not ports or ports - OPEN):
                yield f"anybody reaches {sorted(ports) or 'every port'}"
            for source in sources:
                own = "namespaceSelector" not in source and all(
                    _selects(source["podSelector"], each) for each in labels
                )
                operator = (
                    "kuberay-operator" in source["podSelector"].get("matchLabels", {}).values()
                )
                if not own and (not ports or ports & CLOSED) and not operator:
                    yield f"others reach {sorted(ports & CLOSED) or 'every port'}"


def selector_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Check that selectors select pods of the service, and that budgets let a pod of a group go."""
    pods = _pods(service(manifests))
    (group,) = service(manifests)["rayClusterConfig"]["workerGroupSpecs"]
    for manifest in manifests:
        kind, spec = manifest["kind"], manifest.get("spec", {})
        if kind not in ("PodDisruptionBudget", "PodMonitor"):
            continue
        chosen = [p for p in pods if _selects(spec["selector"], p["metadata"].get("labels", {}))]
        if not chosen:
            yield f"{kind} {manifest['metadata']['name']} selects nothing"
        if kind == "PodMonitor":
            ports = {
                port.get("name")
                for pod in chosen
                for container in pod["spec"]["containers"]
                for port in container.get("ports", [])
            }
            if any(each["port"] not in ports for each in spec["podMetricsEndpoints"]):
                yield "PodMonitor scrapes a port that no pod has"
        elif group["template"] in chosen and spec["minAvailable"] >= group["minReplicas"]:
            yield "no worker may ever go: machines can't be drained"
    budgets = [each for each in manifests if each["kind"] == "PodDisruptionBudget"]
    if len(budgets) != len(pods):
        yield "a group of pods has no PodDisruptionBudget"


def _selects(selector: Manifest, labels: Manifest) -> bool:
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
