"""Inference besides ``fit``: from a fitted posterior with A and B held fixed, or SVI for a model of your own."""
