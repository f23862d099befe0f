"""Inference that starts from a fitted posterior and holds A and B fixed."""
