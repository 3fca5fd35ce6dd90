"""How many connections there are, in all and by address, and who is not let in. Knows no bytes and no protocol."""

import ipaddress
from collections import Counter

from sightline_server.errors import ApiError, Unavailable
from sightline_server.http.limits import HttpLimits

RETRY_S = 5.0
ANSWERED_REFUSALS = 64
"""Connections over the limit that are told so at a time; more are closed at once, since telling takes time too."""


class Door:
    """Counts who comes and who leaves."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._by_address: Counter[str] = Counter()
        self._num_refused = 0

    @property
    def connections(self) -> int:
        """Those that are served."""
        return self._by_address.total()

    def enter(self, address: str) -> ApiError | None:
        """Count a connection from ``address``, unless it isn't served: then why. Pair it with ``leave`` if it is."""
        key = network_of(address)
        refusal = self._refusal(key)
        if refusal is None:
            self._by_address[key] += 1
        return refusal

    def may_tell(self) -> bool:
        """Whether one that isn't served may be told so; pair it with ``told`` if it may."""
        if self._num_refused >= ANSWERED_REFUSALS:
            return False
        self._num_refused += 1
        return True

    def told(self) -> None:
        self._num_refused -= 1

    def _refusal(self, key: str) -> ApiError | None:
        if self._by_address.total() >= self._limits.connections:
            return Unavailable(
                f"The server has its {self._limits.connections} connections open. Try again shortly, or close some.",
                code="too_many_connections",
                retry_after_s=RETRY_S,
            )
        if self._by_address[key] >= self._limits.connections_per_address:
            return Unavailable(
                f"{self._limits.connections_per_address} connections are open from your address, which is the most "
                "one may have. Close some, or keep them open for several requests.",
                code="too_many_connections",
                retry_after_s=RETRY_S,
            )
        return None

    def leave(self, address: str) -> None:
        key = network_of(address)
        self._by_address[key] -= 1
        if self._by_address[key] <= 0:
            del self._by_address[key]


def network_of(address: str) -> str:
    """What counts as one address: for IPv6 the /64, all of which a single machine usually has."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
