"""What the operators refuse."""

from __future__ import annotations

import pytest
import torch

from gma.model.ops.chunked import Rows

pytest.importorskip("triton")

from gma.model.ops.triton import arguments, operators
from tests.interpreting import KERNELS
from tests.model.ops.triton.inputs import FORMS, Input, make, outputs

pytestmark = KERNELS


def test_a_device_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "INTERPRETED", False)
    exact, rows = make([20], [0])
    x, rows = Input(*(y.float().cpu() for y in exact)), Rows(*(y.cpu() for y in rows))
    with pytest.raises(ValueError, match="CUDA"):
        outputs("causal", operators, x, rows)


@pytest.mark.parametrize("sizes", [(8, 16, 16), (16, 24, 16), (16, 16, 256)])
@FORMS
def test_sizes(form: str, sizes: tuple[int, int, int]) -> None:
    if (form, sizes) == ("write", (16, 16, 256)):
        sizes = (16, 256, 16)
    exact, rows = make([20], [0], sizes=sizes)
    with pytest.raises(ValueError, match="128"):
        outputs(form, operators, exact.to(torch.float32), rows)


@FORMS
def test_a_mixture_too_large_for_float32(form: str) -> None:
    exact, rows = make([20], [0], sizes=(128, 128, 16))
    with pytest.raises(ValueError, match=r"r \* K must be at most 8192"):
        outputs(form, operators, exact.to(torch.float32), rows)


def test_dtypes() -> None:
    exact, rows = make([20], [0])
    with pytest.raises(ValueError, match="dtype"):
        outputs("causal", operators, exact.to(torch.float64), rows)
    x = exact.to(torch.bfloat16)
    with pytest.raises(ValueError, match="dtype"):
        outputs("causal", operators, x._replace(val=x.val.float()), rows)
    with pytest.raises(ValueError, match="float32"):
        outputs("causal", operators, x._replace(memory=x.memory.bfloat16()), rows)


def test_shapes() -> None:
    exact, rows = make([20, 20], [0, 1], heads=2)
    x = exact.to(torch.float32)
    with pytest.raises(ValueError, match="mass is"):
        outputs("causal", operators, x._replace(mass=x.mass[:, :1]), rows)
    with pytest.raises(ValueError, match="contiguous"):
        outputs("causal", operators, x, rows._replace(lengths=rows.lengths.repeat(2)[::2]))
