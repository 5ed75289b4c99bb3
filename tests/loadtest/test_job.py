"""The Job's manifest: that the command takes its arguments, and that it may do nothing more."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.main import get_command

from gma.loadtest.command import loadtest

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy/loadtest/job.yaml"


@pytest.fixture
def pod() -> dict[str, Any]:
    job = yaml.safe_load(MANIFEST.read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["spec"]["backoffLimit"] == 0, "a missed SLO is no reason to load again"
    spec: dict[str, Any] = job["spec"]["template"]["spec"]
    return spec


def test_the_command_takes_its_arguments(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert container["command"] == ["gma", "loadtest"]
    app = typer.Typer()
    app.command()(loadtest)
    context = get_command(app).make_context("loadtest", list(container["args"]))
    assert set(context.params) == set(inspect.signature(loadtest).parameters)
    assert context.params["url"] == "http://gma-serve-svc:8000"
    assert context.params["out"] is None, "the report is the Job's log"


def test_runs_an_image_that_is_built_where_the_service_is(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    manual = (ROOT / "docs/deploy.md").read_text()
    assert f"docker build --target cpu -t {container['image']} ." in manual
    job = yaml.safe_load(MANIFEST.read_text())
    assert f"kubectl create namespace {job['metadata']['namespace']}\n" in manual


def test_is_restricted(pod: dict[str, Any]) -> None:
    assert pod["restartPolicy"] == "Never"
    assert not pod["automountServiceAccountToken"]
    assert pod["securityContext"]["runAsNonRoot"]
    (container,) = pod["containers"]
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp"}  # noqa: S108
