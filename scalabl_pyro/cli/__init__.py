"""Command line: ``python -m scalabl_pyro doctor`` checks an installation or a saved posterior."""
