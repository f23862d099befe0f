"""Runs the service with uvicorn."""

import math
from typing import Any

from ...baselines.predictor import Predictor
from .app import make_app, needed


def serve(
    posterior: Predictor, host: str = "127.0.0.1", port: int = 8000, *, log_level: str = "info", **options: Any
) -> None:
    """Run a service until the process gets SIGINT or SIGTERM.

    At the end, it accepts no more requests, and answers those that wait. There is neither encryption nor a password:
    with another ``host`` than this machine, put a proxy in front of it that has both.

    Args:
        posterior: Fitted posterior, or another predictor of this library.
        host: Address to listen at. The default is reached from this machine only.
        port: Port to listen at; 0 for any free one.
        log_level: Level of uvicorn's log: ``"critical"``, ``"error"``, ``"warning"``, ``"info"``, ``"debug"`` or
            ``"trace"``.
        options: Options of :func:`make_app`.

    Raises:
        ImportError: FastAPI or uvicorn is not installed.
        TypeError, ValueError: As for :func:`make_app`.

    Example:
        >>> from scalabl_pyro.integrations import serve
        >>> serve(posterior, port=8000, num_draws=10)  # ends with Ctrl-C
    """
    app = make_app(posterior, **options)
    uvicorn = needed("uvicorn")
    patience = math.ceil(options.get("timeout", 60.0))
    uvicorn.run(app, host=host, port=port, log_level=log_level, server_header=False, timeout_graceful_shutdown=patience)
