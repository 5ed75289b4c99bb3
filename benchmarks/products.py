"""A layer's float32 products on a CPU: ours beside PyTorch's, which do not give a row the same bits
among others.

    python -m benchmarks.products
    GMA_OPS_INSTRUCTIONS=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 python -m benchmarks.products

The products of `contracts`, of steps of 20, 256 and 2,048 tokens, with what ends them: GELU, or
that they are added to what was there. Both take turns. Prints Markdown.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks import timing
from gma.model.ops.cpu.library import Library, library

TOKENS = 20, 256, 2048
PRODUCTS = {
    "project": (256, 592, False, False),
    "out": (192, 256, False, True),
    "up": (256, 768, True, False),
    "down": (768, 256, False, True),
}
"""Inputs, outputs, whether GELU follows, and whether it is added."""


def calls(
    ours: Library, tokens: int, inputs: int, outputs: int, gelu: bool, add: bool
) -> dict[str, timing.Call]:
    """The product by each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator)
    weight = torch.randn(inputs, outputs, generator=generator)
    # Zeros stay so when they are added: a sum that grows would become infinite.
    x = x * (not add)
    y, packed = torch.zeros(tokens, outputs), ours.packed(weight)

    def theirs() -> None:
        if add:
            y.addmm_(x, weight)
        else:
            torch.mm(x, weight, out=y)
        if gelu:
            ours.gelu_(y)

    mine = partial(ours.multiply, x, packed, y, gelu=gelu, add=add)
    theirs(), mine()
    return {"PyTorch": theirs, "ours": mine}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    threads: int = parser.parse_args(given).threads
    torch.set_num_threads(threads)
    ours = library()
    if isinstance(ours, str):
        raise SystemExit(ours)
    device = torch.device("cpu")
    print(timing.machine_line(device), end="")
    print(f"\n{threads} threads, {ours.instructions}\n")
    rows: list[list[str]] = []
    for tokens in TOKENS:
        for name, (inputs, outputs, gelu, add) in PRODUCTS.items():
            both = timing.turns(calls(ours, tokens, inputs, outputs, gelu, add), device)
            theirs, mine = both["PyTorch"].seconds, both["ours"].seconds
            speed = 2e-9 * tokens * inputs * outputs / mine
            figures = f"{theirs * 1e6:.0f}", f"{mine * 1e6:.0f}", f"{theirs / mine:.2f}"
            rows.append([str(tokens), name, *figures, f"{speed:.0f}"])
    header = ["tokens", "product", "PyTorch, us", "ours, us", "ratio", "GFLOPS"]
    print(timing.markdown(header, rows))


if __name__ == "__main__":
    main()
