"""The model: Gaussian Mixture Attention as a classifier of token streams, and how it is trained."""
