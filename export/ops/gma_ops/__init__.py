"""Kernels of the operators of domain ``ai.gma`` for ONNX Runtime, as one shared library."""

from pathlib import Path


def library() -> Path:
    """What ``SessionOptions.register_custom_ops_library`` takes.

    Kernels for the CPU, and for CUDA if the library was built where its toolkit was. Which of the
    processor's instructions they use is found out when it is loaded; GMA_OPS_INSTRUCTIONS
    (baseline, avx2 or avx512) chooses others.
    """
    return Path(__file__).with_name("libgma_ops.so")
