"""Tokens a second and peak memory of the whole model, on one document from 4k to 16M tokens.

    python -m benchmarks.models --out build/models
    python -m benchmarks.models --checkpoint model/checkpoints/books
    python -m benchmarks.models --only ours --lengths 65536 1048576 16777216

Ours, and the same model without its mixers, stream the document in steps of 64 rows of 1,024
tokens; a shorter document is one smaller step. The same model with causal FlashAttention reads it
in one piece, since every token may look at all before it. Beside them stand the layers' matrix
products alone, for each of ours that takes part. Ours is first held to the float64 model; what
fails is not timed. Prints Markdown; writes models.json, .md and .svg, all from this one run, in
which the contenders take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import figure, timing
from benchmarks.backbones import Backbone, products
from benchmarks.random_models import REALISTIC, random_classifier
from benchmarks.streams import Grid, Stream, errors, our_step, stream_of_backbone, stream_of_steps
from benchmarks.timing import digits, markdown, progress, tokens_name
from gma.model import weights
from gma.model.classifier import Classifier

BF16, FP8 = "GMA, ours, bf16", "GMA, ours, fp8"
ATTENTION, NOTHING = "FlashAttention, bf16", "no mixer, bf16"
CONTENDERS = BF16, FP8, ATTENTION, NOTHING
PRODUCTS = {BF16: "matrix products alone, bf16", FP8: "matrix products alone, fp8"}
LIMITS = {BF16: 0.03, FP8: 0.2}
"""Relative errors of logits and states beyond which a contender is not timed."""


@dataclass(frozen=True)
class Result:
    contender: str
    tokens: int
    seconds: float  # median
    low: float
    high: float
    turns: int
    captured: bool
    peak_bytes: int  # of all that the contender allocates: weights, states, activations


class Run:
    """The comparison of one model on one device."""

    def __init__(self, classifier: Classifier, grid: Grid, cap_s: float, budget_s: float) -> None:
        self.classifier, self.config = classifier, classifier.config
        self.device = classifier.embedding.weight.device
        self.grid, self.cap_s, self.budget_s = grid, cap_s, budget_s
        self.checks: list[dict[str, Any]] = []
        self.results: list[Result] = []
        self.skips: dict[tuple[str, int], str] = {}
        self.products: dict[tuple[str, int], float] = {}  # tokens a second
        self.alone: dict[str, timing.Call] = {}  # what measures those
        self.models: dict[str, Any] = {}
        self.streams: dict[tuple[str, int], Stream] = {}
        self.own_bytes: dict[str, int] = {}  # weights, and what a model keeps for itself

    def make(self, names: Collection[str] = CONTENDERS) -> None:
        """Make the contenders with these names. Ours take part only if they are right."""
        for name in LIMITS:
            if name in names and (name != FP8 or self.device.type == "cuda"):
                before = timing.allocated(self.device)
                self._check(name)
                self.own_bytes[name] = timing.allocated(self.device) - before
        for name in [name for name in names if name not in LIMITS]:
            before = timing.allocated(self.device)
            model: Any = Backbone(self.config, attention=name == ATTENTION)
            model = model.to(self.device, torch.bfloat16).requires_grad_(False).eval()
            compiles = self.device.type == "cuda"
            self.models[name] = torch.compile(model, dynamic=False) if compiles else model
            self.own_bytes[name] = timing.allocated(self.device) - before
        for ours, name in PRODUCTS.items():
            if ours in self.own_bytes:
                fp8 = ours == FP8
                run = products(self.config, self.grid.tokens, self.device, fp8=fp8)
                try:
                    run()
                except RuntimeError as failure:  # no such product on this device
                    progress(f"{name}: {timing.first_line(failure)}")
                else:
                    self.alone[name] = run

    def _check(self, name: str) -> None:
        progress(f"check {name}")
        found: dict[str, Any] = {"contender": name, "limit": LIMITS[name]}
        try:
            take = our_step(self.classifier, "fp8" if name == FP8 else "bfloat16", self.grid)
            found["logits"], found["states"] = errors(take, self.classifier, self.grid.chunk)
            passed = max(found["logits"], found["states"]) <= LIMITS[name]
            found["verdict"] = "passed" if passed else "FAILED, not timed"
            if passed:
                self.models[name] = take
        except Exception as failure:
            found["verdict"] = f"FAILED, not timed: {timing.first_line(failure)}"
        self.checks.append(found)

    def measure(self, tokens: int) -> None:
        """Time all contenders on a document of so many tokens; they take turns."""
        document = torch.randint(self.config.vocab_size, (tokens,), dtype=torch.int32)
        if self.device.type == "cuda":
            document = document.pin_memory()
        calls: dict[str, timing.Call] = {}
        facts = {}
        for name in self.models:
            seconds = self._predicted(name, tokens)
            if seconds > self.cap_s:
                self.skips[name, tokens] = f"{seconds:.0f} s predicted"
                continue
            progress(f"{tokens_name(tokens)} {name}")
            try:
                stream, peak = self._prepare(name, document)
            except torch.OutOfMemoryError:
                self.skips[name, tokens] = "out of memory"
                continue
            calls[name] = partial(stream.read, document)
            facts[name] = stream.replay is not None, peak
        # As many in a row as the models' steps: a device that works for long slows down.
        steps = tokens // self.grid.tokens
        if steps:
            calls |= {name: partial(_repeat, call, steps) for name, call in self.alone.items()}
        for name, timed in timing.turns(calls, self.device, budget_s=self.budget_s).items():
            if name in self.alone:
                self.products[name, tokens] = tokens / timed.seconds
            else:
                self.results.append(Result(name, tokens, *timed, *facts[name]))

    def _predicted(self, name: str, tokens: int) -> float:
        """Seconds, extrapolated from the last length; 0 if there was none."""
        past = [result for result in self.results if result.contender == name]
        power = 2 if name == ATTENTION else 1
        return past[-1].seconds * (tokens / past[-1].tokens) ** power if past else 0.0

    def _prepare(self, name: str, document: Tensor) -> tuple[Stream, int]:
        """The stream that reads the document, and the most bytes that it needs."""
        grid = self.grid.within(len(document))
        step = len(document) if name == ATTENTION else grid.tokens
        stream, model = self.streams.get((name, step)), self.models[name]
        if stream is None:
            if name in LIMITS:
                stream = stream_of_steps(model, self.classifier, grid)
            else:
                stream = stream_of_backbone(model, self.config, step, self.device)
            stream.read(document[:step], eager=True)  # compiles and tunes
            self.streams[name, step] = stream
        before = timing.allocated(self.device)
        peak = timing.peak(partial(stream.read, document, eager=True), self.device) - before
        if stream.replay is None:
            stream.capture(document[:step])
        if self.device.type != "cuda":
            return stream, 0
        return stream, peak + self.own_bytes[name] + stream.nbytes


def _repeat(call: timing.Call, times: int) -> None:
    for _ in range(times):
        call()


def table(run: Run) -> str:
    """Everything that is reported, as Markdown."""
    names = list(dict.fromkeys(result.contender for result in run.results))
    lengths = sorted({result.tokens for result in run.results})
    found = {(result.contender, result.tokens): result for result in run.results}

    def each(title: str, cell: Any) -> str:
        def shown(name: str, n: int) -> str:
            return cell(found[name, n]) if (name, n) in found else run.skips.get((name, n), "")

        rows = [[tokens_name(n), *(shown(name, n) for name in names)] for n in lengths]
        return f"\n{title}\n\n" + markdown(["tokens", *names], rows)

    def figures(check: dict[str, Any]) -> list[str]:
        return [f"{check[key]:.1e}" if key in check else "" for key in ("logits", "states")]

    text = timing.machine_line(run.device) + markdown(
        ["against float64", "error of logits", "of states", "limit", "check"],
        [[c["contender"], *figures(c), f"{c['limit']:g}", c["verdict"]] for c in run.checks],
    )
    text += each("Million tokens a second", lambda r: digits(r.tokens / r.seconds / 1e6))
    if run.device.type == "cuda":
        text += each("Peak memory, GB", lambda r: digits(r.peak_bytes / 1e9))
    else:
        text += "\nOn the CPU, ours is the classifier's own step, in float32.\n"
    text += "\n"
    step, longest = run.grid.tokens, max(lengths, default=0)
    for ours, alone in PRODUCTS.items():
        for (name, tokens), speed in run.products.items():
            if name == alone:
                text += f"- {tokens_name(tokens)}, {alone}: {digits(speed / 1e6)} million a second"
                one = found.get((ours, tokens))
                share = one and one.tokens / one.seconds / speed
                text += f"; {ours} reaches {share:.0%} of that.\n" if share else ".\n"
    for name in names:
        one, last = found.get((name, step)), found.get((name, longest))
        if one and last and longest > step:
            speed = one.seconds / one.tokens / (last.seconds / last.tokens)
            text += f"- {name}, {tokens_name(longest)} / {tokens_name(step)}: speed {speed:.3f}"
            memory = (
                f", memory {last.peak_bytes / one.peak_bytes:.3f}"
                if run.device.type == "cuda"
                else ""
            )
            text += f"{memory}.\n"
    return text


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """Draw the results, as they are or as a models.json has them."""
    colours = {BF16: figure.BLUE, FP8: figure.SKY, ATTENTION: figure.RED}

    def lines(value: Any) -> list[figure.Line]:
        return [
            figure.Line(
                name,
                [(r.tokens, value(r)) for r in results if r.contender == name],
                colours.get(name),
            )
            for name in dict.fromkeys(result.contender for result in results)
        ]

    speed = lines(lambda r: r.tokens / r.seconds / 1e6)
    panels = [figure.Panel("Million tokens a second", speed)]
    if any(result.peak_bytes for result in results):
        panels.append(figure.Panel("Peak memory, GB", lines(lambda r: r.peak_bytes / 1e9)))
    figure.draw(path, title, panels)


SIZE = {"layers": 12, "width": 768, "heads": 12, "routing_dim": 32, "num_components": 32}
SIZE |= {"value_dim": 64, "mlp_width": 3072}
TINY = {"layers": 2, "width": 32, "heads": 2, "routing_dim": 16, "num_components": 16}
TINY |= {"value_dim": 16, "mlp_width": 64}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/models"))
    parser.add_argument("--checkpoint", type=Path, help="a model's folder; by default random ones")
    for field, value in SIZE.items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--form", choices=("paper", "forgetting"), default="paper")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4**n for n in range(6, 13)])
    parser.add_argument("--only", nargs="+", help="contenders, by words in their names")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cap", type=float, default=20.0, help="longest predicted read, seconds")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs, no more")
    arguments = parser.parse_args(argv)
    words = arguments.only or [""]
    names = [name for name in CONTENDERS if any(word in name for word in words)]
    if not names:
        parser.error(f"--only: no contender is one of {', '.join(CONTENDERS)}")
    if arguments.quick:
        vars(arguments).update(TINY, lengths=[128, 256, 1024])
    grid = Grid(4, 64) if arguments.quick else Grid()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    classifier = (
        weights.load(arguments.checkpoint).classifier
        if arguments.checkpoint
        else random_classifier(
            REALISTIC.model_copy(
                update={field: getattr(arguments, field) for field in (*SIZE, "form")}
            )
        )
    )
    classifier = classifier.to(arguments.device)
    budget = 0.05 if arguments.quick else 2.0
    run = Run(classifier, grid, arguments.cap, budget)
    title = f"Whole model: {run.config.layers} layers of {run.config.width}, one document"
    flash = run.device.type == "cuda"
    with (
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext(),
    ):
        run.make(names)
        for tokens in sorted(arguments.lengths):
            run.measure(tokens)
            results = {
                "machine": timing.machine(run.device),
                "model": run.config.model_dump(exclude={"labels"}),
                "parameters": sum(x.numel() for x in classifier.parameters()),
                "checks": run.checks,
                "products_tokens_per_s": [
                    {"products": name, "tokens": tokens, "tokens_per_s": speed}
                    for (name, tokens), speed in run.products.items()
                ],
                "results": [asdict(result) for result in run.results],
            }
            timing.save(arguments.out, "models", results, table(run))
            plot(run.results, title, arguments.out / "models.svg")
    print(table(run))


if __name__ == "__main__":
    main()
