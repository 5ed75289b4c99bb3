"""The alerts for the Prometheus operator, written by `python deploy/monitoring/rules.py`.

With an address, as in `rules.py https://example.com/gma/runbook`, every alert leads to your own
copy of docs/runbook.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent

FOLDER = Path(__file__).parent

HEAD = """\
# Written by `python deploy/monitoring/rules.py` from alerts.yaml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: gma
  labels:
    app.kubernetes.io/name: gma-service
    release: kube-prometheus-stack
spec:
"""


def addressed(alerts: str, runbook: str) -> str:
    """The alerts' text with another address of the runbook."""
    return re.sub(r"runbook_url: [^#\n]+#", lambda _: f"runbook_url: {runbook}#", alerts)


def resource(alerts: str) -> str:
    """A PrometheusRule of the alerts."""
    return HEAD + indent(alerts[alerts.index("groups:") :], "  ")


def main(arguments: Sequence[str]) -> None:
    """Write the rule, and the address into the alerts if there is one."""
    file = FOLDER / "alerts.yaml"
    alerts = file.read_text(encoding="utf-8")
    for runbook in arguments:
        alerts = addressed(alerts, runbook)
        file.write_text(alerts, encoding="utf-8")
    (FOLDER / "prometheusrule.yaml").write_text(resource(alerts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
