"""Weights: official and native checkpoints, read and written without holding a whole model."""
