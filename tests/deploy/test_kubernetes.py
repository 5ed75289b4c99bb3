"""The manifests are right as they are, and every kind of mistake in them is caught."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from gma.service.cli import main as cli
from tests.deploy import kustomize
from tests.deploy.manifests import Manifest, problems, serve_config, service

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
CLUSTERS = ("cpu", "gpu")
VARIANTS = (*CLUSTERS, "single")

# Components of a RayService alone.
OF_CLUSTERS = {"fault-tolerance", "second"}

# Components that go together, each of them at least once.
TOGETHER = (
    (),
    ("monitoring", "second"),
    ("fault-tolerance", "egress"),
    ("model-volume", "kernels"),
    ("model-hub", "egress", "egress-https"),
    ("model-s3", "kernels", "fault-tolerance", "monitoring", "second", "egress", "egress-https"),
)


GONE = object()
NGINX = "nginx.ingress.kubernetes.io"

# What people change, and of which variants.
EXAMPLES = {
    "ingress": VARIANTS,
    "mesh": VARIANTS,
    "models": ("cpu",),
    "nodes": ("cpu", "single"),
    "priority": VARIANTS,
    "settings": VARIANTS,
    "single-gpu": ("single",),
    "single-size": ("single",),
    "volume": VARIANTS,
    "workers": ("cpu",),
    "zones": CLUSTERS,
}


def write(folder: Path, variant: str, components: Sequence[str] = ()) -> Path:
    """An overlay in `folder`, as a user would write it."""
    (folder / "deploy").symlink_to(FOLDER.parent)
    overlay = folder / "my-gma"
    overlay.mkdir()
    made = {
        "resources": [f"../deploy/kubernetes/{variant}"],
        "components": [f"../deploy/kubernetes/{name}" for name in components],
        "images": [{"name": "gma-service", "newName": "example.com/gma", "newTag": "1"}],
        "labels": [{"pairs": {"release": "mine"}}],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(made))
    return overlay


def test_every_component_is_tried() -> None:
    folders = {file.parent.name for file in FOLDER.glob("*/kustomization.yaml")}
    assert {name for names in TOGETHER for name in names} == folders - {*VARIANTS, "base"}


@pytest.mark.parametrize("components", TOGETHER, ids="+".join)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_right(tmp_path: Path, variant: str, components: Sequence[str]) -> None:
    if variant == "single":
        components = [name for name in components if name not in OF_CLUSTERS]
    manifests = kustomize.build(write(tmp_path, variant, components))
    assert problems(manifests) == []
    assert {m["metadata"]["labels"]["release"] for m in manifests} == {"mine"}


def test_every_example_is_tried() -> None:
    assert {file.parent.name for file in FOLDER.glob("examples/*/kustomization.yaml")} == {
        *EXAMPLES
    }


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name in EXAMPLES for variant in EXAMPLES[name]]
)
def test_an_example_changes_something_and_is_right(tmp_path: Path, name: str, variant: str) -> None:
    manifests = kustomize.build(write(tmp_path, variant, [f"examples/{name}"]))
    assert problems(manifests) == []
    (tmp_path / "as-it-is").mkdir()
    assert manifests != kustomize.build(write(tmp_path / "as-it-is", variant))


def test_the_example_of_workers_differs_from_the_variant_in_numbers_alone(tmp_path: Path) -> None:
    def numberless(at: Any) -> Any:
        if isinstance(at, dict):
            return {key: numberless(value) for key, value in at.items()}
        if isinstance(at, list):
            return [numberless(each) for each in at]
        return None if isinstance(at, int | float) else at

    configs = []
    for folder, components in (("a", []), ("b", ["examples/workers"])):
        (tmp_path / folder).mkdir()
        manifests = kustomize.build(write(tmp_path / folder, "cpu", components))
        configs.append(numberless(serve_config(service(manifests))))
    assert configs[0] == configs[1]


def examples_of(variant: str) -> list[str]:
    """Those that go together: a pod of one size, and one Serve config."""
    apart = {"models", "single-gpu"}
    return [f"examples/{x}" for x in EXAMPLES if variant in EXAMPLES[x] and x not in apart]


@pytest.mark.parametrize("variant", VARIANTS)
def test_examples_go_together(tmp_path: Path, variant: str) -> None:
    assert problems(kustomize.build(write(tmp_path, variant, examples_of(variant)))) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("metadata.annotations", {f"{NGINX}/proxy-body-size": "0"}, "buffering is not off"),
        ("metadata.annotations", {f"{NGINX}/proxy-request-buffering": "off"}, "size is not 0"),
        ("spec.tls", GONE, "in the clear"),
        ("spec.tls.0.hosts.0", "example.com", "in the clear"),
        ("spec.rules.0.http.paths.0.backend.service.name", "gma", "leads elsewhere"),
        ("spec.rules.0.http.paths.0.pathType", "prefix", "is not one of"),
    ],
)
def test_a_mistake_in_the_ingress_is_caught(
    tmp_path: Path, path: str, value: object, message: str
) -> None:
    manifests = kustomize.build(write(tmp_path, "single", ["examples/ingress"]))
    (ingress,) = (each for each in manifests if each["kind"] == "Ingress")
    change(ingress, path, value)
    found = problems(manifests)
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("variant", "components"),
    [
        *(("gpu", components) for components in TOGETHER),
        ("single", [x for x in TOGETHER[-1] if x not in OF_CLUSTERS]),
        ("single", ["model-hub", "examples/single-gpu"]),
        *((variant, examples_of(variant)) for variant in VARIANTS),
    ],
    ids=lambda given: given if isinstance(given, str) else "+".join(given),
)
def test_kubectl_makes_the_same_of_them(
    tmp_path: Path, variant: str, components: Sequence[str]
) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    shutil.copytree(FOLDER.parent, tmp_path / "copy")  # it wants no links
    overlay = write(tmp_path, variant, components)
    (tmp_path / "deploy").unlink()
    (tmp_path / "copy").rename(tmp_path / "deploy")
    command = ["kubectl", "kustomize", str(overlay)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)

    def in_order(manifests: list[Manifest]) -> list[Manifest]:
        return sorted(manifests, key=lambda m: (m["kind"], m["metadata"]["name"]))

    made = list(yaml.safe_load_all(ran.stdout))
    assert in_order(made) == in_order(kustomize.build(overlay))


def test_the_hub_is_asked_by_a_command_that_there_is() -> None:
    """In the pods' first container, which runs in the service's own image."""
    files = [FOLDER / "model-hub" / name for name in ("rayservice.yaml", "deployment.yaml")]
    made = [operation for file in files for operation in yaml.safe_load(file.read_text())]
    containers = [op["value"][0] for op in made if op["path"].endswith("initContainers")]
    assert len(containers) == 3
    for container in containers:
        assert container["image"] == "gma-service"
        *shell, script = container["command"]
        assert shell == ["sh", "-c"]
        program, *words = shlex.split(script.partition(" || ")[2])
        command = typer.main.get_command(cli.app)
        with command.make_context(program, list(words), resilient_parsing=True):
            pull = command.commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]
        assert pull.params["name"] == "$MODEL"
        assert str(pull.params["out"]) == "/model/checkpoint"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("namePrefix: my-", "namePrefix is not known"),
        ("configMapGenerator: [{name: a, files: [], options: {}}]", "a name with a hash"),
        (
            "labels: [{pairs: {a: b}, includeSelectors: true}]\nresources: [m.yaml]",
            "labels of more",
        ),
        ("patches: [{path: p.yaml, target: {kind: Pod}}]", "patches nothing"),
    ],
)
def test_what_the_renderer_does_not_know_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "kustomization.yaml").write_text(text)
    (tmp_path / "p.yaml").write_text("[]")
    (tmp_path / "m.yaml").write_text("{kind: Pod, metadata: {name: a}}")
    with pytest.raises(ValueError, match=message):
        kustomize.build(tmp_path)


CLUSTER = "spec.rayClusterConfig"
HEAD = f"{CLUSTER}.headGroupSpec.template"
WORKERS = f"{CLUSTER}.workerGroupSpecs.0"
WORKER = f"{WORKERS}.template"
RAY = f"{WORKER}.spec.containers.0"
APPLICATION = "applications.0"
OPTIONS = f"{CLUSTER}.gcsFaultToleranceOptions"
SCALING = f"{APPLICATION}.deployments.1.autoscaling_config"
CLUSTER_OF = "spec.selector.matchLabels.gma/cluster"


def change(at: Any, path: str, value: object) -> None:
    *steps, last = path.split(".")
    for step in steps:
        at = at[int(step)] if isinstance(at, list) else at[step]
    key: Any = int(last) if isinstance(at, list) else last
    if value is GONE:
        del at[key]
    else:
        at[key] = value


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name))
    return found


@pytest.fixture
def cpu(tmp_path: Path) -> list[Manifest]:
    return kustomize.build(write(tmp_path, "cpu", ["monitoring"]))


@pytest.mark.parametrize(
    ("kind", "name", "path", "value", "message"),
    [
        # The APIs' schemas.
        ("RayService", "gma", "apiVersion", "ray.io/v1alpha1", "apiVersion"),
        ("RayService", "gma", "kind", "RayServices", "is no kind"),
        ("RayService", "gma", "metadata.name", "GMA", "metadata.name"),
        ("RayService", "gma", "spec.rayClusterSpec", {}, "'rayClusterSpec' was unexpected"),
        ("RayService", "gma", "spec.serveConfigV2", {}, "serveConfigV2"),
        ("RayService", "gma", "spec.rayClusterDeletionDelaySeconds", "900", "'900' is not of type"),
        ("RayService", "gma", "spec.upgradeStrategy.type", "Rolling", "'Rolling' is not one of"),
        ("RayService", "gma", f"{CLUSTER}.authOptions.mode", "tokens", "is not one of"),
        ("RayService", "gma", f"{CLUSTER}.headGroupSpec", GONE, "'headGroupSpec' is a required"),
        ("RayService", "gma", f"{WORKERS}.rayStartParams", {"num-cpus": 4}, "4 is not of type"),
        ("RayService", "gma", f"{WORKERS}.replica", 2, "'replica' was unexpected"),
        ("RayService", "gma", f"{RAY}.resources.requests.cpu", 5, "5 is not of type"),
        ("RayService", "gma", f"{RAY}.resources.limits.memory", "8GB", "does not match"),
        ("RayService", "gma", f"{RAY}.ports.0.containerPort", 80000, "greater than the maximum"),
        ("RayService", "gma", f"{RAY}.livenessprobe", {}, "'livenessprobe' was unexpected"),
        ("PodDisruptionBudget", "gma-workers-a", "spec.minAvailable", "50%", "is not of type"),
        ("PodDisruptionBudget", "gma-workers-a", "spec.maxUnavailable", 1, "was unexpected"),
        ("NetworkPolicy", "gma", "spec.ingress.1.ports.0.port", "http", "is not of type"),
        ("PodMonitor", "gma", "spec.podMetricsEndpoints", [], "non-empty"),
        ("Role", "gma-head", "rules.0.verbs", ["*"], "is not one of"),
        # Drains.
        ("RayService", "gma", "spec.rayClusterDeletionDelaySeconds", 60, "not longer than"),
        ("RayService", "gma", "spec.rayClusterDeletionDelaySeconds", GONE, "is 60, not longer"),
        ("RayService", "gma", f"{WORKER}.spec.terminationGracePeriodSeconds", 600, "not longer"),
        ("RayService", "gma", f"{WORKER}.spec.terminationGracePeriodSeconds", GONE, "is 30, not"),
        ("RayService", "gma", f"{RAY}.env.1.value", "120", "HARD_STOP_AFTER_S is 120"),
        ("RayService", "gma", f"{RAY}.env.2.value", "600", "DRAIN_TIMEOUT_S is 600, not longer"),
        ("RayService", "gma", f"{RAY}.env.2.value", "660", "it is killed after 660"),
        ("RayService", "gma", f"{HEAD}.spec.containers.0.env.2", GONE, "DRAIN_TIMEOUT_S is 30"),
        ("RayService", "gma", "spec.upgradeStrategy", {"type": "None"}, "no second cluster"),
        # Pods.
        ("RayService", "gma", f"{CLUSTER}.authOptions", GONE, "asks nobody for a token"),
        ("RayService", "gma", f"{WORKER}.spec.securityContext.runAsNonRoot", False, "as root"),
        ("RayService", "gma", f"{WORKER}.spec.securityContext.runAsUser", 0, "as root"),
        ("RayService", "gma", f"{HEAD}.spec.securityContext.seccompProfile", GONE, "seccomp"),
        ("RayService", "gma", f"{RAY}.securityContext", GONE, "root file system"),
        ("RayService", "gma", f"{RAY}.securityContext.allowPrivilegeEscalation", GONE, "gain"),
        ("RayService", "gma", f"{RAY}.securityContext.capabilities.drop", ["NET"], "capabilities"),
        (
            "RayService",
            "gma",
            f"{RAY}.resources",
            {"requests": {"cpu": "5"}, "limits": {"cpu": "5"}},
            "no limit",
        ),
        ("RayService", "gma", f"{RAY}.readinessProbe", GONE, "need wget"),
        ("RayService", "gma", f"{RAY}.env.0.value", "0", "the slow one"),
        ("RayService", "gma", f"{RAY}.env.5.value", "0", "files that go with the pod"),
        ("RayService", "gma", f"{RAY}.volumeMounts.0", GONE, "nowhere to write"),
        ("RayService", "gma", f"{RAY}.volumeMounts.1", GONE, "no Secret"),
        ("RayService", "gma", f"{RAY}.volumeMounts.0.name", "temp", "there is no volume temp"),
        ("RayService", "gma", f"{RAY}.image", "gma-service:gpu", "different images"),
        (
            "RayService",
            "gma",
            f"{WORKER}.spec.volumes.1",
            {"name": "api-keys", "emptyDir": {}},
            "no Secret",
        ),
        ("RayService", "gma", f"{WORKER}.spec.enableServiceLinks", GONE, "are no settings"),
        # Capacity.
        ("RayService", "gma", f"{WORKERS}.rayStartParams.num-cpus", GONE, "other cores"),
        ("RayService", "gma", f"{WORKERS}.maxReplicas", 8, "between other numbers"),
        ("RayService", "gma", f"{RAY}.resources.requests.cpu", "4", "gateways ask for"),
        ("RayService", "gma", f"{RAY}.resources.requests.cpu", "8", "two workers fit"),
        (
            "RayService",
            "gma",
            f"{RAY}.resources.requests",
            {"cpu": "5", "nvidia.com/gpu": "1"},
            "GPUs of its pod",
        ),
        # Networks.
        ("NetworkPolicy", "gma", "spec.ingress.1.ports.0.port", 8265, "anybody reaches [8265]"),
        ("NetworkPolicy", "gma", "spec.ingress.1", {"ports": []}, "anybody reaches every port"),
        (
            "NetworkPolicy",
            "gma",
            "spec.ingress.0.from.0.podSelector",
            {"matchLabels": {"a": "b"}},
            "others reach every",
        ),
        (
            "NetworkPolicy",
            "gma",
            "spec.ingress.0.from.0.namespaceSelector",
            {},
            "others reach every",
        ),
        (
            "NetworkPolicy",
            "gma-metrics",
            "spec.ingress.0.ports.0.port",
            6379,
            "others reach [6379]",
        ),
        # Selectors.
        ("PodMonitor", "gma", "spec.selector.matchLabels", {"app": "gma"}, "not every pod"),
        ("PodMonitor", "gma", "spec.podMetricsEndpoints.0.port", "http", "scrapes 0 ports"),
        ("PodDisruptionBudget", "gma-workers-a", "spec.minAvailable", 2, "no worker may ever go"),
        (
            "PodDisruptionBudget",
            "gma-head-a",
            "spec.selector.matchLabels",
            {"a": "b"},
            "selects nothing",
        ),
        ("PodDisruptionBudget", "gma-head-a", CLUSTER_OF, GONE, "spans 2 groups"),
        ("PodDisruptionBudget", "gma-workers-b", CLUSTER_OF, "a", "2 budgets hold a worker"),
        ("RayService", "gma", f"{WORKER}.metadata.labels.gma/cluster", "c", "of the clusters"),
        ("RayService", "gma", f"{HEAD}.metadata.labels.gma/cluster", GONE, "of the clusters"),
        # What Prometheus finds.
        ("PodMonitor", "gma", "spec.podMetricsEndpoints.0.port", "dashboard", "KubeRay adds"),
        (
            "RayService",
            "gma",
            f"{RAY}.ports.0",
            {"name": "gma-metrics", "containerPort": 9464},
            "scrapes 2 ports",
        ),
        ("PodMonitor", "gma", "metadata.labels.release", GONE, "no label release"),
        ("PrometheusRule", "gma", "metadata.labels", GONE, "no label release"),
        # Settings.
        (
            "RayService",
            "gma",
            f"{HEAD}.spec.containers.0.env.0",
            {"name": "GMA_ROW", "value": "16"},
            "GMA_ROW is not a setting",
        ),
        (
            "RayService",
            "gma",
            f"{HEAD}.spec.containers.0.env.0",
            {"name": "GMA_ROWS", "value": "many"},
            "settings: GMA_ROWS",
        ),
        # Models.
        (
            "RayService",
            "gma",
            f"{RAY}.env.0",
            {"name": "GMA_CHECKPOINT", "value": "/model"},
            "pods differ in their settings",
        ),
        (
            "RayService",
            "gma",
            f"{RAY}.env.0",
            {"name": "GMA_CHECKPOINT", "value": "/model"},
            "GMA_CHECKPOINT is on no volume",
        ),
    ],
)
def test_a_mistake_is_caught(
    cpu: list[Manifest], kind: str, name: str, path: str, value: object, message: str
) -> None:
    change(find(cpu, kind, name), path, value)
    found = problems(cpu)
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("kind", "name", "path", "value", "message"),
    [
        ("RayService", "gma", f"{WORKER}.spec.nodeSelector", GONE, "there are no kernels"),
        ("RayService", "gma", f"{OPTIONS}.redisPassword", GONE, "Redis has no password"),
        ("RayService", "gma", f"{OPTIONS}.redisPassword", {"value": "a"}, "is a required property"),
        ("RayService", "gma", f"{OPTIONS}.redisAddress", "gma-redis:1", "has no port 1"),
        (
            "RayService",
            "gma",
            f"{OPTIONS}.redisPassword.valueFrom.secretKeyRef.key",
            "a",
            "another password",
        ),
        ("RayService", "gma", f"{RAY}.env.9", GONE, "workers wait 60 s for a head"),
        ("Service", "gma-redis", "spec.selector", {"a": "b"}, "leads nowhere"),
        ("NetworkPolicy", "gma-redis", "spec.podSelector.matchLabels", {"a": "b"}, "anybody"),
        ("NetworkPolicy", "gma-egress", "spec.egress.0", GONE, "does not reach pods of head"),
        ("NetworkPolicy", "gma-egress", "spec.egress.1", GONE, "does not reach DNS"),
        ("NetworkPolicy", "gma-egress", "spec.egress.2", GONE, "does not reach Redis"),
        ("NetworkPolicy", "gma-egress", "spec.egress.3.ports", [], "does not reach traces"),
        ("NetworkPolicy", "gma-egress-head", "spec.egress", [], "does not reach Kubernetes"),
        (
            "NetworkPolicy",
            "gma-egress",
            "spec.egress.1",
            {"ports": [{"port": 6443}]},
            "worker reaches Kubernetes",
        ),
    ],
)
def test_a_mistake_in_a_component_is_caught(
    tmp_path: Path, kind: str, name: str, path: str, value: object, message: str
) -> None:
    manifests = kustomize.build(write(tmp_path, "gpu", ["fault-tolerance", "egress"]))
    change(find(manifests, kind, name), path, value)
    found = problems(manifests)
    assert any(message in problem for problem in found), found


POD = "spec.template.spec"
GMA = f"{POD}.containers.0"


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("Deployment", "spec.replica", 1, "'replica' was unexpected"),
        ("Deployment", "spec.strategy.type", "Rolling", "'Rolling' is not one of"),
        ("Deployment", f"{POD}.terminationGracePeriodSeconds", 610, "documents are cut"),
        ("Deployment", f"{POD}.terminationGracePeriodSeconds", GONE, "is 30: documents are cut"),
        ("Deployment", f"{GMA}.lifecycle.preStop.sleep.seconds", 60, "documents are cut"),
        ("Deployment", f"{POD}.securityContext.runAsNonRoot", GONE, "as root"),
        ("Deployment", f"{GMA}.securityContext.readOnlyRootFilesystem", False, "root file system"),
        ("Deployment", f"{POD}.enableServiceLinks", GONE, "are no settings"),
        ("Deployment", f"{GMA}.command", ["gma", "info"], "does not serve"),
        ("Deployment", f"{GMA}.env.0.value", "127.0.0.1", "nobody reaches it"),
        ("Deployment", f"{GMA}.env.1.value", "8", "counts on other cores"),
        ("Deployment", f"{GMA}.env.1.name", "GMA_CORE", "GMA_CORE is not a setting"),
        ("Deployment", f"{GMA}.env.1.value", "four", "settings: GMA_CORES"),
        ("Deployment", f"{GMA}.env.2", GONE, "are no Secret"),
        ("Deployment", f"{GMA}.env.3.value", "3600", "documents are cut"),
        ("Deployment", f"{GMA}.volumeMounts.0", GONE, "nowhere to write"),
        ("Deployment", f"{GMA}.volumeMounts.1", GONE, "64 MiB of shared memory"),
        ("Deployment", f"{GMA}.volumeMounts.2", GONE, "are no Secret"),
        ("Deployment", f"{GMA}.startupProbe", GONE, "startupProbe does not ask"),
        ("Deployment", f"{GMA}.readinessProbe.httpGet.path", "/info", "readinessProbe does not"),
        ("Deployment", f"{GMA}.ports", GONE, "scrapes 0 ports"),
        ("Deployment", "spec.selector.matchLabels", {"a": "b"}, "does not know its pod"),
        ("Service", "spec.selector", {"a": "b"}, "leads nowhere"),
        ("Service", "spec.ports.0.port", 80, "another port"),
        ("NetworkPolicy", "spec.podSelector.matchLabels", {"a": "b"}, "no policy closes"),
        ("NetworkPolicy", "spec.ingress.0", {"ports": []}, "anybody reaches every port"),
        ("PodMonitor", "spec.selector.matchLabels", {"app": "gma"}, "not every pod"),
    ],
)
def test_a_mistake_in_a_single_pod_is_caught(
    tmp_path: Path, kind: str, path: str, value: object, message: str
) -> None:
    manifests = kustomize.build(write(tmp_path, "single", ["monitoring"]))
    (found,) = (each for each in manifests if each["kind"] == kind)
    change(found, path, value)
    told = problems(manifests)
    assert any(message in problem for problem in told), told


def test_a_head_that_may_go_has_no_budget(tmp_path: Path, cpu: list[Manifest]) -> None:
    """Or a machine could not be drained, and the drain would not end."""
    folder = tmp_path / "other"
    folder.mkdir()
    manifests = kustomize.build(write(folder, "cpu", ["fault-tolerance"]))
    found = problems([*manifests, find(cpu, "PodDisruptionBudget", "gma-head-a")])
    assert found == ["1 budgets hold a head"]


@pytest.mark.parametrize("kind", ["PodDisruptionBudget", "NetworkPolicy"])
def test_what_is_left_out_is_caught(cpu: list[Manifest], kind: str) -> None:
    assert problems([each for each in cpu if each["kind"] != kind])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "applications.0.import_path",
            "gma.service.app.deployments",
            "there is no gma.service.app.deployments",
        ),
        (
            "applications.0.import_path",
            "gma.service.app.deployments:build_it",
            "there is no gma.service.app.deployments:build_it",
        ),
        ("applications.0.deployment", [], "no field deployment"),
        ("http_option", {}, "no field http_option"),
        ("http_options.port", "http", "Serve config"),
        (f"{APPLICATION}.args.gateway", 2, "GMA_GATEWAY is not a setting"),
        (f"{APPLICATION}.args.device", "tpu", "GMA_DEVICE"),
        (f"{APPLICATION}.args.device", GONE, "the device is not said"),
        (f"{APPLICATION}.args.device", "cuda", "asks for 0 GPUs"),
        (f"{APPLICATION}.args.shutdown_timeout_s", 3600, "not longer than"),
        (f"{APPLICATION}.args.api_keys_file", GONE, "no Secret"),
        (f"{APPLICATION}.args.threads", 8, "more threads"),
        (f"{APPLICATION}.args.cores", GONE, "counts on other cores"),
        (f"{APPLICATION}.args.gateways", 8, "gateways ask for"),
        (f"{APPLICATION}.args.gateways", 3, "3 gateways have 2 places"),
        (f"{APPLICATION}.deployments.0.max_replicas_per_node", GONE, "2 gateways have 4 places"),
        (f"{APPLICATION}.deployments.1.name", "Workers", "there is no deployment Workers"),
        (f"{APPLICATION}.deployments.1.ray_actor_options.cpus", 1, "no field cpus"),
        (f"{SCALING}.min_replica", 1, "no field min_replica"),
        (f"{SCALING}.min_replicas", 9, "must be greater than"),
        (f"{SCALING}.max_replicas", 9, "between other numbers"),
        (
            f"{SCALING}.policy.policy_function",
            "gma.service.app.autoscaling:Tokens",
            "no attribute 'Tokens'",
        ),
        (f"{SCALING}.policy.policy_kwargs", {"tokens": 1}, "autoscaling policy"),
        (f"{SCALING}.policy.policy_kwargs.tokens_per_worker", 0, "autoscaling policy"),
        (f"{SCALING}.policy.policy_kwargs.tokens_per_worker", 65536, "one long document"),
    ],
)
def test_a_mistake_in_the_serve_config_is_caught(
    cpu: list[Manifest], path: str, value: object, message: str
) -> None:
    spec = service(cpu)
    config = serve_config(spec)
    change(config, path, value)
    spec["serveConfigV2"] = yaml.safe_dump(config)
    found = problems(cpu)
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("applications.0.name", "gma-model-a-1", "would not take gma-model-a-1"),
        ("applications.1.name", "books", "would not take books"),
        ("applications.2.args.device", GONE, "the device is not said"),
        ("applications.2.args.models", "a=b", "GMA_MODELS"),
        (
            "applications.2.deployments.0.autoscaling_config.max_replicas",
            3,
            "between other numbers",
        ),
    ],
)
def test_a_mistake_in_several_models_is_caught(
    tmp_path: Path, path: str, value: object, message: str
) -> None:
    manifests = kustomize.build(write(tmp_path, "cpu", ["examples/models"]))
    spec = service(manifests)
    config = serve_config(spec)
    change(config, path, value)
    spec["serveConfigV2"] = yaml.safe_dump(config)
    assert any(message in problem for problem in problems(manifests))
