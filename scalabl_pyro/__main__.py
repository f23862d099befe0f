"""Entry point of ``python -m scalabl_pyro``."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
