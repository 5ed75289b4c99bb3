"""How long calls take that take turns, what memory they need, and what the machine can do at best.

On a CUDA device times are between events, and a call may be a CUDA graph's replay. On the CPU they
are the wall clock's, and memory is not measured.
"""

from __future__ import annotations

import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.definitions import relative_error

Call = Callable[[], Any]

TURN_S = 0.02
"""A turn repeats its call until it lasts about this long."""


class Timing(NamedTuple):
    seconds: float  # median over the turns
    low: float  # first and third quartile
    high: float
    turns: int


def turns(
    calls: Mapping[str, Call], device: torch.device, *, rounds: int = 11, budget_s: float = 2.0
) -> dict[str, Timing]:
    """Time the calls. Every round gives each call one turn, and starts with another call.

    All calls must have run before. Calls that would take longer than their budget get fewer turns,
    but at least two.
    """
    samples = {name: [elapsed(call, device)] for name, call in calls.items()}
    count = {name: max(2, min(rounds, int(budget_s / s[0]))) for name, s in samples.items()}
    repeats = {name: max(1, min(200, int(TURN_S / s[0]))) for name, s in samples.items()}
    for name, few in count.items():
        if few == rounds:  # the first one only told how often to repeat
            samples[name].clear()
    names = list(calls)
    for turn in range(rounds if names else 0):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if len(samples[name]) < count[name]:
                samples[name].append(elapsed(calls[name], device, repeats[name]))
    return {name: _timing(taken) for name, taken in samples.items()}


def _timing(samples: Sequence[float]) -> Timing:
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return Timing(median(samples), low, high, len(samples))


def elapsed(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call, averaged over ``repeats`` in a row."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - began) / repeats
    cuda: Any = torch.cuda  # whose classes say no types
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


@dataclass(frozen=True)
class Replay:
    """A captured call. It keeps the call, for nothing else may take the memory that it reads."""

    graph: Any
    captured: Call

    def __call__(self) -> Any:
        self.graph.replay()


def captured(call: Call) -> Call | None:
    """The call as a CUDA graph's replay, so that launches cost nothing; None if it can't be one.

    A capture is not trusted: its replay must give the tensor that the call gives, or tensors, to
    within a hundredth of their norms. The current stream is captured, for a call may be bound to
    it, or a new one where that is the default stream, which can't be.
    """
    cuda: Any = torch.cuda
    outer = torch.cuda.current_stream()
    stream = cuda.Stream() if outer == torch.cuda.default_stream() else outer
    stream.wait_stream(outer)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    # A capture that fails leaves its generator in it, and its stream as the current one.
    with torch.cuda.stream(stream), _other_generator():
        expected = [x.clone() for x in _tensors(call())]
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                result = call()
            graph.replay()
            torch.cuda.synchronize()
            same = all(map(_close, _tensors(result), expected))
        except Exception as error:
            progress(f"not captured: {first_line(error.__context__ or error)}")
            _end_allocations(pool)
            return None
        finally:
            outer.wait_stream(stream)
    if not same:
        progress("not captured: a replay gives something else")
        return None
    return Replay(graph, call)


@contextmanager
def _other_generator() -> Iterator[None]:
    """Draw random numbers from a copy of the CUDA generator's state, which stays as it is."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    own = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(own)


def _end_allocations(pool: Any) -> None:
    """End a failed capture's allocations, if PyTorch has not.

    It raises what CUDA says of an invalid capture before it ends them, and while they go on,
    cached memory can't be given back, as the next capture and a full device must.
    """
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # have ended
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _close(found: Tensor, expected: Tensor) -> bool:
    return relative_error(found, expected.double()) <= 1e-2


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold now, after a garbage collection."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())


def peak(call: Call, device: torch.device) -> int:
    """The most bytes allocated while the call ran."""
    if device.type != "cuda":
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    timing = turns({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * nbytes / timing.seconds


def machine(device: torch.device) -> dict[str, str]:
    """The versions and the device that figures belong to."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["triton"] = import_module("triton").__version__
    else:
        found["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return found


def machine_line(device: torch.device) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine(device).items()) + "\n\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def tokens_name(tokens: int) -> str:
    """1024 is 1k, 1048576 is 1M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def first_line(error: BaseException) -> str:
    """What went wrong, in one line that fits into a table."""
    what = str(error).partition("\n")[0].replace("|", "/")
    return f"{type(error).__name__}: {what}"


def save(folder: Path, name: str, results: object, table: str) -> None:
    """Write both as files, so that what is measured outlives a run that is cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)


def progress(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)
