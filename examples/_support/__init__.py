"""What the examples share: models, data, and the small functions that an example is about. Nothing here is a script."""
