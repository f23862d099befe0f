"""Stochastic variational inference: options, steps, checkpoints, and the result."""
