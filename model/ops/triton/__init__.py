"""Gaussian Mixture Attention over the rows of a step, in Triton: kernels and what launches them."""
