"""Every failure as an answer: OpenAI's error object with its status, whatever raised it."""

import logging

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from sightline_server.errors import ApiError, InvalidRequest, MethodNotAllowed, NotFound, ServerFault

log = logging.getLogger(__name__)

_MAX_SHOWN_PATH = 100


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers())


def server_fault() -> ServerFault:
    """For what should not have happened: the answer says no more than where to look."""
    return ServerFault("The server failed on this request. Its log has the reason under this x-request-id.")


def register(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    request.state.record.fail(error)
    return error_response(error)


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    # Not request.url, which believes the Host header.
    where = f"{request.method} {request.scope['path'][:_MAX_SHOWN_PATH]}"
    if error.status_code == 404:
        return error_response(NotFound(f"Unknown request URL: {where}. The API is under /v1."))
    if error.status_code == 405:
        refusal = MethodNotAllowed(f"Not allowed: {where}.")
        return JSONResponse(refusal.body(), refusal.status, error.headers)
    made = InvalidRequest("The request could not be understood.") if error.status_code < 500 else server_fault()
    return error_response(made)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    return error_response(InvalidRequest("The request could not be understood."))
