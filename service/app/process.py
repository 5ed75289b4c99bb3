"""What a deployment's process needs before it imports the rest. It imports nothing heavy itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gma.service.cores import cores
from gma.service.observe import logs
from gma.service.runners import kernel_cache
from gma.service.settings import Settings

# How long a thread may keep the interpreter from the event loop's: by default 5 ms, and whoever
# tokenizes takes its turn again and again.
SWITCH_S = 0.0005

# Gateways, unless settings say how many.
MOST_GATEWAYS, CORES_OF_GATEWAY = 8, 2


def set_up(settings: Settings) -> None:
    """Prepare this process. Call it before torch, triton or prometheus_client is imported."""
    logs.configure(settings.log_level)
    sys.setswitchinterval(SWITCH_S)
    if settings.metrics_dir:
        share_metrics(settings.metrics_dir)
    if settings.compile_cache:
        kernel_cache.use(settings.compile_cache)


def share_metrics(folder: Path) -> None:
    """Share metrics with other processes through a folder, which is made if need be.

    Raises OSError if it can't be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)


def gateway_count(settings: Settings) -> int:
    """How many gateways there are to be."""
    return settings.gateways or max(1, min(MOST_GATEWAYS, cores() // CORES_OF_GATEWAY))
