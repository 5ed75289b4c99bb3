"""The Triton kernels that the library carries, compiled ahead of time, where no GPU is needed.

    python -m gma.export.ops.cuda.cubins FOLDER --shapes 32x32x64 --widths 256 --architectures 90

FOLDER gets `cubins.bin`, the kernels one after the other, `cubins.inc`, their table as C++, and
`cuts.h`, the numbers that launches are cut by. Heads, segments and strides are arguments of the
launch, so one kernel serves every model with the same routing_dim, num_components and value_dim.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gma.export.ops.cuda import kernels as own
from gma.model.fused import tokens
from gma.model.fused.tokens import STRIP
from gma.model.ops.triton import forward, scans
from gma.model.ops.triton.launch import DEPTH, DOCUMENTS, ENOUGH, TILE, Cut, Shape
from gma.model.ops.triton.limits import MIXTURE, SIZES

TYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""Triton's names of what activations may be, by ONNX's."""

ROWS = 128
"""Rows of a step that a program looks at together."""

ELEMENTS = 1024
"""Entries of a tensor that a program of `kernels.finish` takes."""

TAPS = 256
"""Entries of a tap that a program of `kernels.scale_taps` takes."""

LETTERS = {"u64": "p", "u32": "i", "f32": "f"}
"""How the launcher in C++ writes a parameter's type: pointer, int32, float. P is a pointer to a
multiple of 16 bytes."""

ACTIVATIONS = {
    "q", "k", "val", "gammas", "open_gate", "projected", "out", "x", "y", "normal", "taps",
    "scaled", "residual",
}  # fmt: skip
INTEGERS = {
    "lengths": "*i32", "document": "*i64", "first_row": "*i32", "row_count": "*i32",
    "slots": "*i32", "fresh": "*i8", "known_lengths": "*i32", "document_of_row": "*i64",
}  # fmt: skip
REALS = {"epsilon", "EPSILON", "most"}
STRIDES = {f"{tensor}_{axis}" for tensor in "qkvo" for axis in ("row", "token", "head")}


class Kernel(NamedTuple):
    """A kernel, and what it is compiled for."""

    key: str
    function: Any
    constants: dict[str, Any]
    types: dict[str, str] = {}  # noqa: RUF012 (never changed)
    multiples: frozenset[str] = frozenset()  # of 16, beside those that always are
    options: dict[str, int] = {}  # noqa: RUF012


class Binary(NamedTuple):
    """A compiled kernel, and what its launch has to know."""

    key: str
    architecture: int
    entry: str
    parameters: str  # letters of LETTERS or P, in order
    threads: int
    shared: int  # bytes
    cubin: bytes


LASTING: dict[str, Any] = {"FORGET": False, "left": None}
SUM = {**LASTING, "KEEP": True, "grown": None, "decays": None}
UNSCALED = {"scale": 1.0}
READ = {**LASTING, **UNSCALED, "grown": None, "open_gate": None, "OPEN": False}
READ |= dict.fromkeys(("o_row", "o_token", "o_head"), 0)
"""Constants of kernels that forget nothing."""

FORGETTING = {"FORGET": True}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "": (SUM, READ),
    " forgetting": ({**FORGETTING, "KEEP": True}, {**FORGETTING, **UNSCALED, "OPEN": True}),
}
"""What the kernels of a form sum and read with, by what is added to their names."""

SHORT = 32
"""Tokens of a block in float16, where heads forget: what is written in a longer one's units, up to
exp(block / 4), is more than a float16 holds."""

HEADS = 16, 64
"""Powers of two that `forget` is compiled for: it takes as many heads at most."""


def mixers(shape: tuple[int, int, int], type_: str) -> Iterator[Kernel]:
    """Name the kernels of the mixers with this routing_dim, num_components and value_dim."""
    routing, components, value = shape
    cut = Cut.of(Shape(1, 1, 1, *shape))
    if type_ == "float":
        cut = cut._replace(stages=1)
    capped = type_ == "bfloat16"
    sizes = {"K": components, "V": value}
    named = f"{type_} {routing}x{components}x{value}"
    for normalize in (True, False):
        constants = {
            **sizes, "R": routing, "BLOCK": cut.block, "STAGES": cut.stages,
            "NORMALIZE": normalize,
        }  # fmt: skip
        known = "normalized" if normalize else "plain"
        for form, (sums, reads) in FORMS.items():
            for name, function, more, registers in (
                ("sum", forward.sum_segments, sums, cut.sum_registers),
                ("read", forward.read_segments, reads, 0 if form else cut.read_registers),
            ):
                options = {"num_warps": cut.warps}
                if registers and capped:
                    options["maxnreg"] = registers
                block = {"BLOCK": block_of(type_, form)}
                key = f"{name} {named} {known}{form}"
                yield Kernel(key, function, {**constants, **more, **block}, options=options)
        count = {"R": routing, "K": components, "BLOCK": cut.block, "NORMALIZE": normalize}
        yield Kernel(f"count {named} {known}", own.count, count, options={"num_warps": cut.warps})


