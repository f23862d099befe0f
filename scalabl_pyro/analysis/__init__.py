"""Checks of an inference: importance weights, findings, and export to ArviZ."""
