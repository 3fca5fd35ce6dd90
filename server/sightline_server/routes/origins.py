"""Who a browser says it talks to and for: the Host and Origin headers, against pages that would use the server unseen.

A page whose own name is made to lead here (DNS rebinding) sends that name as Host; a page of another site sends its
Origin. Programs send neither a foreign Host nor an Origin. Pure ASGI. Knows names; knows no route and no key.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from sightline_server.errors import ApiError, InvalidRequest, OriginRefused
from sightline_server.routes.failures import error_response
from sightline_server.settings import Settings

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9._-]{1,253}))(?::([0-9]{1,5}))?")
_SCHEMES = {"http": "80", "https": "443"}
PRIVATE_ENDINGS = (".local", ".internal", ".home.arpa")
"""No public name ends so: whoever decides where they lead is on the network already."""


@dataclass(frozen=True)
class Origins:
    """Which names may stand in Host, and which origins may call."""

    hosts: frozenset[str]
    endings: tuple[str, ...]
    any_host: bool
    dotless: bool
    """Whether names without a dot pass: they are nobody's but the local network's."""
    origins: frozenset[str]

    @classmethod
    def of(cls, settings: Settings) -> "Origins":
        listed = [name.lower() for name in settings.allowed_hosts]
        own = socket.gethostname().lower()
        public = not _is_loopback(settings.host)
        return cls(
            hosts=frozenset({"localhost", own, f"{own}.local", settings.host.lower(), *listed}),
            endings=(
                ".localhost",
                *(PRIVATE_ENDINGS if public else ()),
                *(name[1:] for name in listed if name.startswith("*.")),
            ),
            any_host="*" in listed,
            dotless=public,
            origins=frozenset(settings.cors_origins),
        )

    def refusal(self, hosts: Sequence[bytes], origins: Sequence[bytes], http_version: str) -> ApiError | None:
        """Why a request with these headers isn't served; None if it is."""
        if not hosts and http_version == "1.0" and not origins:
            # Simple health checks; no browser is so old.
            return None
        if len(hosts) != 1:
            return InvalidRequest("Send exactly one Host header.", code="invalid_host")
        host = _HOST.fullmatch(hosts[0].decode("latin-1"))
        if host is None or not _is_port(host[3]):
            return InvalidRequest("The Host header is no host name with an optional port.", code="invalid_host")
        name = host[2].lower().removesuffix(".") if host[2] else host[1]
        if not self._serves(name, bracketed=bool(host[1])):
            return OriginRefused(
                f"This server doesn't answer to the name {name[:80]!r}: add it to --allowed-hosts, or use an IP "
                "address or localhost.",
                code="host_not_allowed",
            )
        if not origins or self._may_call(origins, name, host[3]):
            return None
        return OriginRefused(
            "Pages of this origin may not call the server: add the origin to --cors-origins.", code="origin_not_allowed"
        )

    def _serves(self, name: str, *, bracketed: bool) -> bool:
        if bracketed or _is_address(name):
            return _is_address(name)
        if self.any_host or name in self.hosts or name.endswith(self.endings):
            return True
        return self.dotless and "." not in name

    def _may_call(self, origins: Sequence[bytes], name: str, port: str | None) -> bool:
        if len(origins) != 1:
            return False
        origin = origins[0].decode("latin-1")
        if origin in self.origins or "*" in self.origins:
            return True
        # The server's own pages, also behind a proxy that speaks TLS for it.
        scheme, _, rest = origin.partition("://")
        found = _HOST.fullmatch(rest)
        if scheme not in _SCHEMES or found is None:
            return False
        own_name = found[2].lower().removesuffix(".") if found[2] else found[1]
        return (own_name, found[3] or _SCHEMES[scheme]) == (name, port or _SCHEMES[scheme])


class Doorkeeper:
    """400 for a Host that is none, 403 for one that isn't ours and for a foreign Origin."""

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        error = self._origins.refusal(hosts, origins, scope.get("http_version", "1.1"))
        if error is None:
            await self._app(scope, receive, send)
            return
        scope["state"]["record"].fail(error)
        await error_response(error)(scope, receive, send)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host.lower() == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_port(text: str | None) -> bool:
    return text is None or 0 < int(text) <= 65535
