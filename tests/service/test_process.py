"""What a process of the service does before the rest."""

from __future__ import annotations

import json
import subprocess
import sys

LOGS = """
import logging
from gma.service.app import process
from gma.service.settings import Settings
process.set_up(Settings())
logging.getLogger("gma.service").info("request", extra={"fields": {"id": "mine-1"}})
"""


def test_in_a_cluster_it_logs_to_stdout() -> None:
    ended = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True, check=True)
    (line,) = ended.stdout.splitlines()
    logged = json.loads(line)
    assert (logged["message"], logged["id"]) == ("request", "mine-1")
    assert not ended.stderr


def test_what_needs_a_process_that_is_set_up_is_not_imported_before() -> None:
    """prometheus_client decides when it is imported whether processes share their metrics."""
    heavy = "{'prometheus_client', 'torch', 'triton', 'ray.serve'}"
    code = f"import sys, gma.service.app.deployments; print({heavy} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
