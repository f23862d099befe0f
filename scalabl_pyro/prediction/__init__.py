"""Posterior draws, and predictions under them."""
