"""The posterior: its state, its files, and what users ask of it."""
