"""Other ways to fine-tune with uncertainty, with the verbs of ScalaBL."""
