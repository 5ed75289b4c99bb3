"""The classifier's step for a GPU: what it takes of a model, its kernels, and what runs them."""
