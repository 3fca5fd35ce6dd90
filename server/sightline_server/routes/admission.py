"""Whether there is room for another request, told before anything of it is read, decoded or tokenized."""

from collections.abc import Iterator
from contextlib import contextmanager

from sightline_server.engine.client import EngineClient
from sightline_server.errors import Unavailable
from sightline_server.settings import Settings

OVERLOADED_RETRY_S = 2.0
STARTING_RETRY_S = 5.0


class Admission:
    def __init__(self, engine: EngineClient, settings: Settings) -> None:
        self._engine = engine
        self._max_queue = settings.max_queue
        self._preparing = 0

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Holds a place in the queue until the engine has the request. Raises Unavailable."""
        self.check()
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    def check(self) -> None:
        """Raises Unavailable when there is no room now."""
        engine = self._engine
        if not engine.ready:
            if engine.info is None:
                raise Unavailable(
                    "The engine is still loading the model. Try again shortly.",
                    code="engine_starting",
                    retry_after_s=STARTING_RETRY_S,
                )
            raise Unavailable(
                "The engine is restarting. Try again shortly.",
                code="engine_restarting",
                retry_after_s=STARTING_RETRY_S,
            )
        waiting = engine.stats.waiting + self._preparing
        if waiting >= self._max_queue:
            raise Unavailable(
                f"{waiting} requests are waiting, and at most {self._max_queue} may. Try again later.",
                retry_after_s=OVERLOADED_RETRY_S,
            )