def block_of(type_: str, form: str) -> int:
    """Tell how many tokens a block of kernels of this form has."""
    return SHORT if form and type_ == "float16" else Cut(64).block


def prefix(components: int, value: int) -> Iterator[Kernel]:
    """Name the kernels that find the states before each segment."""
    cut = {"K": components, "V": value, "TILE": TILE, "DEPTH": DEPTH, "FRESH": True, "SLOTS": False}
    key = f"prefix {components}x{value}"
    yield Kernel(key, scans.prefix, {**cut, "FORGET": False, "decays": None})
    yield Kernel(f"{key} forgetting", scans.prefix, {**cut, "FORGET": True})


def rows(width: int, type_: str) -> Iterator[Kernel]:
    """Name the kernels over rows of `width` entries, or of up to so many if a power of two."""
    padded = triton.next_power_of_2(width)
    known = 0 if padded == width else width
    warps = {"num_warps": tokens.warps(padded, 4 if type_ == "float" else 2)}
    registers = {"maxnreg": tokens.REGISTERS} if known and type_ != "float" else {}
    for aligned in (True,) if known else (True, False):
        named = f"{type_} {width} {'exact' if known else 'aligned' if aligned else 'any'}"
        multiples = frozenset({"width", "tail_slot"} if aligned else ())
        cut = {"KNOWN": known, "WIDTH": padded, "STRIP": STRIP, "NORMAL": True}
        yield Kernel(
            f"convolve {named}", tokens.convolve, cut, {"tail_taps": "*fp32"}, multiples,
            warps | registers,
        )  # fmt: skip
        yield Kernel(f"normalize {named}", tokens.normalize, cut, {}, multiples, warps)
        yield Kernel(
            f"remember {named}", tokens.remember, {"WIDTH": padded, "SLOTS": False}, {}, multiples,
            warps,
        )  # fmt: skip


def wanted(shapes: list[tuple[int, int, int]], widths: list[int]) -> Iterator[Kernel]:
    """Name all kernels for models of these shapes and widths."""
    yield Kernel(
        "place", own.place, {"ROWS": ROWS}, {"lengths": "*i64", "R": "i32", "D": "i32"}
    )  # fmt: skip
    for type_ in TYPES:
        yield Kernel(f"scale_taps {type_}", own.scale_taps, {"WIDTH": TAPS}, {"taps": "*fp32"})
        for gelu, add in ((True, False), (False, True), (True, True)):
            yield Kernel(
                f"finish {type_}{' gelu' * gelu}{' add' * add}", own.finish,
                {"BLOCK": ELEMENTS, "GELU": gelu, "ADD": add}, {"count": "i32"},
            )  # fmt: skip
        for heads in HEADS:
            cut = {"HEADS": heads, "BLOCK": block_of(type_, " forgetting")}
            yield Kernel(f"forget {type_} {heads}", tokens.forget, cut)
        for shape in shapes:
            if type_ != "float" or shape[0] * shape[1] <= MIXTURE:
                yield from mixers(shape, type_)
        for width in widths:
            yield from rows(width, type_)
    for components, value in sorted({shape[1:] for shape in shapes}):
        yield from prefix(components, value)
    for components in sorted({shape[1] for shape in shapes}):
        yield Kernel(f"add_counts {components}", own.add_counts, {"K": components})


def type_of(name: str, kernel: Kernel, activation: str) -> str:
    """Tell the type of the parameter with this name, in Triton's words."""
    if name in kernel.constants:
        return "constexpr"
    if name in kernel.types:
        return kernel.types[name]
    if name in ACTIVATIONS:
        return f"*{activation}"
    if name in INTEGERS:
        return INTEGERS[name]
    if name in REALS:
        return "fp32"
    scalar = name in STRIDES or name in SCALARS or re.match("(memory|mass|after)_.*", name)
    return "i32" if scalar and name not in {"memory_after", "mass_after"} else "*fp32"


SCALARS = {
    "C", "H", "T", "SEGMENT", "segments", "rows", "documents", "width", "count", "tail_slot", "AT",
    "LASTING",
}  # fmt: skip
UNALIGNED = {"tail_taps", "fresh"}
"""Pointers that may be any; the others are to multiples of 16 bytes."""


