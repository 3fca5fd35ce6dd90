"""Requests between submit and their end: who is held here, whom the engine process has, and who survives its death.

After a crash, those it may be due to go again in ever smaller company, until a crash has one culprit. Knows requests
and counts. Knows no process, no socket and no time.
"""

import asyncio
import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property

from sightline_models.images import Pixels
from sightline_server.engine.suspects import ALONE_AFTER, Suspects, fingerprint
from sightline_server.engine.types import FinishEvent, FinishReason, Request, TokenEvent, Usage

PixelSource = Callable[[bytes], Awaitable[Pixels]]
"""digest -> uint8 [height, width, 3]; raises ImageError."""


class Probation(enum.Enum):
    """What may be sent to the engine beside a request, and until when, for the crashes it was in."""

    NONE = "none"
    FIRST_TOKEN = "first token"
    """Nothing, until its first token."""
    COMPANY = "company"
    """A few others on the same terms, until their ends."""
    ALONE = "alone"
    """Nothing, until its end."""


MOST_COMPANY = 8
"""What is tried together after two crashes: enough for an engine to be worth its while, few enough to go alone next."""


@dataclass(eq=False)
class Flight:
    """A request between submit and its FinishEvent."""

    request: Request
    pixels: PixelSource
    # Holds at most the request's max_tokens events and the end: what bounds the answer bounds the queue.
    events: asyncio.Queue[TokenEvent | FinishEvent] = field(default_factory=asyncio.Queue)
    tokens: int = 0
    probation: Probation = Probation.NONE
    abort_sent: bool = False
    left: bool = False
    """Whether nobody reads its events any more."""
    errands: set[asyncio.Task[None]] = field(default_factory=set)

    @cached_property
    def fingerprint(self) -> bytes:
        return fingerprint(self.request)

    def end(self, reason: FinishReason, code: str | None = None, message: str | None = None) -> None:
        """Gives the caller the end that no engine will tell."""
        prompt = self.request.prompt
        usage = Usage(len(prompt.token_ids), self.tokens, 0, prompt.num_image_tokens)
        self.events.put_nowait(FinishEvent(self.request.id, reason, usage, code, message))

    def cancel_errands(self) -> None:
        for errand in self.errands:
            errand.cancel()


class Flights:
    def __init__(self, suspects: Suspects) -> None:
        self.suspects = suspects
        self._held: dict[str, Flight] = {}
        self._aboard: dict[str, Flight] = {}

    @property
    def num_held(self) -> int:
        return len(self._held)

    def __len__(self) -> int:
        return len(self._held) + len(self._aboard)

    def hold(self, request: Request, pixels: PixelSource) -> Flight:
        """A new flight, last in line."""
        assert self.get(request.id) is None, f"request {request.id} is in flight already"
        flight = self._held[request.id] = Flight(request, pixels)
        return flight

    def get(self, request_id: str) -> Flight | None:
        return self._aboard.get(request_id) or self._held.get(request_id)

    def is_held(self, request_id: str) -> bool:
        return request_id in self._held

    def board(self) -> list[Flight]:
        """Those whose turn it is now, in order; from here on the engine process has them.

        One that was in a crash goes when all that the engine has have begun, and nothing follows it until it has, too.
        What crashes the engine later is among those that were in two: they go a few at a time, and then one by one.
        A company is made of all that wait, so that those between them wait for one company and not for many.
        """
        boarding: list[Flight] = []
        is_forming = not self._aboard
        for flight in list(self._held.values()):
            probation = self._probation_of(flight)
            if self._may_join(probation) and (is_forming or probation is not Probation.COMPANY):
                flight.probation = probation
                del self._held[flight.request.id]
                self._aboard[flight.request.id] = flight
                boarding.append(flight)
            elif not (boarding and boarding[0].probation is Probation.COMPANY):
                break
        return boarding

    def _probation_of(self, flight: Flight) -> Probation:
        if not self.suspects:
            return Probation.NONE
        crashes = self.suspects.crashes(flight.fingerprint)
        # One that another engine has found guilty since it was held.
        if crashes >= ALONE_AFTER or self.suspects.is_guilty(flight.fingerprint):
            return Probation.ALONE
        return (Probation.NONE, Probation.FIRST_TOKEN, Probation.COMPANY)[crashes]

    def _may_join(self, probation: Probation) -> bool:
        aboard = self._aboard.values()
        match probation:
            case Probation.ALONE:
                return not aboard
            case Probation.COMPANY:
                return len(aboard) < MOST_COMPANY and all(other.probation is probation for other in aboard)
            case Probation.FIRST_TOKEN:
                return all(other.probation is Probation.NONE and other.tokens for other in aboard)
        return all(other.probation is Probation.NONE for other in aboard)

    def note_token(self, flight: Flight) -> None:
        flight.tokens += 1
        if flight.probation is Probation.FIRST_TOKEN:
            flight.probation = Probation.NONE

    def leave(self, request_id: str) -> None:
        """Its caller is gone. What the engine has stays aboard until the engine says its end: it may still crash it."""
        flight = self.get(request_id)
        if flight is None:
            return
        flight.left = True
        flight.cancel_errands()
        self._held.pop(request_id, None)

    def land(self, request_id: str) -> None:
        """Forgets a flight that has ended. Nothing happens for one that has landed."""
        flight = self._held.pop(request_id, None) or self._aboard.pop(request_id, None)
        if flight is not None:
            flight.cancel_errands()

    def crash(self) -> tuple[list[Flight], list[Flight]]:
        """The engine process died. Those that had begun, or were to be aborted, are lost; one that was there alone, and
        in a crash before, is refused. Takes off and returns both; holds the others, first in line."""
        aboard = list(self._aboard.values())
        tried = [flight.fingerprint for flight in aboard if flight.probation is not Probation.NONE]
        self.suspects.note_crash([flight.fingerprint for flight in aboard], tried)
        self._held = self._aboard | self._held
        self._aboard = {}
        lost, refused = [], []
        for flight in list(self._held.values()):
            flight.cancel_errands()
            if self.suspects.is_guilty(flight.fingerprint):
                refused.append(flight)
            elif flight.tokens or flight.abort_sent:
                lost.append(flight)
            else:
                continue
            del self._held[flight.request.id]
        return lost, refused

    def take_all(self) -> list[Flight]:
        """Takes every flight off, wherever it is."""
        flights = [*self._aboard.values(), *self._held.values()]
        for flight in flights:
            self.land(flight.request.id)
        return flights
