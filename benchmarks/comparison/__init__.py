"""Mixers on one backbone, one trainer, one tokenizer and one budget: see docs/comparison.md."""
