"""Dashboards, alerts and the runbook agree, and a real Prometheus can answer what they ask."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from gma.service.app import local
from gma.service.observe import metrics
from gma.service.settings import Settings
from tests.deploy import kustomize
from tests.deploy.manifests import service
from tests.service.asgi import PATIENCE_S, TEXT, save_checkpoint
from tests.service.running import free_port

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "deploy" / "monitoring"
RUNBOOK = ROOT / "docs" / "runbook.md"
DASHBOARDS = ("service.json", "memory.json")
PLAIN = {"content-type": "text/plain"}

# An alert over two windows has two.
THRESHOLD = re.compile(r" (==|<|>) [\d.]+(?= and |$)")
ABSENT_WITHOUT_GPU = "Empty where there is no GPU."
GPU_ALERT = "GmaGpuMemoryFull"
KUBERNETES = "gma-kubernetes"

with_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs Prometheus: apt-get install prometheus",
)


class Question(NamedTuple):
    """An expression, and the panel, alert or record that asks it."""

    owner: str
    expression: str
    needs_more: bool
    """A GPU, or Kubernetes."""


def groups() -> dict[str, list[dict[str, Any]]]:
    """The rules by their group's name."""
    found = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return {group["name"]: group["rules"] for group in found}


def rules() -> list[dict[str, Any]]:
    return [rule for group in groups().values() for rule in group]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def questions() -> list[Question]:
    """The expressions of every panel, and of every rule whatever its threshold."""
    elsewhere = {GPU_ALERT, *(rule["alert"] for rule in groups()[KUBERNETES])}
    return [
        *(
            Question(panel["title"], target["expr"], ABSENT_WITHOUT_GPU in panel["description"])
            for file in DASHBOARDS
            for panel in json.loads((FOLDER / file).read_text())["panels"]
            for target in panel["targets"]
        ),
        *(
            Question(name, THRESHOLD.sub("", rule["expr"]), name in elsewhere)
            for rule in rules()
            for name in [rule.get("alert") or rule["record"]]
        ),
    ]


def test_dashboards_are_those_of_their_script(tmp_path: Path) -> None:
    script = FOLDER / "dashboards.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    for file in DASHBOARDS:
        written = (tmp_path / file).read_text()
        assert (FOLDER / file).read_text() == written, "python deploy/monitoring/dashboards.py"


def test_they_ask_for_metrics_that_there_are() -> None:
    kinds = {entry.name: entry.kind for entry in metrics.CATALOGUE}
    records = {rule["record"] for rule in rules() if "record" in rule}
    for question in questions():
        names = re.findall(r"\bgma_\w+", question.expression)
        others = re.findall(r"\b(?:up|kube_\w+|ray_serve_\w+|gma:[\w:]+)", question.expression)
        assert names or others
        assert {name for name in others if ":" in name} <= records
        for name in names:
            base = re.sub("_(bucket|sum|count)$", "", name)
            assert name in kinds or kinds.get(base) == "histogram", (question.owner, name)


def test_nothing_is_summed_over_namespaces() -> None:
    """Panels show one namespace; alerts keep them apart."""
    for file in DASHBOARDS:
        dashboard = json.loads((FOLDER / file).read_text())
        choices = {each["name"]: each for each in dashboard["templating"]["list"]}
        assert not choices["namespace"]["includeAll"]
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                metrics_, chosen = (
                    len(re.findall(pattern, target["expr"]))
                    for pattern in (
                        r"\bgma_",
                        r'\bgma_\w+\{namespace=~"\$namespace",job=~"\$job",pod=~"\$pod"[,}]',
                    )
                )
                assert metrics_ == chosen, target["expr"]
    for rule in rules():
        for labels in re.findall(r"\b(?:sum|max|min|count)\b(?: by \((.*?)\))?", rule["expr"]):
            assert "namespace" in labels, rule


def test_the_bound_of_the_promise_is_a_bucket() -> None:
    (entry,) = (e for e in metrics.CATALOGUE if e.name == "gma_request_seconds")
    bounds = {bound for q in questions() for bound in re.findall(r'le=~"(\d+)', q.expression)}
    assert {float(bound) for bound in bounds} < set(entry.buckets)
    (name,) = {f"{bound} s" for bound in bounds}
    assert f"within {name}" in RUNBOOK.read_text()


