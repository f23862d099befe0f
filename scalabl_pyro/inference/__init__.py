"""Other inference, which starts from a fitted posterior and holds A and B fixed."""
