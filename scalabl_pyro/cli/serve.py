"""The command ``serve``: a saved posterior answers requests over HTTP."""

from pathlib import Path

from ..integrations.service.server import serve as run_service
from .loading import load_posterior


def serve(path: Path, model: str, host: str, port: int, num_draws: int, seed: int, batch_size: int, device: str) -> int:
    """Serve a posterior until the process is stopped.

    Args:
        path: Directory of the saved posterior.
        model: Base model.
        host: Address to listen at.
        port: Port to listen at.
        num_draws: Number of draws.
        seed: Seed of the draws.
        batch_size: Rows per forward pass.
        device: Device of the model.

    Returns:
        0.

    Raises:
        ImportError: FastAPI or uvicorn is not installed.
    """
    posterior = load_posterior(path, model, device)
    run_service(posterior, host, port, num_draws=num_draws, seed=seed, batch_size=batch_size)
    return 0
