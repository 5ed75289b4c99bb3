"""The kernels that the library carries for CUDA, launched as it does, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("onnxruntime")

from gma.export.ops.cuda import kernels as own
from gma.model.fused import tokens
from gma.model.ops.triton import forward, scans
from tests.export import operating
from tests.export.operating import Rows, hostile
from tests.interpreting import DEVICE, KERNELS
from tests.matrix import matrix
from tests.model.small import error

pytestmark = KERNELS

H, K, r, v = SIZE = 2, 16, 16, 32
SEGMENT, BLOCK = 64, 32
TYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def placed(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lengths, first_row, row_count and document_of_row, as the library finds them."""
    lengths, document = (torch.tensor(x, device=DEVICE) for x in (rows.lengths, rows.documents))
    known = torch.full((len(lengths),), -9, dtype=torch.int32, device=DEVICE)
    first, count = torch.full((2, rows.count), -9, dtype=torch.int32, device=DEVICE)
    own.place[(rows.count,)](
        lengths, document, known, first, count, len(lengths), rows.count, rows.chunk, ROWS=8
    )
    return known, first, count, document


def test_rows_are_placed() -> None:
    known, first, count, _ = placed(hostile(5))
    assert known.tolist() == [5, 5, 4, 5, 1, 5, 1, 0]
    assert first.tolist() == [3, 0, 4, 0, 0, 0, 5]
    assert count.tolist() == [1, 0, 1, 0, 3, 0, 2]


