"""Whether there is room for another request, told before anything of it is read, decoded or tokenized.

Knows counts, and how many the engine says are waiting. Knows no body, no prompt and no clock.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from sightline_server.auth.keyring import Keyring
from sightline_server.auth.principal import Principal
from sightline_server.engine.client import EngineClient
from sightline_server.errors import RateLimited, Unavailable
from sightline_server.settings import Settings

OVERLOADED_RETRY_S = 2.0
STARTING_RETRY_S = 5.0


class Ticket:
    """One request's places in the queue, from when its body has arrived to its first token."""

    def __init__(self, admission: "Admission", principal: Principal) -> None:
        self._admission = admission
        self._principal = principal
        self._places = 0
        self._preparing = 0

    def take(self, places: int) -> None:
        """Raises RateLimited or Unavailable."""
        self._admission.check(self._principal, places)
        self._add(places, places)

    def submitted(self) -> None:
        """The engine has it: from here on the engine's own figures count it."""
        self._add(0, -self._preparing)

    def leave(self) -> None:
        """It waits no more."""
        self._add(-self._places, -self._preparing)

    def _add(self, places: int, preparing: int) -> None:
        self._places += places
        self._preparing += preparing
        self._admission.count(self._principal, places, preparing)


class Admission:
    def __init__(self, engine: EngineClient, settings: Settings, keyring: Keyring) -> None:
        self._engine = engine
        self._keyring = keyring
        self._max_queue = settings.max_queue
        self._preparing = 0
        self._without_token: Counter[str] = Counter()

    @contextmanager
    def enter(self, principal: Principal) -> Iterator[Ticket]:
        """Checks that there is room now, and gives up whatever places the ticket has taken in the end.

        Raises Unavailable, and RateLimited for a principal whose own requests are what fills the queue.
        """
        self._check_engine()
        self.check(principal, 1)
        ticket = Ticket(self, principal)
        try:
            yield ticket
        finally:
            ticket.leave()

    def check(self, principal: Principal, places: int) -> None:
        """Raises Unavailable when the queue lacks so many places, RateLimited when they are kept for other keys."""
        waiting = self._waiting()
        if waiting + places > self._max_queue:
            raise Unavailable(
                f"{waiting} requests are waiting, and at most {self._max_queue} may. Try again later.",
                retry_after_s=OVERLOADED_RETRY_S,
            )
        # The first half of the queue is anybody's. In the second a key may have as many places as it leaves free, so
        # that one that floods never takes the last of them.
        own = self._without_token[principal.key_id]
        if self._keyring.num_keys > 1 and waiting * 2 >= self._max_queue and own + places > self._max_queue - waiting:
            raise RateLimited(
                f"{own} requests of this key are waiting, and the rest of the queue is kept for other keys. Try again "
                "later.",
                retry_after_s=OVERLOADED_RETRY_S,
            )

    def count(self, principal: Principal, places: int, preparing: int) -> None:
        self._preparing += preparing
        self._without_token[principal.key_id] += places
        if self._without_token[principal.key_id] == 0:
            del self._without_token[principal.key_id]

    def _waiting(self) -> int:
        # The engine's figures are those of its last step: of a burst, all it doesn't know yet is waiting.
        stats = self._engine.stats
        return max(stats.waiting + self._preparing, self._without_token.total() - stats.running)

    def _check_engine(self) -> None:
        engine = self._engine
        if engine.ready:
            return
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
