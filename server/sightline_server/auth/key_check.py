"""Asks every request for its key before anything else is looked at.

Knows the Authorization header. Knows no route: what isn't declared open needs a key, whether it exists or not.
"""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sightline_server.auth.keyring import Keyring
from sightline_server.auth.principal import ANONYMOUS, Principal
from sightline_server.errors import InvalidKey


class KeyCheck:
    """ASGI middleware: 401 without one of the keyring's keys, if it has a say.

    Leaves in ``state``: ``principal``; ``until_answered``, an ExitStack that is unwound when the answer has been sent
    or given up; ``answer_headers``, a dict of what is added to the answer's.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, open_paths: Collection[str]) -> None:
        self._app = app
        self._keyring = keyring
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        principal = self._principal(scope)
        if principal is None:
            await _refuse(scope, receive, send)
            return
        if principal.key_id and "record" in state:
            state["record"].fields["key"] = principal.key_id
        state["principal"] = principal
        state["answer_headers"] = {}
        with ExitStack() as state["until_answered"]:
            await self._app(scope, receive, _adding(state["answer_headers"], send))

    def _principal(self, scope: Scope) -> Principal | None:
        # scope["path"], never a URL put together with the Host header.
        if not self._keyring.needs_key or scope["path"] in self._open_paths:
            return ANONYMOUS
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return None
        scheme, _, token = given[0].partition(b" ")
        found = self._keyring.find(token.strip(b" "))
        return found if scheme.lower() == b"bearer" else None


def _adding(headers: dict[str, str], send: Send) -> Callable[[Message], Any]:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start" and headers:
            message["headers"] = [
                *message.get("headers", ()),
                *((name.encode(), value.encode()) for name, value in headers.items()),
            ]
        await send(message)

    return send_with_headers


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    error = InvalidKey("Incorrect API key provided. Send one of this server's keys as 'Authorization: Bearer KEY'.")
    response = JSONResponse(error.body(), error.status, {"WWW-Authenticate": "Bearer"})
    await response(scope, receive, send)
