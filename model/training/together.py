"""Several processes that train one model, as `torchrun` starts them; or one, as anybody does.

Each draws crops of its own; gradients are their mean. The first alone prepares, logs, evaluates and
saves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

PATIENCE = timedelta(hours=6)
"""How long the others wait while the first prepares or evaluates."""


@contextmanager
def processes() -> Iterator[None]:
    """A context in which processes that torchrun started know of each other."""
    if size() == 1:
        yield
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which one this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def first() -> bool:
    """Whether this is the first."""
    return rank() == 0


def device() -> torch.device:
    """The device that this process trains on: a GPU of its own if there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def wait() -> None:
    """Wait until all have come here."""
    if size() > 1:
        distributed.barrier()


def total(x: Tensor) -> Tensor:
    """Return the sum of all processes' x."""
    if size() > 1:
        x = x.clone()
        distributed.all_reduce(x)
    return x


def spread(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first's tensors, in place."""
    for x in tensors if size() > 1 else ():
        distributed.broadcast(x, 0)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their mean over the processes."""
    if size() == 1:
        return
    gradients = [x.grad for x in parameters if x.grad is not None]
    flat = total(torch.cat([x.flatten() for x in gradients])) / size()
    means = torch.split(flat, [x.numel() for x in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
