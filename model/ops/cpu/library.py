"""The library of the kernels, called through plain C.

A step's tokens lie packed, those of a row behind those of the row before: tokens that are not there
are nowhere, and cost nothing.

Shapes: R rows of C tokens, of which n are there; D documents, W width, H heads, K components,
v value_dim, T tail of the convolution.
"""

from __future__ import annotations

from ctypes import CDLL, c_bool, c_char_p, c_float, c_int64, c_void_p, cast
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gma.model.config import BackboneConfig
from gma.model.ops.chunked import ROUTING_EPSILON, Coefficients, Rows
from gma.model.ops.forgetting import MOST_FORGOTTEN

FILE = Path(__file__).with_name("libgma_cpu.so")
"""Where hatch_build.py leaves it."""

VERSION = 3
"""Of what the library's functions take."""

PANEL = 128
"""What a packed matrix has a multiple of: outputs."""

INSTALL = "install gma-service where there is a C++ compiler (in a clone: make install)"

POINTERS, SIZES = [c_void_p], [c_int64]

FUNCTIONS: dict[str, list[Any]] = {
    "gma_mix": POINTERS * 13 + SIZES * 12 + [c_bool] + [c_float] * 3,
    "gma_convolve": POINTERS * 9 + SIZES * 7 + [c_float],
    "gma_normalize": POINTERS * 2 + SIZES * 2 + [c_float],
    "gma_pack": POINTERS * 2 + SIZES * 2,
    "gma_multiply": POINTERS * 4 + SIZES * 3 + [c_bool],
    "gma_gelu": POINTERS + SIZES,
    "gma_score": POINTERS * 7 + SIZES * 4,
    "gma_quantize": POINTERS * 3 + SIZES * 2,
    "gma_dequantize": POINTERS * 4 + SIZES * 2 + [c_bool],
}


