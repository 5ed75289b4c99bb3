"""What a deployment's process needs before it imports the rest. It imports nothing heavy itself."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from gma.service.app.ray import keep_to_loopback
from gma.service.app.stderr import STDERR, given_stderr
from gma.service.cores import cores_for
from gma.service.observe import logs, sharing
from gma.service.runners import kernel_cache
from gma.service.settings import Settings

# How long a thread may keep the interpreter from the event loop's: by default 5 ms, and whoever
# tokenizes takes its turn again and again.
SWITCH_S = 0.0005

# Gateways, unless settings say how many. Never one alone: nobody would listen until it is replaced.
LEAST_GATEWAYS, MOST_GATEWAYS, CORES_OF_GATEWAY = 2, 8, 2


def set_up(settings: Settings, run: Path | None = None) -> None:
    """Prepare this process. Call it before torch, triton or prometheus_client is imported.

    `run` is the folder of the run if it is of one machine: there it logs to the stderr of
    `gma serve`, and cannot be reached from another. In a cluster it logs to its stdout, which is
    the container's where RAY_LOG_TO_STDERR=1 keeps Ray from putting a file in its place: what Ray
    says of itself is then on stderr.
    """
    # The process's own: Serve puts something else into sys.stdout.
    output: TextIO | None = sys.__stdout__
    if run:
        keep_to_loopback()
        output = None
        with suppress(OSError):  # who gives it ends just now
            output = given_stderr(run / STDERR)
    logs.configure(settings.log_level, output)
    sys.setswitchinterval(SWITCH_S)
    if settings.metrics_dir:
        sharing.join(settings.metrics_dir)
    if settings.compile_cache:
        kernel_cache.use(settings.compile_cache)


def gateway_count(settings: Settings) -> int:
    """How many gateways there are to be."""
    by_cores = cores_for(settings) // CORES_OF_GATEWAY
    return settings.gateways or max(LEAST_GATEWAYS, min(MOST_GATEWAYS, by_cores))
