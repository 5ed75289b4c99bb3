"""Where the models of a machine run: on its cores or on its GPUs, which they may share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gma.service.app.start import StartError
from gma.service.settings import Settings


def placed(settings: Settings, gpus: int) -> Settings:
    """The settings as processes take them that are in another folder, on a machine with so many
    GPUs. Raises StartError with fewer than its workers need, and for settings that are for another
    device."""
    paths = {name: value for name, value in settings if isinstance(value, Path)}
    return settings.model_copy(
        update={
            "device": device_of(settings, gpus),
            **{name: path.absolute() for name, path in paths.items()},
        }
    )


def device_of(settings: Settings, gpus: int) -> str:
    """Where a model is to run, cpu or cuda, on a machine with so many GPUs.

    Raises StartError with fewer of them than its workers need, and for settings that are for the
    other.
    """
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and gpus > 0)
    needed = gpus_of([settings]) if on_gpu else 0
    if needed > gpus:
        what = "as many GPUs" if settings.gpu_share == 1 else f"{needed} GPUs"
        raise StartError(f"{settings.workers} workers on cuda need {what}; there are {gpus}")
    try:
        settings.check_device(on_gpu=on_gpu)
    except ValueError as error:
        raise StartError(str(error)) from error
    return "cuda" if on_gpu else "cpu"


def check_room(models: Iterable[Settings], gpus: int) -> None:
    """Raises StartError if models that are placed need more GPUs than there are, all together."""
    needed = gpus_of([each for each in models if each.device == "cuda"])
    if needed > gpus:
        raise StartError(
            f"the models need {needed} GPUs in all, and there are {gpus}: GMA_GPU_SHARE lets "
            "several share one"
        )


def gpus_of(models: Iterable[Settings]) -> int:
    """How many GPUs the workers of models on cuda need: the largest share first, each on the first
    GPU that has as much left."""
    shares = [each.gpu_share for each in models for _ in range(each.workers)]
    left: list[float] = []
    for share in sorted(shares, reverse=True):
        place = next((n for n, free in enumerate(left) if free >= share - 1e-6), None)
        if place is None:
            left.append(1 - share)
        else:
            left[place] -= share
    return len(left)