def test_the_burn_rates_are_those_of_the_promise() -> None:
    """Fourteen times over an hour and five minutes, six times over six hours and half an hour."""
    factors = {"1h": 14.4, "5m": 14.4, "6h": 6, "30m": 6}
    budgets = {"errors": 0.001, "late": 0.01}
    found = re.findall(r"gma:(\w+):ratio(\w+) > ([\d.]+)", (FOLDER / "alerts.yaml").read_text())
    assert len(found) == len(factors) * len(budgets)
    for promise, window, threshold in found:
        assert float(threshold) == pytest.approx(budgets[promise] * factors[window])


def test_the_maximum_is_that_of_the_manifests() -> None:
    (rule,) = (rule for rule in alerts() if rule["alert"] == "GmaAtMaximum")
    threshold = THRESHOLD.search(rule["expr"])
    assert threshold
    for variant in ("cpu", "gpu"):
        spec = service(kustomize.build(ROOT / "deploy" / "kubernetes" / variant))
        (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
        assert threshold[0] == f" > {group['maxReplicas'] - 1}"


def test_the_operators_rule_is_that_of_its_script(tmp_path: Path) -> None:
    for file in ("rules.py", "alerts.yaml"):
        shutil.copy(FOLDER / file, tmp_path)
    command = [sys.executable, str(tmp_path / "rules.py")]
    subprocess.run(command, check=True)
    written = (tmp_path / "prometheusrule.yaml").read_text()
    assert (FOLDER / "prometheusrule.yaml").read_text() == written, "deploy/monitoring/rules.py"
    assert (tmp_path / "alerts.yaml").read_text() == (FOLDER / "alerts.yaml").read_text()
    assert yaml.safe_load(written)["spec"] == yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    subprocess.run([*command, "https://wiki.example.com/runbook"], check=True)
    for file in ("prometheusrule.yaml", "alerts.yaml"):
        urls = re.findall("runbook_url: (.*)#", (tmp_path / file).read_text())
        assert urls == ["https://wiki.example.com/runbook"] * len(alerts())


def test_labels_they_choose_by_are_those_that_are_documented() -> None:
    reasons = next(e.labels["reason"] for e in metrics.CATALOGUE if e.name == "gma_refusals_total")
    (chosen,) = {
        reason for q in questions() for reason in re.findall('reason=~"([^"]+)"', q.expression)
    }
    assert set(chosen.split("|")) < set(reasons)
    phases = {p for q in questions() for p in re.findall('gma_.*phase="([^"]+)"', q.expression)}
    assert phases == {"serving"} < set(metrics.PHASES)


def test_every_alert_has_a_threshold_and_a_section_of_the_runbook() -> None:
    text = RUNBOOK.read_text().partition("\n# Kubernetes\n")[0]
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert [section.split()[0] for section in sections] == [rule["alert"] for rule in alerts()]
    for section, rule in zip(sections, alerts(), strict=True):
        for part in ("**Means.**", "**Look at.**", "**Do.**"):
            assert part in section, (rule["alert"], part)
        url = rule["annotations"]["runbook_url"]
        assert re.fullmatch(rf"https://\S+/docs/runbook\.md#{rule['alert'].lower()}", url)
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert THRESHOLD.search(rule["expr"]), rule["alert"]


def test_the_runbook_names_panels_and_settings_that_there_are() -> None:
    text = RUNBOOK.read_text()
    panels = {question.owner for question in questions()}
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", text))
    assert named
    assert named <= panels
    variables = {f"GMA_{field.upper()}" for field in Settings.model_fields}
    assert set(re.findall(r"GMA_[A-Z_]+", text)) <= variables


@with_prometheus
@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", "alerts.yaml"),
        ("check", "config", "prometheus.yaml"),
        ("test", "rules", "alerts_test.yaml"),
    ],
    ids=" ".join,
)
def test_promtool(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_both_ways() -> None:
    cases = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]
    for fires in (False, True):
        tested = {
            case["alertname"]
            for test in cases
            for case in test["alert_rule_test"]
            if bool(case.get("exp_alerts")) == fires
        }
        assert tested == {rule["alert"] for rule in alerts()}


