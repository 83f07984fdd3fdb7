"""Evaluation: ask a model the questions of a benchmark, score its answers. Starts no JAX."""