class Library:
    """The loaded library. Its functions take and fill contiguous tensors of the CPU, float32 unless
    they say otherwise, use as many threads as PyTorch, and may be called by several at once."""

    def __init__(self, file: Path = FILE) -> None:
        """Raises OSError or AttributeError if there is none, or none for this processor or PyTorch;
        ValueError if it is another version's, or has not the instructions that were asked for."""
        self._library = CDLL(str(file))
        self._library.gma_version.restype = c_int64
        if self._library.gma_version() != VERSION:
            raise ValueError(f"{file} is of another version: {INSTALL}")
        for name, arguments in FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c_char_p
        # PyTorch's own threads, by its stable interface.
        symbols = CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        threads = (
            cast(symbols[n], c_void_p) for n in ("torch_parallel_for", "torch_get_num_threads")
        )
        self._library.gma_open.argtypes = POINTERS * 2
        self._library.gma_open.restype = c_char_p
        self._call(self._library.gma_open, *threads)
        self._library.gma_instructions.restype = c_char_p
        self.instructions: str = self._library.gma_instructions().decode()
        """Those that its kernels use: avx512, avx2, or baseline, which every processor has."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return Library, ()  # a copy of a model has it too

    def mix(
        self,
        routed: Tensor,
        states: tuple[Tensor, Tensor],
        mixture: Coefficients,
        keep_bias: Tensor | None,
        rows: Rows,
        config: BackboneConfig,
        out: Tensor,
        after: tuple[Tensor, Tensor],
        usage: Tensor | None,
    ) -> None:
        """Let tokens read what they and their documents' earlier tokens wrote.

        routed (n, ...) is what they are projected to: q, k and val of all heads; then, in the form
        that forgets, the output's gates and what tells the rates; then anything. states are
        memory (D, H, K, v) and mass (D, H, K), of which documents may lie apart, and after has them
        after the step, as far apart. out (n, H * v). In the form that forgets usage (R, H, K) is
        counted; in the paper's keep_bias and usage are None.
        """
        (memory, mass), (r, c) = states, rows.valid.shape
        self._call(
            self._library.gma_mix,
            routed.data_ptr(),
            memory.data_ptr(),
            mass.data_ptr(),
            *(x.data_ptr() for x in mixture),
            None if keep_bias is None else keep_bias.data_ptr(),
            rows.lengths.data_ptr(),
            rows.document.data_ptr(),
            out.data_ptr(),
            *(x.data_ptr() for x in after),
            None if usage is None else usage.data_ptr(),
            len(routed),
            r,
            c,
            len(memory),
            routed.shape[-1],
            config.heads,
            config.routing_dim,
            config.num_components,
            config.value_dim,
            0 if keep_bias is None else len(keep_bias),
            memory.stride(0),
            mass.stride(0),
            config.normalize_routing,
            ROUTING_EPSILON,
            config.epsilon,
            MOST_FORGOTTEN,
        )

    def convolve(
        self,
        x: Tensor,
        scale: Tensor,
        taps: Tensor,
        tails: tuple[Tensor, Tensor],
        rows: Rows,
        y: Tensor,
        normal: Tensor,
        epsilon: float,
    ) -> None:
        """Add the convolution of x (n, W), normalised, to it: y, and y normalised, unscaled.

        scale (W,), taps (T + 1, W). tails are those before and after the step, (D, T, W), of which
        documents may lie apart.
        """
        (tail, after), (r, c) = tails, rows.valid.shape
        self._call(
            self._library.gma_convolve,
            *(each.data_ptr() for each in (x, tail, scale, taps, rows.lengths, rows.document)),
            *(each.data_ptr() for each in (y, normal, after)),
            len(x),
            r,
            c,
            len(tail),
            x.shape[1],
            tail.shape[1],
            tail.stride(0),
            epsilon,
        )

    def normalize(self, x: Tensor, normal: Tensor, epsilon: float) -> None:
        """Divide each row of x (n, W) by its root mean square."""
        self._call(self._library.gma_normalize, x.data_ptr(), normal.data_ptr(), *x.shape, epsilon)

    def packed(self, weight: Tensor) -> Tensor:
        """Return a matrix (I, O) as `multiply` takes it on this processor."""
        inputs, outputs = weight.shape
        packed = torch.zeros(inputs * -(-outputs // PANEL) * PANEL)
        self._call(self._library.gma_pack, weight.data_ptr(), packed.data_ptr(), inputs, outputs)
        return packed

    def multiply(
        self, x: Tensor, packed: Tensor, y: Tensor, *, gelu: bool = False, add: bool = False
    ) -> None:
        """Put the product of x (n, I) and a packed matrix (I, O), or GELU of it, into y (n, O), or
        add it to that. What a row gives does not depend on the others."""
        self._call(
            self._library.gma_multiply,
            x.data_ptr(),
            packed.data_ptr(),
            y.data_ptr() if add else None,
            y.data_ptr(),
            *x.shape,
            y.shape[1],
            gelu,
        )

    def gelu_(self, x: Tensor) -> None:
        """GELU, in its form with tanh, in place."""
        self._call(self._library.gma_gelu, x.data_ptr(), x.numel())

    def score(
        self,
        read: Tensor,
        table: Tensor,
        bias: Tensor,
        factor: Tensor | None,
        tokens: Tensor,
        lengths: Tensor,
        evidence: Tensor,
    ) -> None:
        """Put what each row's tokens say for labels into evidence (R, G), see
        `gma.model.layers.Pooling`.

        read (n, G + 1), or (n, G) where there is a factor (G,), with a bias of as many; table
        (V, G) has tokens' own scores, tokens (n,) int64 are ids of it, and lengths (R,) int64 say
        how many each row has.
        """
        given = read, table, bias, factor, tokens, lengths, evidence
        pointers = (None if each is None else each.data_ptr() for each in given)
        sizes = len(read), len(lengths), read.shape[1], evidence.shape[1]
        self._call(self._library.gma_score, *pointers, *sizes)

    def quantize(self, x: Tensor, y: Tensor, scale: Tensor) -> None:
        """Round each row of x (n, W) to integers y (n, W) int8 that its scale (n,) multiplies.

        The largest is 127 or -127. A row that is not finite has the scale NaN, and harms no other.
        """
        pointers = (each.data_ptr() for each in (x, y, scale))
        self._call(self._library.gma_quantize, *pointers, *x.shape)

    def dequantize(
        self, sums: Tensor, of_row: Tensor, of_column: Tensor, y: Tensor, *, add: bool
    ) -> None:
        """Put sums (n, O) int32, times the scales of rows (n,) and of columns (O,), into y (n, O),
        or add them to it."""
        pointers = (each.data_ptr() for each in (sums, of_row, of_column, y))
        self._call(self._library.gma_dequantize, *pointers, *sums.shape, add)

    def _call(self, function: Any, *arguments: Any) -> None:
        if message := function(*arguments):
            raise ValueError(message.decode())


@cache
def library() -> Library | str:
    """The library, or why there is none."""
    if not FILE.exists():
        return f"they were not compiled: {INSTALL}"
    try:
        return Library()
    except (OSError, AttributeError, ValueError) as error:
        return str(error)
