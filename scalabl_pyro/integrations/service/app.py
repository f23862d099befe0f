"""The FastAPI application: addresses, errors, and what happens at the start and at the end."""

import asyncio
import contextlib
import importlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from ..._arguments import check_role, known_arguments
from ..._errors import check_count, check_not_negative
from ..._version import __version__
from ...baselines.predictor import Predictor
from ...distributed.processes import current_processes
from .batching import Batcher
from .calls import Call, calls_of
from .limits import Limits, Refused
from .reading import read_body, safe
from .schema import request_schema

logger = logging.getLogger(__name__)

#: Every address that some task has.
PATHS = ("/predict", "/score", "/generate")


@known_arguments
def make_app(
    posterior: Predictor,
    *,
    num_draws: int = 10,
    seed: int = 0,
    batch_size: int = 16,
    max_wait_ms: float = 5.0,
    max_rows: int = 64,
    max_chars: int = 20_000,
    max_bytes: int = 2**20,
    max_queue: int = 256,
    max_new_tokens: int = 256,
    timeout: float = 60.0,
) -> Any:
    """Build a FastAPI application that answers requests with the predictions of a posterior.

    Requests that wait at the same time share forward passes. The answer to a request does not depend on the others,
    except for rounding: it is that of ``posterior.predict(rows, num_draws=num_draws, seed=seed)``.

    Args:
        posterior: Fitted posterior, or another predictor of this library.
        num_draws: Number S of draws; 0 for the posterior mean.
        seed: Seed of the draws. All requests use the same draws.
        batch_size: Number of rows per forward pass, and largest number of rows of requests that are joined.
        max_wait_ms: Milliseconds that a request waits for others to join it.
        max_rows: Largest number of rows per request.
        max_chars: Largest number of characters per row.
        max_bytes: Largest size of a request in bytes.
        max_queue: Largest number of requests at a time. Further ones are refused with status 503.
        max_new_tokens: Largest number of tokens of a text that ``/generate`` writes.
        timeout: Seconds after which a request is given up with status 503.

    Returns:
        ``fastapi.FastAPI`` with ``GET /health``, and ``POST /predict``, or for the task
        :class:`~scalabl_pyro.Completion` ``POST /score`` and ``POST /generate``.

    Raises:
        ImportError: FastAPI is not installed.
        TypeError: ``posterior`` cannot predict, or an option is unknown.
        ValueError: A number is out of range, or several processes run together.

    Example:
        >>> from scalabl_pyro.integrations import make_app
        >>> app = make_app(posterior, num_draws=10)  # uvicorn, or any ASGI server, runs it
    """
    if not isinstance(posterior, Predictor):
        check_role("posterior", posterior, "posterior", call="make_app(posterior, num_draws=10)")
    check_count(num_draws=num_draws, seed=seed, least=0)
    check_count(batch_size=batch_size)
    check_not_negative(max_wait_ms=max_wait_ms)
    if current_processes().are_several:
        raise ValueError("A service runs in one process: call make_app without torch.distributed.")
    limits = Limits(
        max_rows=max_rows,
        max_chars=max_chars,
        max_bytes=max_bytes,
        max_queue=max_queue,
        max_new_tokens=max_new_tokens,
        timeout=timeout,
    )

    def make(kind: type[Call]) -> Call:
        return kind(posterior, num_draws=num_draws, seed=seed, batch_size=batch_size, limits=limits)

    service = Service(
        calls_of(posterior, make), Batcher(max_rows=batch_size, max_wait=max_wait_ms / 1000), limits, posterior
    )
    return service.app(num_draws=num_draws, seed=seed)


class Service:
    """Answers requests, and counts them.

    Args:
        calls: Calls by their address.
        batcher: Queue of checked requests.
        limits: Limits of the service.
        posterior: Fitted posterior.
    """

    def __init__(self, calls: dict[str, Call], batcher: Batcher, limits: Limits, posterior: Predictor) -> None:
        self.calls = calls
        self.batcher = batcher
        self.limits = limits
        self.posterior = posterior
        self.num_requests = 0
        self.num_open = 0

    def app(self, **facts: Any) -> Any:
        """Build the application.

        Args:
            facts: What ``/health`` tells besides the state of the service.
        """
        fastapi = needed("fastapi")

        @contextlib.asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[None]:
            self.batcher.open()
            yield
            await asyncio.to_thread(self.batcher.close, self.limits.timeout)

        # The pages of FastAPI with forms load scripts from another server.
        app = fastapi.FastAPI(title="Posterior", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)

        async def health() -> Any:
            return self._response(200 if self.batcher.is_open else 503, self.health() | facts)

        app.add_api_route("/health", health, methods=["GET"], summary="State of the service")
        for path in PATHS:
            self._add_call(app, path, fastapi.Request)
        app.state.service = self
        return app

    def health(self) -> dict[str, Any]:
        """Return what ``/health`` tells."""
        return {
            "ready": self.batcher.is_open,
            "version": __version__,
            "task": type(self.posterior.task).__name__,
            "base_model": type(self.posterior.adapter.module).__name__,
            "num_requests": self.num_requests,
            "num_open": self.num_open,
            "paths": list(self.calls),
            "limits": vars(self.limits),
        }

    async def answer(self, request: Any, call: Call) -> Any:
        """Answer a request, or say why it gets no answer.

        Args:
            request: Request of Starlette.
            call: Call that it asks for.
        """
        self.num_requests += 1
        self.num_open += 1
        body = b""
        try:
            if self.num_open > self.limits.max_queue:
                raise Refused(503, f"{self.limits.max_queue} requests wait already: send this one later.")
            async with asyncio.timeout(self.limits.timeout):
                body = await read_body(request, self.limits)
                job = await asyncio.to_thread(call.read, body)
                return self._response(200, await asyncio.wrap_future(self.batcher.submit(job)))
        except Refused as refused:
            return self._response(refused.status, {"detail": safe(refused.message, body)})
        except TimeoutError:
            return self._response(503, {"detail": f"There was no answer within {self.limits.timeout:g} s."})
        except needed("starlette.requests").ClientDisconnect:
            return self._response(400, {"detail": "The client left before the end of the request."})
        except FloatingPointError:
            logger.exception("The outputs of the LLM are NaN.")
            return self._response(500, {"detail": "The outputs of the model are NaN or infinite for these rows."})
        except Exception:
            logger.exception("A request failed.")
            return self._response(500, {"detail": "The service failed at this request. Its log says why."})
        finally:
            self.num_open -= 1

    def _add_call(self, app: Any, path: str, request_class: type) -> None:
        call = self.calls.get(path)

        async def post(request: request_class) -> Any:  # type: ignore[valid-type]
            if call is None:
                others = " and ".join(f"POST {other}" for other in self.calls)
                task = type(self.posterior.task).__name__
                return self._response(404, {"detail": f"This service has the task {task}: use {others}."})
            return await self.answer(request, call)

        schema = {} if call is None else request_schema(call)
        app.add_api_route(path, post, methods=["POST"], openapi_extra=schema, include_in_schema=call is not None)

    def _response(self, status: int, content: dict[str, Any]) -> Any:
        """Return JSON without NaN, in which half of a character can stand."""
        body = json.dumps(content, allow_nan=False).encode()
        headers = {"Retry-After": "1"} if status == 503 else {}
        return needed("fastapi").Response(body, status, headers, media_type="application/json")


def needed(package: str) -> Any:
    """Import a package that the service needs.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"The service needs the package {package}, which is not installed: pip install 'scalabl-pyro[serve]'."
        ) from error
