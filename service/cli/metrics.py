"""The command `gma metrics`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def metrics(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The service's GMA_METRICS_DIR.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port to listen on.")] = 9464,
) -> None:
    """Answer GET /metrics for the service's processes on this machine, until SIGTERM.

    For clusters: a gateway knows the metrics of its own machine, and may be on another.

    \b
    Example:
      gma metrics /tmp/gma-metrics
    """
    from gma.service.observe import sharing

    sharing.join(folder)
    from gma.service.observe.exporter import Exporter

    with Exporter(host, port) as exporter:
        exporter.serve_forever()
