"""Checks of an inference: importance weights, findings, and data for ArviZ."""
