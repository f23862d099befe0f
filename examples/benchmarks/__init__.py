"""Benchmarks: cost of a step and of draws, and quality of the uncertainties. Results are in ``results/``."""
