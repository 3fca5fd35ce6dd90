"""Puts the server together: middleware, routes, error answers and the OpenAPI document. Imports no torch.

The engine, the model and the decode pool are arguments; whoever calls starts and closes them.
"""

from collections.abc import AsyncIterator, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware

from sightline_server.auth.key_check import KeyCheck
from sightline_server.auth.keyring import Keyring
from sightline_server.auth.quotas import Quotas
from sightline_server.chat.decode_pool import DecodePool
from sightline_server.chat.model import ServedModel
from sightline_server.engine.client import EngineClient
from sightline_server.metrics import Metrics
from sightline_server.protocol.chat import ChatRequest
from sightline_server.protocol.completion import ChatChunk
from sightline_server.routes import access, chat, failures, health, models
from sightline_server.routes.admission import Admission
from sightline_server.routes.brake import RefusalBrake
from sightline_server.routes.context import Context
from sightline_server.routes.edge import BodyLimits, Edge
from sightline_server.routes.origins import Doorkeeper, Origins
from sightline_server.settings import Settings

if TYPE_CHECKING:
    # Older releases have none, and take the argument without a word.
    from fastapi.telemetry import TelemetryConfig

PROMPT_THREADS = 2
# FastAPI's own would send requests' traces wherever the environment's OTEL_* variables say.
_NO_TELEMETRY: "TelemetryConfig" = {
    "auto_configure": False,
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
}
ROUTERS = (chat.router, models.router, health.router)


def create_app(
    engine: EngineClient,
    model: ServedModel,
    images: DecodePool,
    settings: Settings,
    keyring: Keyring | None = None,
) -> FastAPI:
    """The ASGI application. Set ``app.state.draining`` to make it refuse new requests. Raises SettingsError.

    ``keyring`` is that of the settings, unless it is given because it shall be reloaded.
    """
    keyring = keyring or Keyring(settings)
    metrics = Metrics()
    metrics.watch(engine, images)
    prompt_threads = ThreadPoolExecutor(PROMPT_THREADS, thread_name_prefix="prompt")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        prompt_threads.shutdown(wait=False, cancel_futures=True)

    # FastAPI's own pages of documentation load scripts from another machine, so there are none.
    app = FastAPI(
        title="Sightline",
        version=version("sightline"),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        telemetry=_NO_TELEMETRY,
    )
    app.state.draining = False
    app.state.context = Context(
        engine=engine,
        model=model,
        images=images,
        settings=settings,
        metrics=metrics,
        admission=Admission(engine, settings, keyring),
        keyring=keyring,
        quotas=Quotas(),
        prompt_threads=prompt_threads,
    )
    open_paths = access.include(app, ROUTERS)
    failures.register(app)
    # The last one added is the first one met.
    app.add_middleware(
        BodyLimits, max_mb=settings.max_body_mb, all_mb=settings.max_bodies_mb, timeout_s=settings.body_timeout_s
    )
    app.add_middleware(KeyCheck, keyring=keyring, open_paths=open_paths)
    if settings.cors_origins:
        # Outside the key check: a browser asks for permission without the key. Any header is allowed, since the
        # SDKs invent new x-stainless-* ones and the origins are chosen by the operator.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Doorkeeper, origins=Origins.of(settings))
    app.add_middleware(RefusalBrake, delay_s=settings.refusal_delay_s)
    app.add_middleware(Edge, metrics=metrics)
    _document(app, open_paths if keyring.needs_key else None)
    return app


def _document(app: FastAPI, open_paths: Collection[str] | None) -> None:
    """Tell the OpenAPI document what FastAPI can't see: the hand-read body, the chunks, the key.

    ``open_paths`` need none; None is for a server that has no keys.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, made = models_json_schema(
                [(ChatRequest, "validation"), (ChatChunk, "serialization")],
                ref_template="#/components/schemas/{model}",
            )
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(made["$defs"])
            if open_paths is not None:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, operations in document["paths"].items():
                    for operation in operations.values():
                        operation["security"] = [] if path in open_paths else [{"key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
