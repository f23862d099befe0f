"""Command line: ``scalabl-pyro`` fits, predicts, evaluates, exports, serves, and checks files."""
