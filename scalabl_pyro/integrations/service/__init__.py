"""HTTP service of a fitted posterior: JSON rows in, predictions with their uncertainty out.

FastAPI and uvicorn come with ``pip install 'scalabl-pyro[serve]'``. They are imported when :func:`make_app` or
:func:`serve` is called.
"""

from .app import make_app
from .server import serve

__all__ = ["make_app", "serve"]