class Prometheus:
    """A real Prometheus, asked over HTTP."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=PATIENCE_S)

    @classmethod
    @contextmanager
    def running(cls, folder: Path, target: str) -> Iterator[Prometheus]:
        """Start one with our configuration, but for the target and the pace."""
        config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
        config["rule_files"] = [str(FOLDER / "alerts.yaml")]
        (config["scrape_configs"][0]["static_configs"][0]["targets"]) = [target]
        file = folder / "prometheus.yaml"
        file.write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={file}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={address}",
                ],
                stderr=log,
            )
            try:
                prometheus = cls(f"http://{address}")
                assert soon(prometheus.ready), (folder / "log").read_text()
                yield prometheus
            finally:
                process.terminate()
                process.wait(PATIENCE_S)

    def values(self, expression: str) -> list[float]:
        """The values of an expression now, one of each series, without those that are no number."""
        expression = expression.replace("$__rate_interval", "1m").replace("$namespace", "")
        expression = re.sub(r"\$(job|pod|model)", ".*", expression)
        answer = self._get("query", query=expression)
        assert answer["status"] == "success", f"{expression}: {answer['error']}"
        values = [float(each["value"][1]) for each in answer["data"]["result"]]
        return [value for value in values if not math.isnan(value)]

    def rules(self) -> list[dict[str, Any]]:
        groups = self._get("rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def ready(self) -> bool:
        """Whether it has started."""
        with suppress(httpx.ConnectError):
            return self._http.get("/-/ready").status_code == 200
        return False

    def _get(self, path: str, **parameters: str) -> Any:
        return self._http.get(f"/api/v1/{path}", params=parameters).json()


def soon(condition: Callable[[], bool]) -> bool:
    """Ask until it is so, and give up in the end. Returns whether it was."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
    return True


@contextmanager
def load(url: str) -> Iterator[None]:
    """Send documents of several lengths, one after another, for as long as the context lasts."""
    ended = threading.Event()

    def send() -> None:
        with httpx.Client(timeout=PATIENCE_S) as http:
            while not ended.is_set():
                for text in (TEXT, 5 * TEXT):
                    http.post(f"{url}/v1/documents", content=text, headers=PLAIN)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        ended.set()
        sender.join()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the whole service under load."""
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("tiny"))
    settings = Settings.load(
        checkpoint=checkpoint,
        port=free_port(),
        device="cpu",
        rows=2,
        chunk_tokens=8,
        slots=4,
        threads=1,
    )
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        local.running(settings),
        load(local.url(settings)),
        Prometheus.running(folder, f"127.0.0.1:{settings.port}") as prometheus,
    ):
        yield prometheus


@with_prometheus
@pytest.mark.slow
class TestPrometheus:
    def test_has_an_answer_to_every_panel_and_rule(self, prometheus: Prometheus) -> None:
        """Only what a GPU or Kubernetes would tell has none: the service has neither here."""
        expected = {question for question in questions() if question.needs_more}
        empty = set(questions())

        def answered() -> bool:
            nonlocal empty
            empty = {q for q in empty if not prometheus.values(q.expression)}
            return empty == expected

        assert soon(answered), empty - expected

    def test_sees_every_process_in_one_scrape(self, prometheus: Prometheus) -> None:
        assert prometheus.values('count(up{job="gma"})') == [1]
        for role in ("gateway", "worker"):
            assert prometheus.values(f'gma_resident_memory_bytes{{role="{role}"}}')[0] > 0

    def test_knows_every_alert_and_none_fires(self, prometheus: Prometheus) -> None:
        expected = {rule["alert"]: ("ok", "inactive") for rule in alerts()}

        def states() -> dict[str, tuple[str, str]]:
            return {
                rule["name"]: (rule["health"], rule["state"])
                for rule in prometheus.rules()
                if rule["type"] == "alerting"
            }

        # Before the first scrape there was no worker to be seen.
        assert soon(lambda: states() == expected), states()
