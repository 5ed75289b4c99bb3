"""Kernels of the operators of domain ``ai.gma`` for ONNX Runtime, as one shared library."""

from pathlib import Path


def library() -> Path:
    """Find the file for ``SessionOptions.register_custom_ops_library``.

    It has kernels for the CPU, and for CUDA if it was built with them. The best instructions that
    the processor has are found out when it is loaded; GMA_OPS_INSTRUCTIONS (baseline, avx2 or
    avx512) chooses others.
    """
    return Path(__file__).with_name("libgma_ops.so")
