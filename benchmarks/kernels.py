"""What each kernel of a fused step takes, and what counting components adds to the step.

    python -m benchmarks.kernels

Both forms, each precision, 12 layers of 768 with random weights, a full step of 64 x 1,024 tokens
of one document. Kernels' times are those of torch's profiler; the steps, launched by the host, take
turns. Prints Markdown. Needs a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from benchmarks.models import SIZE
from benchmarks.random_models import REALISTIC, random_classifier
from gma.model.config import ModelConfig
from gma.model.fused.buffers import Inputs, Outputs
from gma.model.fused.step import FusedStep
from gma.model.state import State

ROWS, CHUNK = 64, 1024
STEPS = 3
"""How many are profiled, to tell their mean."""


def step_of(config: ModelConfig, precision: str, device: torch.device) -> Callable[[bool], None]:
    """A full step of one document, which counts or not."""
    classifier = random_classifier(config).to(device)
    step = FusedStep(classifier, rows=ROWS, chunk=CHUNK, precision=precision)  # type: ignore[arg-type]
    inputs = Inputs.empty((ROWS, CHUNK), device)
    inputs.tokens.random_(0, config.vocab_size)
    inputs.lengths.fill_(CHUNK)
    inputs.row_count[0] = ROWS
    inputs.slots.copy_(torch.arange(ROWS))
    outputs = Outputs.empty(ROWS, len(config.labels), device)
    states = State.zeros(config, ROWS, device=device)
    usage = torch.empty(ROWS, config.layers, config.heads, config.num_components, device=device)
    return lambda count: step(inputs, states, outputs, usage if count else None)


def kernels(step: Callable[[bool], None]) -> list[tuple[float, int, str]]:
    """Milliseconds, launches and name of each kernel of a step, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            step(False)
        torch.cuda.synchronize()
    found = [
        (event.self_device_time_total / 1e3 / STEPS, event.count // STEPS, event.key)
        for event in profiled.key_averages()
    ]
    return sorted(found, reverse=True)


def main(given: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args(given)
    device = torch.device("cuda")
    steps: dict[str, timing.Call] = {}
    print(timing.machine_line(device), end="")
    for form in ("paper", "forgetting"):
        config = ModelConfig.model_validate({**REALISTIC.model_dump(), **SIZE, "form": form})
        for precision in ("float32", "bfloat16", "fp8"):
            step = step_of(config, precision, device)
            for count in (False, True):
                step(count)  # compiles
                name = f"{form}, {precision}{', counting' * count}"
                steps[name] = partial(step, count)
            rows = kernels(step)
            print(f"\n{form}, {precision}: {sum(row[0] for row in rows):.2f} ms in all\n")
            cells = [[f"{name[:60]}", str(n), f"{ms:.3f}"] for ms, n, name in rows if ms >= 0.01]
            print(timing.markdown(["kernel", "launches", "ms"], cells))
    with torch.no_grad():
        timed = timing.turns(steps, device, budget_s=1.0)
    cells = [[name, f"{each.seconds * 1e3:.2f}"] for name, each in timed.items()]
    print(timing.markdown(["a step", "ms"], cells))


if __name__ == "__main__":
    main()
