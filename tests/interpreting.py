"""Where the tests of Triton's kernels run: on a GPU, or in its interpreter where no GPU is."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from gma.model.ops.triton.device import INTERPRETED

DEVICE = "cpu" if INTERPRETED.value else "cuda"
KERNELS = [
    pytest.mark.usefixtures("_interpreter"),
    # numpy warns of what kernels may meet.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="Triton neither runs nor interprets",
    ),
]
