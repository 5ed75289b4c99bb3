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
from gma.service.app.application import WORKER, Application
from gma.service.settings import PREFIX, Settings, SettingsError

Manifest = dict[str, Any]

SCHEMAS = yaml.safe_load((Path(__file__).parent / "schemas.yaml").read_text())

# Dashboard and jobs, GCS, client server, agent.
CLOSED = {8265, 6379, 10001, 52365}
OPEN = {8000}

CLUSTER = "gma/cluster"
"""The label of a cluster's pods, and its values: during an upgrade there are both."""
CLUSTERS = ("a", "b")

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"

# By KubeRay, in Ray's container, if no port of it is called so.
ADDED_PORTS = {"gcs-server", "dashboard", "client", "serve", "metrics"}

ARCHITECTURE = {"nvidia.com/gpu.compute.major", "nvidia.com/gpu.compute.minor"}


def problems(manifests: list[Manifest]) -> list[str]:
    """Everything that is wrong, a line each."""
    found = [line for manifest in manifests for line in schema_problems(manifest)]
    if found:
        return found  # the rest relies on their shape
    shared = (network_problems, egress_problems, monitor_problems, ingress_problems)
    if deployments(manifests):
        return [line for each in (single_problems, *shared) for line in each(manifests)]
    found += serve_problems(service(manifests))
    if found:
        return found
    return [
        *drain_problems(service(manifests)),
        *pod_problems(service(manifests)),
        *capacity_problems(service(manifests)),
        *model_problems(service(manifests)),
        *budget_problems(manifests),
        *head_problems(manifests),
        *(line for each in shared for line in each(manifests)),
    ]


def deployments(manifests: list[Manifest]) -> list[Manifest]:
    """The specs of the Deployments: one in the variant `single`, none in others."""
    return [each["spec"] for each in manifests if each["kind"] == "Deployment"]


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
    for application in config["applications"]:
        yield from _application_problems(spec, application)


def _application_problems(spec: Manifest, application: Manifest) -> Iterator[str]:
    yield from _unknown(application, ServeApplicationSchema)
    module, _, name = application["import_path"].partition(":")
    if not hasattr(importlib.import_module(module), name):
        yield f"there is no {application['import_path']}"
    if (name == app.model.__name__) != bool(Application.parsed(application["name"])):
        yield f"gateways would not take {application['name']} for what it is"
    try:
        settings = _settings(spec, application)
        if settings.device == "auto" and name != app.gateways.__name__:
            yield "args: the device is not said"
    except SettingsError as error:
        yield f"settings: {error}"
    for deployment in application["deployments"]:
        yield from _unknown(deployment, DeploymentSchema)
        yield from _unknown(deployment.get("ray_actor_options", {}), RayActorOptionsSchema)
        if deployment["name"] not in (app.GATEWAY, WORKER):
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


def _settings(spec: Manifest, application: Manifest | None = None) -> Settings:
    """Those of the pods' environment, before which an application's go, by default those of that
    which has the gateways. Raises SettingsError."""
    said = _said(_pods(spec)[0]["spec"]["containers"][0])
    application = application or serve_config(spec)["applications"][0]
    return Settings.load(**{**said, **application["args"]})


def _said(container: Manifest) -> Manifest:
    """By field the settings in a container's environment."""
    variables = _environment(container).items()
    return {x[len(PREFIX) :].lower(): value for x, value in variables if x.startswith(PREFIX)}


def _pods(spec: Manifest) -> list[Manifest]:
    cluster = spec["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def _all_pods(manifests: list[Manifest]) -> list[Manifest]:
    """Those in which the service runs, of any variant."""
    found = [each["template"] for each in deployments(manifests)]
    return found or _pods(service(manifests))


def _environment(container: Manifest) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}


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
        drain = int(_environment(container).get(DRAIN, 30))
        waits[f"{container['name']}: {DRAIN}"] = drain
        if drain >= grace:
            yield f"{container['name']}: {DRAIN} is {drain}, and it is killed after {grace}"
    for name, seconds in waits.items():
        if seconds <= patience:
            yield f"{name} is {seconds}, not longer than shutdown_timeout_s, {patience}"
    if spec.get("upgradeStrategy", {}).get("type") != "NewCluster":
        yield "an upgrade starts no second cluster"


def pod_problems(spec: Manifest) -> Iterator[str]:
    """Check for what Kubernetes calls restricted, for a read-only root, and for probes."""
    if spec["rayClusterConfig"].get("authOptions", {}).get("mode") != "token":
        yield "Ray asks nobody for a token"
    yield from restriction_problems(_pods(spec))
    for pod in _pods(spec):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        yield from _ray_problems(pod["spec"]["containers"][0], volumes, _settings(spec))


