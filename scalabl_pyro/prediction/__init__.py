"""Prediction: posterior draws, and what each draw says of each row."""
