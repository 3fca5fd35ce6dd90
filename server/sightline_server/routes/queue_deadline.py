"""Ends a request that has queued for too long. Knows the clock and whether others are queueing; no content."""

import asyncio

from sightline_server.chat.generation import Generation
from sightline_server.engine.client import EngineClient
from sightline_server.errors import Unavailable

LOOK_AGAIN_S = 1.0
TIMEOUT_RETRY_S = 5.0


class QueueDeadline:
    """Fails ``generation`` when it has no token after ``timeout_s`` and the engine has a queue; 0 waits for ever.

    Without a queue it is the prompt itself that takes so long, and nobody would be served sooner.
    """

    def __init__(self, generation: Generation, engine: EngineClient, timeout_s: float) -> None:
        self._generation = generation
        self._engine = engine
        self._timeout_s = timeout_s
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._look) if timeout_s else None

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        if self._generation.begun:
            return
        if self._engine.stats.waiting == 0:
            self._timer = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self._look)
            return
        self._generation.fail(
            Unavailable(
                f"This request waited {self._timeout_s:g} seconds without a first token. Try again later.",
                code="queue_timeout",
                retry_after_s=TIMEOUT_RETRY_S,
            )
        )