def test_rows_that_are_not_of_the_step_are_not_used() -> None:
    rows = hostile(5)
    rows.lengths = [2**40, -5, 6, 3, 2, -(2**63), 2**63 - 1, 0]
    rows.documents = [4, 4, -1, 2**40, 2, 7, -(2**63), 2**62]
    known, first, count, _ = placed(rows)
    assert known.tolist() == [5, 0, 0, 0, 2, 0, 0, 0]
    assert first[[4, 2]].tolist() == [0, 4]
    assert count.tolist() == [0, 0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("name", "chunk", "dtype"),
    matrix(
        operating.MIXERS,
        (1, 65, 110),  # no whole block; a segment and one token; one whose end is half a block
        list(TYPES),
        always=[
            ("CausalGMA", 1, torch.float16),
            ("CausalGMA", 110, torch.float32),
            ("CausalGMA", 65, torch.bfloat16),
            ("ForgettingGMA", 1, torch.float16),
        ],
    ),
)
def test_mixture(name: str, chunk: int, dtype: torch.dtype) -> None:
    rows = hostile(chunk)
    inputs = operating.inputs_of(name, rows, SIZE)
    given = {n: torch.tensor(x, dtype=torch.float32, device=DEVICE) for n, x in inputs.items()}
    routed = given["routed"].to(dtype)
    inputs["routed"] = routed.double().cpu().numpy()
    expected = operating.reference_of(name, inputs, rows)
    fresh = torch.tensor(rows.fresh, device=DEVICE)
    given["memory"][fresh], given["mass"][fresh] = torch.nan, torch.nan
    routed[~torch.tensor(rows.there(), device=DEVICE)] = torch.nan
    lengths, first, count, _ = placed(rows)
    R, C, segments = len(lengths), chunk, -(-chunk // SEGMENT)
    sums, masses, gammas, out = (
        torch.full(shape, torch.nan, dtype=type_, device=DEVICE)
        for shape, type_ in (
            ((R * segments, H, v + 1, K), torch.float32),
            ((R * segments, H, SEGMENT // BLOCK, K), torch.float32),
            ((R, H, C, K), dtype),
            ((R, C, H * v), dtype),
        )
    )
    width, read = H * (2 * r + v), H * v
    q, k, val = (
        x.view(R, C, H, -1) for x in torch.split(routed[..., :width], [H * r, H * r, H * v], -1)
    )
    mixture = given["linear"], given["quadratic"], given["bias"]
    cut = {
        "R": r, "SEGMENT": SEGMENT, "BLOCK": BLOCK, "STAGES": 1, "NORMALIZE": True,
        "EPSILON": 1e-6, "H": H, "K": K, "V": v,
    }  # fmt: skip
    forgets = name == "ForgettingGMA"
    grown = left = decays = opened = usage = None
    if forgets:
        blocks = -(-C // BLOCK)
        grown, left, decays, counts, usage = (
            torch.full(shape, torch.nan, device=DEVICE)
            for shape in (
                (R, H, C), (R, H, blocks), (R * segments, H), (R * segments, H, K), (R, H, K)
            )
        )  # fmt: skip
        tokens.forget[(R * blocks,)](
            routed, given["keep_bias"], lengths, grown, left, C, routed.shape[2], 0.25,
            AT=width + read, H=H, LASTING=1, HEADS=16, BLOCK=BLOCK,
        )  # fmt: skip
        sizes = {n: x for n, x in cut.items() if n not in ("STAGES", "V")}
        own.count[(R * segments * H,)](
            k, *mixture, lengths, counts, *k.stride()[:3], C, segments, **sizes
        )
        own.add_counts[(R * H,)](counts, usage, segments, H=H, K=K)
        opened = routed[..., width : width + read].view(R, C, H, v)
    forward.sum_segments[(R * segments * H,)](
        k, val, grown, left, *mixture, lengths, sums, decays, gammas, masses, *k.stride()[:3],
        *val.stride()[:3], C, segments, KEEP=True, FORGET=forgets, **cut,
    )  # fmt: skip
    memory, mass = given["memory"], given["mass"]
    after, mass_after = torch.full_like(memory, torch.nan), torch.full_like(mass, torch.nan)
    scans.prefix[(-(-(v + 1) * K // 64), H, 3)](
        sums, decays, memory, mass, after, mass_after, first, count, first, fresh, rows.count,
        *memory.stride()[:3], *mass.stride()[:2], *memory.stride()[:3], *mass.stride()[:2],
        segments, H=H, K=K, V=v, TILE=64, DEPTH=4, FRESH=True, SLOTS=False, FORGET=forgets,
    )  # fmt: skip
    forward.read_segments[(R * segments * H,)](
        q, gammas, masses, val, grown, left, opened, *mixture, lengths, sums, out, *q.stride()[:3],
        *val.stride()[:3], *((0, 0, 0) if opened is None else opened.stride()[:3]), C, segments,
        1e-6, 1.0, FORGET=forgets, OPEN=forgets, **cut,
    )  # fmt: skip
    found = {"out": out, "memory_after": after, "mass_after": mass_after, "usage": usage}
    for name, x in expected.items():
        output = found[name]
        assert output is not None
        assert error(output.cpu(), x) < TYPES[dtype], name


@pytest.mark.parametrize(
    ("chunk", "dtype"),
    matrix(
        (1, 2, 3, 9),
        list(TYPES),
        always=[(1, torch.float32), (2, torch.float16), (9, torch.bfloat16)],
    ),
)
def test_convolution(chunk: int, dtype: torch.dtype) -> None:
    rows = hostile(chunk)
    inputs = operating.convolution_inputs(rows)
    given = {n: torch.tensor(x, dtype=torch.float32, device=DEVICE) for n, x in inputs.items()}
    x = given["x"].to(dtype)
    inputs["x"] = x.double().cpu().numpy()
    expected = operating.convolution_reference(inputs, rows)
    fresh = torch.tensor(rows.fresh, device=DEVICE)
    tail, taps, scale = given["tail"], given["taps"], given["scale"]
    tail[fresh] = torch.nan
    there = torch.tensor(rows.there(), device=DEVICE)
    x[~there] = torch.nan
    lengths, first, count, document = placed(rows)
    (D, T, W), R = tail.shape, len(lengths)
    scaled = torch.full((4, W), torch.nan, dtype=dtype, device=DEVICE)
    own.scale_taps[(4, 1)](taps, scale, scaled, T, W, WIDTH=8)
    y, normal = torch.full((2, *x.shape), torch.nan, dtype=dtype, device=DEVICE)
    after = torch.full_like(tail, torch.nan)
    before = torch.full((R, T, W), torch.nan, device=DEVICE)
    tokens.remember[(max(R, D),)](
        x, tail, after, before, scale, lengths, document, count, first, first, fresh, R, D, chunk,
        W, 1e-6, T * W, T=T, WIDTH=8, SLOTS=False,
    )  # fmt: skip
    tokens.convolve[(R * -(-chunk // 8),)](
        x, before, scaled, taps, y, normal, normal, chunk, W, 1e-6, T=T, KNOWN=0, WIDTH=8, STRIP=8,
        NORMAL=True,
    )  # fmt: skip
    for name, found in (("y", y), ("normal", normal), ("tail_after", after)):
        if name != "tail_after":
            found.masked_fill_(~there[..., None], 0.0)
        assert error(found.cpu(), expected[name]) < TYPES[dtype], name


def compiling(folder: Path, *arguments: str) -> None:
    """Compile in a process where Triton does not interpret, with nothing compiled before."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache")}
    subprocess.run([sys.executable, *arguments], env=environment, check=True)


@pytest.mark.long
def test_each_compiles_for_a_gpu(tmp_path: Path) -> None:
    """With no GPU and no compiler of CUDA's, in one type; it takes Triton and torch alone."""
    each = """
import sys
sys.modules |= dict.fromkeys(("pydantic", "onnx", "onnxruntime", "safetensors", "tokenizers"))
from gma.export.ops.cuda.cubins import compiled, wanted
kernels = [kernel for kernel in wanted([(16, 16, 32)], [32]) if " float" not in kernel.key]
for kernel in {(x.function, "forgetting" in x.key): x for x in kernels}.values():
    print(compiled(kernel, 90).key)
"""
    compiling(tmp_path, "-c", each)


@pytest.mark.long
def test_all_compile_for_a_gpu(tmp_path: Path) -> None:
    """What the library embeds, of one shape."""
    sizes = ["--shapes", "16x16x32", "--widths", "32", "192", "--architectures", "90"]
    compiling(tmp_path, "-m", "gma.export.ops.cuda.cubins", str(tmp_path), *sizes)
    table = (tmp_path / "cubins.inc").read_text()
    for key in (
        "convolve {} 192 exact",
        "normalize {} 32 any",
        "read {} 16x16x32 plain",
        "read {} 16x16x32 plain forgetting",
    ):
        for type_ in ("float", "float16", "bfloat16"):
            assert f'"{key.format(type_)}"' in table