def restriction_problems(pods: list[Manifest]) -> Iterator[str]:
    """Check for what Kubernetes calls restricted, and for a read-only root."""
    images = set()
    for pod in pods:
        if pod["spec"].get("enableServiceLinks") is not False:
            yield "the service's own Services become GMA_ variables, which are no settings"
        security = pod["spec"].get("securityContext", {})
        if not security.get("runAsNonRoot") or not security.get("runAsUser"):
            yield "a pod may run as root"
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield "a pod has no seccomp profile"
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        containers = pod["spec"]["containers"]
        images |= {container["image"] for container in containers}
        for container in [*pod["spec"].get("initContainers", []), *containers]:
            name = container["name"]
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
    if len(images) != 1:
        yield f"pods run different images: {', '.join(sorted(images))}"


def _ray_problems(container: Manifest, volumes: Manifest, settings: Settings) -> Iterator[str]:
    name = container["name"]
    if not {"livenessProbe", "readinessProbe"} <= container.keys():
        yield f"{name}: KubeRay's own probes need wget, which the image lacks"
    if _environment(container).get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        yield f"{name}: its proxy is the slow one"
    if _environment(container).get("RAY_LOG_TO_STDERR") != "1":
        yield f"{name}: its logs are files that go with the pod"
    yield from _keys_problems(container, volumes, settings)


def _keys_problems(container: Manifest, volumes: Manifest, settings: Settings) -> Iterator[str]:
    name, keys = container["name"], settings.api_keys_file
    mounts = {m["mountPath"]: m for m in container.get("volumeMounts", [])}
    mount = mounts.get(str(PurePosixPath(keys).parent)) if keys else None
    if not (mount and "secret" in volumes.get(mount["name"], {})):
        yield f"{name}: its API keys are no Secret"


def capacity_problems(spec: Manifest) -> Iterator[str]:
    """Check that replicas find pods, and that pods have what their replicas ask for."""
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    if group["rayStartParams"].get("num-cpus") != requests["cpu"]:
        yield "Ray counts other cores than the pod asks for"
    workers: list[Manifest] = []
    gateways: list[Manifest] = []
    for application in serve_config(spec)["applications"]:
        for each in application["deployments"]:
            (workers if each["name"] == WORKER else gateways).append(each)
            if each["name"] == WORKER:
                yield from _worker_problems(each, _settings(spec, application), requests)
    scaling = [each["autoscaling_config"] for each in workers]
    least, most = (sum(x[f"{y}_replicas"] for x in scaling) for y in ("min", "max"))
    if (least, most) != (group["minReplicas"], group["maxReplicas"]):
        yield "workers scale between other numbers than their pods"
    (gateway,), settings = gateways, _settings(spec)
    places = group["minReplicas"] * gateway.get("max_replicas_per_node", settings.gateways)
    if settings.gateways != places:
        yield f"{settings.gateways} gateways have {places} places: some wait, or one pod has all"
    asked = settings.gateways * gateway["ray_actor_options"]["num_cpus"]
    taken = max(each["ray_actor_options"]["num_cpus"] for each in workers)
    room = group["minReplicas"] * (int(requests["cpu"]) - taken)
    if asked > room:
        yield f"gateways ask for {asked} cores, and workers leave them {room}"


def _worker_problems(worker: Manifest, settings: Settings, requests: Manifest) -> Iterator[str]:
    options = worker["ray_actor_options"]
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
    limit = worker["autoscaling_config"]["policy"]["policy_kwargs"]["tokens_per_worker"]
    if limit < 2 * settings.inbox_tokens:
        yield "one long document asks for a second worker"


def model_problems(spec: Manifest) -> Iterator[str]:
    """Check that whichever pod makes the application has its own model, as all others do."""
    containers = [pod["spec"]["containers"][0] for pod in _pods(spec)]
    said = [_said(each) for each in containers]
    if any(each != said[0] for each in said):
        yield "pods differ in their settings, and any of them may make the application"
    for container in containers:
        yield from _path_problems(container)
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    on_gpus = "nvidia.com/gpu" in pod["containers"][0]["resources"]["requests"]
    if on_gpus and not pod.get("nodeSelector", {}).keys() >= ARCHITECTURE:
        yield "workers may come to GPUs for which there are no kernels"


def _path_problems(container: Manifest) -> Iterator[str]:
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for name in ("GMA_CHECKPOINT", "GMA_COMPILE_CACHE"):
        path = PurePosixPath(_environment(container).get(name, "/tmp"))  # noqa: S108
        if not any(path.is_relative_to(mount) for mount in mounts):
            yield f"{container['name']}: {name} is on no volume"


