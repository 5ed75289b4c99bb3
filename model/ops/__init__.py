"""Gaussian Mixture Attention: one operation, several implementations, one signature."""