def compiled(kernel: Kernel, architecture: int) -> Binary:
    """Compile a kernel for GPUs of this compute capability, times ten."""
    names = kernel.function.arg_names
    activation = next((TYPES[word] for word in kernel.key.split() if word in TYPES), "fp32")
    signature = {name: type_of(name, kernel, activation) for name in names}
    multiples = kernel.multiples | STRIDES | {"SEGMENT"}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, type_) in enumerate(signature.items())
        if (type_.startswith("*") and name not in UNALIGNED)
        or (name in multiples and type_ == "i32")
    }
    source = ASTSource(kernel.function, signature, constexprs=kernel.constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    built = triton.compile(source, target=target, options=kernel.options)
    metadata = built.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(f"{kernel.key}: the launcher gives kernels no scratch memory")
    return Binary(
        kernel.key, architecture, metadata.name, parameters(built.asm["ptx"], given(signature)),
        metadata.num_warps * 32, metadata.shared, built.asm["cubin"],
    )  # fmt: skip


def given(signature: dict[str, str]) -> str:
    """Write what the launcher gives a kernel of this signature, in letters."""
    letters = {"*": "P", "i": "i", "f": "f"}
    return "".join(
        "p" if name in UNALIGNED else letters[type_[0]]
        for name, type_ in signature.items()
        if type_ != "constexpr"
    )


def parameters(ptx: str, given: str) -> str:
    """Check that what the launcher gives a kernel is what its assembly takes, and return it.

    Triton adds two pointers to scratch memory at the end. Raises ValueError for anything else.
    """
    head = ptx[ptx.index(".entry") :].split(")", 1)[0]
    found = "".join(LETTERS.get(type_, "?") for type_ in re.findall(r"\.param \.(\w+)", head))
    if found != given.lower() + "pp":
        raise ValueError(f"Triton's parameters are {found}, not {given} and two pointers")
    return given


def table(binaries: list[Binary]) -> str:
    """Write the table of the binaries in `cubins.bin`, in C++."""
    lines = []
    begin = 0
    for key, architecture, entry, letters, threads, shared, cubin in binaries:
        lines.append(
            f'    {{"{key}", {architecture}, "{entry}", "{letters}", {threads}, {shared}, '
            f"gma_cubins + {begin}, {len(cubin)}}},\n"
        )
        begin += padded(cubin)
    return "".join(["const Kernel kernels[] = {\n", *lines, "};\n"])


def cuts(widths: list[int]) -> str:
    """Write the numbers that launches are cut by, in C++."""
    numbers = {
        "enough": ENOUGH, "tile": TILE, "documents_at_once": DOCUMENTS, "strip": STRIP,
        "rows_at_once": ROWS, "few_heads": HEADS[0], "most_heads": HEADS[1], "elements": ELEMENTS,
        "block": Cut(64).block, "short_block": SHORT, "taps_width": TAPS,
    }  # fmt: skip
    lines = [f"constexpr int {name} = {number};\n" for name, number in numbers.items()]
    powers = [width for width in widths if triton.next_power_of_2(width) == width]
    for name, some in (("exact", sorted({*widths} - {*powers})), ("widths", powers)):
        lines.append(f"constexpr int {name}[] = {{{', '.join(map(str, some)) or 0}}};\n")
    return "".join(["#pragma once\n\nnamespace gma::cuda {\n\n", *lines, "\n}\n"])


def padded(cubin: bytes) -> int:
    """Count the bytes that it takes in `cubins.bin`, where each begins at a multiple of 16."""
    return -(-len(cubin) // 16) * 16


def shape(text: str) -> tuple[int, int, int]:
    """Read routing_dim, num_components and value_dim, as in 32x32x64."""
    routing, components, value = sizes = tuple(map(int, text.split("x")))
    if not SIZES.issuperset(sizes):
        raise argparse.ArgumentTypeError(f"{text}: must be of {sorted(SIZES)}")
    return routing, components, value


def wide(text: str) -> int:
    """Read a width."""
    width = int(text)
    if width < 32 or width % 16:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of 16 from 32")
    return width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", type=shape, nargs="+", required=True)
    parser.add_argument("--widths", type=wide, nargs="+", required=True)
    parser.add_argument("--architectures", type=int, nargs="+", required=True)
    args = parser.parse_args()
    binaries = [
        compiled(kernel, architecture)
        for architecture in sorted(set(args.architectures))
        for kernel in wanted(sorted(set(args.shapes)), sorted(set(args.widths)))
    ]
    args.folder.mkdir(parents=True, exist_ok=True)
    blob = b"".join(binary.cubin.ljust(padded(binary.cubin), b"\0") for binary in binaries)
    (args.folder / "cubins.bin").write_bytes(blob)
    (args.folder / "cubins.inc").write_text(table(binaries))
    (args.folder / "cuts.h").write_text(cuts(sorted(set(args.widths))))


if __name__ == "__main__":
    main()
