"""API keys: who may call, told before anything else is looked at.

Knows keys, the Authorization header and which two paths need none. Knows no route: what isn't exempt needs a key,
whether it exists or not.
"""

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sightline_server.errors import InvalidKey
from sightline_server.settings import Settings, SettingsError

OPEN_PATHS = frozenset({"/health", "/ready"})


def read_keys(settings: Settings) -> tuple[str, ...]:
    """All keys, from the settings and the file. Raises SettingsError for one that no client could send."""
    keys = list(settings.api_key)
    if settings.api_key_file:
        lines = Path(settings.api_key_file).read_text("utf-8").splitlines()
        found = [line.partition("#")[0].strip() for line in lines]
        keys += [key for key in found if key]
        if not any(found):
            raise SettingsError(f"--api-key-file {settings.api_key_file!r} holds no key: write one a line.")
    for index, key in enumerate(keys):
        if not key or any(character.isspace() or not character.isprintable() for character in key):
            raise SettingsError(f"API key number {index + 1} is empty or holds white space, which no client can send.")
    return tuple(dict.fromkeys(keys))


class KeyCheck:
    """ASGI middleware: 401 without one of ``keys``, when there are any.

    Leaves ``state["cache_salt"]`` for what is cached by key: requests with different keys share nothing.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["cache_salt"] = b""
        if self._digests and scope["path"] not in OPEN_PATHS:
            digest = self._match(scope)
            if digest is None:
                await _refuse(scope, receive, send)
                return
            state["cache_salt"] = hashlib.sha256(b"cache salt " + digest).digest()[:16]
        await self._app(scope, receive, send)

    def _match(self, scope: Scope) -> bytes | None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return None
        scheme, _, token = given[0].partition(b" ")
        digest = hashlib.sha256(token.strip(b" ")).digest()
        # Digests of one length, and all of them compared, so that time tells nothing about any key.
        found = [known for known in self._digests if hmac.compare_digest(known, digest)]
        return found[0] if found and scheme.lower() == b"bearer" else None


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    error = InvalidKey("Incorrect API key provided. Send one of this server's keys as 'Authorization: Bearer KEY'.")
    response = JSONResponse(error.body(), error.status, {"WWW-Authenticate": "Bearer"})
    await response(scope, receive, send)
