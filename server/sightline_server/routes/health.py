"""Whether the server lives, whether it answers, its figures, and what it offers."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from sightline_server.auth.principal import Scope
from sightline_server.protocol.health import Status
from sightline_server.routes.access import ANY_KEY, OPEN, Needs
from sightline_server.routes.context import context_of, record_of

router = APIRouter(tags=["server"])


@router.get("/health", dependencies=[Depends(OPEN)], response_model=Status, summary="Alive?")
async def health(request: Request) -> Status:
    """200 as long as this process answers, whatever the engine does. Needs no key."""
    record_of(request).endpoint = "health"
    return Status(status="ok")


@router.get(
    "/ready",
    dependencies=[Depends(OPEN)],
    response_model=Status,
    summary="Ready?",
    responses={503: {"model": Status}},
)
async def ready(request: Request) -> JSONResponse:
    """200 when the engine answers, else 503. Needs no key."""
    record_of(request).endpoint = "health"
    engine = context_of(request).engine
    if request.app.state.draining:
        status = Status(status="draining")
    elif engine.ready:
        status = Status(status="ready")
    else:
        status = Status(status="starting" if engine.info is None else "restarting")
    return JSONResponse(status.model_dump(), 200 if status.status == "ready" else 503)


@router.get(
    "/metrics",
    # Figures of all keys together: what one key's owner could learn of the others'.
    dependencies=[Depends(Needs(Scope.ADMIN))],
    summary="Figures for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    record_of(request).endpoint = "metrics"
    return Response(context_of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


# FastAPI's own route for it could declare no scope.
@router.get("/openapi.json", dependencies=[Depends(ANY_KEY)], include_in_schema=False)
async def openapi_document(request: Request) -> JSONResponse:
    return JSONResponse(request.app.openapi())
