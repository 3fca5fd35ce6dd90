"""What one connection, one address and all of them together may take of the server. Knows no socket and no parser."""

import math
from dataclasses import dataclass

from sightline_server.settings import Settings

LINGER_S = 2.0
"""How long what a refused client still sends is read and dropped: closing on it at once could lose it the answer."""
LINGER_BYTES = 2**20
MAX_HEADERS = 128
MAX_URL = 8192
"""Bytes. No route takes a parameter that is longer than a name."""
FRAMING_SLACK = 2**14
"""Bytes of chunk sizes, extensions and trailers that a body may have on top of as many as it has of content."""


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """All times in seconds, all sizes in bytes."""

    header_s: float
    """From the first byte of a request, or from connecting, to the end of its headers."""
    body_s: float
    """From there to the end of the body; the application is to have refused it before."""
    idle_s: float
    """Between an answer and the next request."""
    stall_s: float
    """How long a full buffer of answers may wait for its reader."""
    header_bytes: int
    connections: int
    connections_per_address: float


def limits_of(settings: Settings, *, open_files: int) -> HttpLimits:
    """``open_files`` is how many this process may have; a quarter of them is left for everything else."""
    return HttpLimits(
        header_s=settings.header_timeout_s,
        # The application answers 408 at its own deadline and then listens a while; this is for bodies it has left.
        body_s=settings.body_timeout_s + 10,
        idle_s=settings.keep_alive_s,
        stall_s=settings.stall_timeout_s,
        header_bytes=settings.max_header_kb * 1024,
        connections=min(settings.max_connections, max(1, open_files * 3 // 4)),
        connections_per_address=settings.max_connections_per_address or math.inf,
    )
