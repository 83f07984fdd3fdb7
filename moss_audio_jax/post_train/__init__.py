"""Reinforcement learning from rewards that can be checked. Only `dapo` imports JAX."""
