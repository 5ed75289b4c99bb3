"""Kernels for the CPU in C++: the mixer and what stands around it in a layer, float32.

``make install`` and every wheel compile them, with nothing but a C++ compiler, for several sets of
instructions; which one runs is decided when they are loaded. ONNX Runtime's operators are made of
the same files (export/ops).
"""