def single_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Check the pod in which `gma serve` runs, and the Service that leads to it."""
    (spec,) = deployments(manifests)
    pod = spec["template"]
    yield from restriction_problems([pod])
    container = pod["spec"]["containers"][0]
    if container["command"] != ["gma", "serve"]:
        yield "the container does not serve"
    try:
        settings = Settings.load(**_said(container))
    except SettingsError as error:
        yield f"settings: {error}"
        return
    if settings.host != "0.0.0.0":  # noqa: S104
        yield "nobody reaches it: it listens on loopback"
    hook = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
    if grace <= hook + settings.shutdown_timeout_s:
        yield f"terminationGracePeriodSeconds is {grace}: documents are cut before they end"
    if settings.cores != int(container["resources"]["requests"]["cpu"]):
        yield "the service counts on other cores than its pod asks for"
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    yield from _keys_problems(container, volumes, settings)
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    if mounts.get("/dev/shm", {}).get("emptyDir", {}).get("medium") != "Memory":  # noqa: S108
        yield "Ray has 64 MiB of shared memory"
    yield from _path_problems(container)
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        if container.get(name, {}).get("httpGet") != {"path": "/health", "port": settings.port}:
            yield f"its {name} does not ask for /health"
    on_gpus = "nvidia.com/gpu" in container["resources"]["requests"]
    if on_gpus and not pod["spec"].get("nodeSelector", {}).keys() >= ARCHITECTURE:
        yield "it may come to GPUs for which there are no kernels"
    if not _selects(spec["selector"], _labels(pod)):
        yield "the Deployment does not know its pod"
    for each in (each["spec"] for each in manifests if each["kind"] == "Service"):
        if not _selects({"matchLabels": each["selector"]}, _labels(pod)):
            yield "the Service leads nowhere"
        if [port["port"] for port in each["ports"]] != [settings.port]:
            yield "the Service leads to another port"
    if any(each["kind"] == "PodDisruptionBudget" for each in manifests):
        yield "the one pod may never go: its machine can't be drained"


def ingress_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Check that what comes from outside is encrypted, of any size, and read while it comes."""
    for each in (each for each in manifests if each["kind"] == "Ingress"):
        hosts = {rule["host"] for rule in each["spec"]["rules"]}
        if hosts != {host for tls in each["spec"].get("tls", []) for host in tls["hosts"]}:
            yield "keys travel in the clear"
        said = each["metadata"].get("annotations", {})
        for name, value in (("proxy-body-size", "0"), ("proxy-request-buffering", "off")):
            if said.get(f"nginx.ingress.kubernetes.io/{name}") != value:
                yield f"the ingress's {name} is not {value}"
        for path in (path for rule in each["spec"]["rules"] for path in rule["http"]["paths"]):
            if path["backend"]["service"] != {"name": "gma-serve-svc", "port": {"number": 8000}}:
                yield "the ingress leads elsewhere"


