"""A batch on a Ray cluster, by Ray Data: a part is a task, and actors hold the model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from gma.model.training.formats.extra import needing
from gma.service.batch.batch import Batch, Moved, Report, manifest_of
from gma.service.batch.manifest import Manifest
from gma.service.batch.output import Output, left
from gma.service.batch.reader import BatchError, Reader
from gma.service.batch.records import EXTRA
from gma.service.batch.work import Done, Work
from gma.service.runners.loading import load
from gma.service.settings import Settings

logger = logging.getLogger(__name__)

PARTS_AT_ONCE = 2
"""Of an actor: while one is written, or ends with a long document, the next is read."""

IN_VAIN = 3
"""Rounds in a row in which no part was done."""


LOOK_S = 2.0
"""How often it is looked which parts are there."""


class Size(NamedTuple):
    """How many actors there are, and what each has of its machine."""

    actors: int
    cpus: int
    gpus: int


def run(
    batch: Batch, address: str, workers: int | None, moved: Moved = lambda done, size: None
) -> Report:
    """Read what is left of a batch on the cluster at `address`, with so many actors.

    Parts whose actor or machine dies are read again by those that are left. Raises ValueError and
    OSError; parts that are done stay.
    """
    if batch.complete:
        return batch.report(Done())
    with needing(f"--address {address}", EXTRA):
        import pandas as pd  # noqa: F401 (Ray Data needs it)
        import ray
        import ray.data
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"there is no Ray cluster at {address}: {error}") from error
    try:
        # In the cluster: Ray Data doesn't work through ray://, whose process may be far away.
        settings = batch.settings.model_copy(
            update={"checkpoint": batch.settings.checkpoint.absolute()}
        )
        rounds = ray.remote(num_cpus=0)(_rounds).remote(settings, batch.output.url, workers)
        moved(*batch.progress())
        while not ray.wait([rounds], timeout=LOOK_S)[0]:
            moved(*batch.progress())
        done, failure = ray.get(rounds)
    except ray.exceptions.RayError as error:
        raise BatchError(f"the cluster gave up: {error}") from error
    finally:
        ray.shutdown()
    if failure:
        raise BatchError(failure)
    return batch.finish(done)


def _rounds(settings: Settings, place: str, workers: int | None) -> tuple[Done, str | None]:
    """Read what is left, round by round, until nothing is; and why that can't be, if so.

    Runs in the cluster.
    """
    done, in_vain = Done(), 0
    try:
        output = Output(place)
        manifest = manifest_of(output)
        numbers = left(manifest, output.names())
        while numbers and in_vain < IN_VAIN:
            for told in _round(settings, place, manifest, numbers, _size(settings, workers)):
                if told["failure"]:
                    return done, told["failure"]
                done = done.and_(Done(*(int(told[name]) for name in Done._fields)))
            before, numbers = numbers, left(manifest, output.names())
            in_vain = in_vain + 1 if len(numbers) == len(before) else 0
    except (ValueError, OSError) as error:
        return done, str(error)
    if numbers:
        return done, (
            f"{len(numbers)} parts are not done, and none was in {IN_VAIN} rounds: actors die, or "
            "write where others don't see it. Ray's logs say more"
        )
    return done, None


def _round(
    settings: Settings, place: str, manifest: Manifest, numbers: Sequence[int], size: Size
) -> Iterator[Mapping[str, Any]]:
    """Read parts, and yield what is told of each. Those of an actor that dies are missing."""
    import ray
    import ray.data

    # An actor has a part of its machine.
    settings = settings.model_copy(update={"cores": settings.cores or size.cpus})
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # An actor that dies costs its own parts. Waiting for it to come again might be for ever, where
    # no machine is left that has room for it: what is missing is read in another round.
    context.max_errored_blocks = -1
    parts = ray.data.from_items([{"part": n} for n in numbers], override_num_blocks=len(numbers))
    done = parts.map_batches(
        Actor,
        fn_constructor_args=(settings, place, manifest.fingerprint),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(size.actors, len(numbers)),
            max_concurrent_calls_per_actor=PARTS_AT_ONCE,
            max_tasks_in_flight_per_actor=PARTS_AT_ONCE,
        ),
        num_cpus=size.cpus,
        num_gpus=size.gpus,
        max_restarts=-1,
        max_task_retries=0,
        scheduling_strategy="SPREAD",
    )
    try:
        yield from done.iter_rows()
    except ray.exceptions.RayError:
        # What was told may be lost with the machine that told it.
        logger.warning("a round ended early", exc_info=True)


def _size(settings: Settings, workers: int | None) -> Size:
    """One actor a GPU if there are any and none was refused, else one a machine."""
    import ray

    told: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in told if node["Alive"]]
    gpus = 0 if settings.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    if settings.device == "cuda" and not gpus:
        raise ValueError("the cluster has no GPU: leave --device out, or give --device cpu")
    if gpus:
        shares = [node.get("CPU", 1) // node["GPU"] for node in nodes if node.get("GPU", 0) >= 1]
        return Size(workers or gpus, max(1, int(min(shares))), 1)
    cpus = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise ValueError("the cluster has no CPU to give")
    actors = workers or len(cpus)
    return Size(actors, max(1, int(min(cpus) // ceil(actors / len(cpus)))), 0)


class Actor:
    """A process of the cluster with the model, which does parts as one machine does."""

    def __init__(self, settings: Settings, place: str, fingerprint: str) -> None:
        self._settings, self._output, self._fingerprint = settings, Output(place), fingerprint
        self._work: asyncio.Future[Work] | None = None

    async def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Do one part, and tell of it; of what can't be done, why."""
        (number,) = batch["part"].tolist()
        done, failure = Done(), None
        try:
            if self._work is None:
                self._work = asyncio.ensure_future(self._begin())
            done = await (await asyncio.shield(self._work)).part(number)
        except Exception as error:
            # Nobody else would tell it: what a round does not do is taken for an actor that died.
            known = isinstance(error, ValueError | OSError)
            failure = f"part {number}: {error if known else repr(error)}"
        told = {"part": number, **done._asdict()}
        return {name: np.array([x]) for name, x in told.items()} | {"failure": [failure]}

    async def _begin(self) -> Work:
        loaded = await asyncio.to_thread(load, self._settings)
        if loaded.fingerprint != self._fingerprint:
            raise ValueError(
                f"{self._settings.checkpoint} holds another model on a machine of the cluster: all "
                "need the same"
            )
        reader = Reader(self._settings, loaded)
        await reader.__aenter__()
        return Work(manifest_of(self._output), self._output, reader)
