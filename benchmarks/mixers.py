"""Tokens a second and memory of sequence mixers alone, on one document, at growing lengths.

    pip install '.[benchmarks]' fla-core mamba-ssm
    python -m benchmarks.mixers --out build/mixers
    python -m benchmarks.mixers --backward --lengths 16384
    python -m benchmarks.mixers --backward --lengths 16384 --eager

Each contender is checked first, against its definition in float64 and for causality; one that fails
is not timed. Prints Markdown; writes mixers.json, .md and .svg. Every row of the tables is from
this one run, in which the contenders take turns. Up to 16k tokens calls are replays of CUDA graphs,
with --backward too; with --eager the host launches them all, as training without graphs does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import figure, timing
from benchmarks.contenders import CONTENDERS, OURS, SOFTMAX, SSD, Contender
from benchmarks.definitions import relative_error
from benchmarks.mixtures import Problem, Size
from benchmarks.timing import digits, markdown, progress, tokens_name

LENGTHS = tuple(4**power for power in range(5, 11))
CHECKED = 4096
GRAPHS_UP_TO = 1 << 14
"""Tokens up to which calls are captured in CUDA graphs, for launches would decide there."""


@dataclass(frozen=True)
class Result:
    contender: str
    tokens: int
    seconds: float  # median
    low: float
    high: float
    turns: int
    captured: bool
    extra_bytes: int  # allocated at most during the call beyond its inputs; its outputs included
    output_bytes: int
    least_bytes: int  # inputs read once, the main output written once
    least_seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def leak(problem: Problem) -> float:
    """How much the outputs of a first part change, at most, with the inputs that follow it."""
    tokens = problem.inputs[0].shape[1]
    part = tokens // 2 - 5  # on no block's edge

    def first_part() -> Tensor:
        return problem()[0].reshape(tokens, -1)[:part].float()

    before = first_part()
    for x in problem.inputs:
        x[:, part:] = x[:, part:].flip(1)
    return float((first_part() - before).abs().max() / before.abs().max())


def checked(
    contender: Contender, tokens: int, size: Size, device: torch.device
) -> tuple[bool, str]:
    """Whether it may be timed, and what was found."""
    try:
        problem = contender.build(tokens, size, device)
        pairs = list(zip(problem(), problem.expected(), strict=True))
        if not all(bool(found.isfinite().all()) for found, _ in pairs):
            return False, "not finite"
        errors = [relative_error(found, expected) for found, expected in pairs]
        found = "error " + ", ".join(f"{error:.1e}" for error in errors)
        passed = max(errors) <= contender.tolerance
        if contender.causal:
            leaked = leak(problem)
            passed = passed and leaked <= 1e-6
            found += f"; leak {leaked:.0e}"
    except Exception as error:
        return False, f"failed: {timing.first_line(error)}"
    return passed, found


class Run:
    """The comparison on one device."""

    def __init__(
        self,
        device: torch.device,
        size: Size,
        cap_s: float,
        budget_s: float,
        *,
        backward: bool = False,
        eager: bool = False,
    ) -> None:
        self.device, self.size, self.cap_s, self.budget_s = device, size, cap_s, budget_s
        self.backward, self.eager = backward, eager
        self.checks: list[dict[str, Any]] = []
        self.results: list[Result] = []
        self.skips: list[tuple[str, int, str]] = []
        large = 1 << (31 if device.type == "cuda" else 24)
        self.bandwidth = timing.copy_bandwidth(device, large)

    def check(self, contenders: Sequence[Contender], tokens: int) -> list[Contender]:
        """Hold each to its definition; return the contenders that passed."""
        passing = []
        for contender in contenders:
            why = contender.missing(self.device)
            progress(f"check {contender.name}{why and ': ' + why}")
            passed, found = (
                (False, why) if why else checked(contender, tokens, self.size, self.device)
            )
            timing.allocated(self.device)
            verdict = "-" if why else "passed" if passed else "FAILED, not timed"
            self.checks.append(
                {"contender": contender.name, "source": contender.source(), "check": verdict,
                 "found": found, "tolerance": contender.tolerance}
            )  # fmt: skip
            if passed:
                passing.append(contender)
        return passing

    def measure(self, contenders: Sequence[Contender], tokens: int) -> None:
        """Time all contenders at one length; they take turns."""
        ready = {}
        for contender in contenders:
            try:
                why = self._too_long(contender, tokens)
                if not why:
                    ready[contender.name] = self._prepare(contender, tokens)
            except torch.OutOfMemoryError:
                why = "out of memory"
            except Exception as error:
                why = f"failed: {timing.first_line(error)}"
            if why:
                progress(f"{tokens_name(tokens)} {contender.name}: {why}")
                self.skips.append((contender.name, tokens, why))
        calls = {name: call for name, (call, *_) in ready.items()}
        for name, timed in timing.turns(calls, self.device, budget_s=self.budget_s).items():
            _, graph, extra, output, least = ready[name]
            self.results.append(
                Result(name, tokens, *timed, graph, extra, output, least, least / self.bandwidth)
            )

    def _too_long(self, contender: Contender, tokens: int) -> str:
        if tokens > contender.longest:
            return f"not tried beyond {tokens_name(contender.longest)}"
        past = [result for result in self.results if result.contender == contender.name]
        if not past:
            return ""
        predicted = past[-1].seconds * (tokens / past[-1].tokens) ** contender.power
        return f"{predicted:.0f} s predicted" if predicted > self.cap_s else ""

    def _prepare(
        self, contender: Contender, tokens: int
    ) -> tuple[timing.Call, bool, int, int, int]:
        """The call to time, whether it is a graph's replay, and its bytes: extra, output, least."""
        progress(f"{tokens_name(tokens)} {contender.name}")
        problem = contender.build(tokens, self.size, self.device)
        if self.backward:
            problem = problem.with_gradients()
        outputs = problem()  # compiles and tunes
        output = sum(x.nbytes for x in outputs)
        least = sum(x.nbytes for x in problem.inputs) + outputs[0].nbytes
        del outputs
        before = timing.allocated(self.device)
        extra = timing.peak(problem, self.device) - before
        graph = None
        if self.device.type == "cuda" and tokens <= GRAPHS_UP_TO and not self.eager:
            graph = timing.captured(problem)
        return graph or problem, graph is not None, max(extra, 0), output, least