def network_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Check that others reach HTTP, and no port at which Ray takes orders."""
    labels = [_labels(pod) for pod in _all_pods(manifests)]
    policies = [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"]
    for pod in labels:
        mine = [p for p in policies if _selects(p["podSelector"], pod)]
        if not mine:
            yield f"no policy closes the ports of {pod}"
        for rule in (rule for policy in mine for rule in policy.get("ingress", [])):
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


def egress_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Check that pods reach what they need, if anything is closed."""
    policies = [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"]
    labels = [_labels(pod) for pod in _all_pods(manifests)]
    needed: dict[str, tuple[Manifest, int | None]] = {
        **{f"pods of {other['app.kubernetes.io/component']}": (other, None) for other in labels},
        "DNS": ({"k8s-app": "kube-dns"}, 53),
        "traces": ({"app.kubernetes.io/name": "opentelemetry-collector"}, 4318),
    }
    if any(each["kind"] == "StatefulSet" for each in manifests):
        needed["Redis"] = ({"app.kubernetes.io/name": "gma-redis"}, 6379)
    for pod in labels:
        mine = [
            policy
            for policy in policies
            if "Egress" in policy["policyTypes"] and _selects(policy["podSelector"], pod)
        ]
        rules = [rule for policy in mine for rule in policy["egress"]]
        component = pod["app.kubernetes.io/component"]
        wanted = needed | ({"Kubernetes": ({}, 6443)} if component == "head" else {})
        if component != "head" and any("to" not in r and _opens(r, 6443) for r in rules):
            yield f"{component} reaches Kubernetes, and needs not"
        for name, (other, port) in wanted.items() if mine else ():
            if not any(_reaches(rule, other) and _opens(rule, port) for rule in rules):
                yield f"{component} does not reach {name}"


def _reaches(rule: Manifest, labels: Manifest) -> bool:
    return "to" not in rule or any(_selects(each["podSelector"], labels) for each in rule["to"])


def _opens(rule: Manifest, port: int | None) -> bool:
    """Whether a rule opens a port, or every one for None."""
    return "ports" not in rule or port in {each["port"] for each in rule["ports"]}


def budget_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Check that each cluster's groups have a budget of their own, which lets a worker go."""
    pods = _pods(service(manifests))
    clusters = {pod["metadata"]["labels"].get(CLUSTER) for pod in pods}
    if len(clusters) != 1 or not clusters <= set(CLUSTERS):
        yield f"pods are of the clusters {sorted(map(str, clusters))}"
    (group,) = service(manifests)["rayClusterConfig"]["workerGroupSpecs"]
    budgets = [each for each in manifests if each["kind"] == "PodDisruptionBudget"]
    lasting = "gcsFaultToleranceOptions" in service(manifests)["rayClusterConfig"]
    seen = []
    for pod in pods:
        for cluster in CLUSTERS:
            labels = {**pod["metadata"]["labels"], CLUSTER: cluster}
            mine = [each for each in budgets if _selects(each["spec"]["selector"], labels)]
            seen += mine
            worker = pod is group["template"]
            if len(mine) != int(worker or not lasting):
                yield f"{len(mine)} budgets hold a {labels['app.kubernetes.io/component']}"
            if worker and any(e["spec"]["minAvailable"] >= group["minReplicas"] for e in mine):
                yield "no worker may ever go: machines can't be drained"
    for budget in budgets:
        times = seen.count(budget)
        if times != 1:
            name = budget["metadata"]["name"]
            yield f"{name} selects nothing" if not times else f"{name} spans {times} groups of pods"


def monitor_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Check that what a PodMonitor scrapes is one port of each pod, and none that KubeRay adds."""
    pods = _all_pods(manifests)
    for monitor in (each["spec"] for each in manifests if each["kind"] == "PodMonitor"):
        if not all(_selects(monitor["selector"], pod["metadata"]["labels"]) for pod in pods):
            yield "PodMonitor selects not every pod"
        names = [each["port"] for each in monitor["podMetricsEndpoints"]]
        for pod in pods:
            of_ours = pod["spec"]["containers"]
            ports = [x.get("name") for each in of_ours for x in each.get("ports", [])]
            added = {} if deployments(manifests) else ADDED_PORTS
            if any(name in added for name in names if ports.count(name) == 0):
                yield "KubeRay adds a port that the PodMonitor scrapes"
            for name in names:
                # A Deployment has no proxy whose answers to count.
                if ports.count(name) != 1 and not (deployments(manifests) and name != names[0]):
                    yield f"PodMonitor scrapes {ports.count(name)} ports of a pod"
    for kind in ("PodMonitor", "PrometheusRule"):
        for each in (each for each in manifests if each["kind"] == kind):
            if "release" not in each["metadata"].get("labels", {}):
                yield f"{kind} has no label release: a Prometheus of the Helm chart passes it over"


def head_problems(manifests: list[Manifest]) -> Iterator[str]:
    """Check that a head which may go finds its Redis again, and workers wait for it."""
    cluster = service(manifests)["rayClusterConfig"]
    options = cluster.get("gcsFaultToleranceOptions")
    if options is None:
        return
    if "redisPassword" not in options:
        yield "Redis has no password"
    host, _, port = options["redisAddress"].partition(":")
    services = [m for m in manifests if m["kind"] == "Service" and m["metadata"]["name"] == host]
    servers = [m["spec"]["template"] for m in manifests if m["kind"] == "StatefulSet"]
    for found in services:
        if int(port) not in {each["port"] for each in found["spec"]["ports"]}:
            yield f"{host} has no port {port}"
        chosen = [
            s for s in servers if _selects({"matchLabels": found["spec"]["selector"]}, _labels(s))
        ]
        if not chosen:
            yield f"{host} leads nowhere"
        for server in chosen:
            policies = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
            if not any(_selects(policy["podSelector"], _labels(server)) for policy in policies):
                yield "anybody reaches Redis"
            (container,) = server["spec"]["containers"]
            if options.get("redisPassword", {}).get("valueFrom") not in [
                each.get("valueFrom") for each in container["env"]
            ]:
                yield "Redis has another password"
    for group in cluster["workerGroupSpecs"]:
        container = group["template"]["spec"]["containers"][0]
        waits = int(_environment(container).get("RAY_gcs_rpc_server_reconnect_timeout_s", 60))
        if waits < _settings(service(manifests)).shutdown_timeout_s:
            yield f"workers wait {waits} s for a head, less than a document may take"


def _labels(pod: Manifest) -> Manifest:
    found: Manifest = pod["metadata"].get("labels", {})
    return found


def _selects(selector: Manifest, labels: Manifest) -> bool:
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