def table(run: Run) -> str:
    """Everything that is reported, as Markdown."""
    lengths = sorted({result.tokens for result in run.results})
    names = list(dict.fromkeys(result.contender for result in run.results))
    found = {(result.contender, result.tokens): result for result in run.results}
    why = {(name, tokens): reason for name, tokens, reason in run.skips}

    def each(title: str, cell: Any) -> str:
        rows = [
            [name]
            + [
                cell(found[name, n]) if (name, n) in found else why.get((name, n), "")
                for n in lengths
            ]
            for name in names
        ]
        return f"\n{title}\n\n" + markdown(["", *map(tokens_name, lengths)], rows)

    text = timing.machine_line(run.device) + markdown(
        ["contender", "check", "found", "what"],
        [[c["contender"], c["check"], c["found"], c["source"]] for c in run.checks],
    )
    if run.backward:
        text += "\nForward, and the gradients of all inputs.\n"
    text += each("Median milliseconds", lambda r: digits(r.seconds * 1e3))
    text += each("Million tokens a second", lambda r: digits(r.tokens_per_s / 1e6))
    if run.device.type == "cuda":
        text += each("Extra memory with the outputs, MB", lambda r: digits(r.extra_bytes / 1e6))
    share = "Share of the speed that reading the inputs and writing the output once would allow, "
    share += f"at this run's copy bandwidth of {run.bandwidth / 1e12:.2f} TB/s"
    text += each(share, lambda r: f"{r.least_seconds / r.seconds:.0%}")
    if run.device.type == "cuda":
        text += f"\n{replays(run)}\n"
    return text


def replays(run: Run) -> str:
    """Which times are of CUDA graphs' replays."""
    if not any(result.captured for result in run.results):
        return "No time is of a CUDA graph's replay: the host launches every call."
    text = f"Up to {tokens_name(GRAPHS_UP_TO)} tokens, times are of CUDA graphs' replays"
    launched = [
        f"{result.contender} at {tokens_name(result.tokens)}"
        for result in run.results
        if result.tokens <= GRAPHS_UP_TO and not result.captured
    ]
    return f"{text}, but for: {', '.join(launched)}." if launched else f"{text}."


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw the results, as they are or as a mixers.json has them."""
    colours = {OURS: figure.BLUE, SOFTMAX: figure.RED, SSD: figure.GREEN}

    def lines(value: Any) -> list[figure.Line]:
        names = dict.fromkeys(result.contender for result in results)
        return [
            figure.Line(
                name,
                [(r.tokens, value(r)) for r in results if r.contender == name],
                colours.get(name),
            )
            for name in names
        ]

    panels = [figure.Panel("Million tokens a second", lines(lambda r: r.tokens_per_s / 1e6))]
    if any(result.extra_bytes for result in results):
        memory = lines(lambda r: r.extra_bytes / 1e9)
        panels.append(figure.Panel("Extra memory, GB", memory))
    figure.draw(path, "One layer's mixer, one document", panels)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/mixers"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--only", nargs="+", help="contenders, by words in their names")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cap", type=float, default=10.0, help="longest predicted call, seconds")
    parser.add_argument("--backward", action="store_true", help="forward, and the gradients")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs, no more")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    size = Size(heads=2, routing=16, components=16, value=16) if arguments.quick else Size()
    lengths = (128, 256) if arguments.quick else sorted(arguments.lengths)
    contenders = [
        contender
        for contender in CONTENDERS
        if not arguments.only or any(word in contender.name for word in arguments.only)
    ]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad():
        run = Run(
            device, size, arguments.cap, 0.05 if arguments.quick else 2.0,
            backward=arguments.backward, eager=arguments.eager,
        )  # fmt: skip
        passing = run.check(contenders, lengths[-1] if arguments.quick else CHECKED)
        for tokens in lengths:
            run.measure(passing, tokens)
            results = {
                "machine": timing.machine(device),
                "size": size._asdict(),
                "copy_bytes_per_s": run.bandwidth,
                "checks": run.checks,
                "results": [asdict(result) for result in run.results],
                "skipped": run.skips,
            }
            timing.save(arguments.out, "mixers", results, table(run))
            plot(run.results, arguments.out / "mixers.svg")
    print(table(run))


if __name__ == "__main__":
    main()
