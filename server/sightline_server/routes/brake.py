"""Makes a client wait for its refusals once it collects many, so that sending nonsense as fast as it is answered costs
the others little.

Pure ASGI. Knows addresses, statuses and a clock. Knows nothing of what was wrong; answers that are no refusals never
wait, nor do refusals for want of room (429, 503), which must come fast.
"""

import asyncio
from collections import OrderedDict

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sightline_server.http.door import network_of

BURST = 32
"""Refusals in a row that one address gets at once."""
RATE = 16.0
"""Refusals a second that it then goes on getting at once."""
MAX_ADDRESSES = 4096
MAX_WAITING = 256
"""Refusals held back at one time: beyond that, holding on to them would be the greater cost."""


class RefusalBrake:
    """Holds a refusal back for ``delay_s`` when its address is over its allowance. 0: never.

    A token bucket an address (https://en.wikipedia.org/wiki/Token_bucket). Behind a reverse proxy all clients share
    one; only refusals wait, so honest clients don't notice.
    """

    def __init__(self, app: ASGIApp, delay_s: float) -> None:
        self._app = app
        self._delay_s = delay_s
        self._allowances: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._delay_s:
            await self._app(scope, receive, send)
            return

        async def send_refusals_slowly(message: Message) -> None:
            if message["type"] == "http.response.start" and 400 <= message["status"] < 500 and message["status"] != 429:
                client = scope.get("client")
                await self._hold_back(network_of(client[0]) if client else "")
            await send(message)

        await self._app(scope, receive, send_refusals_slowly)

    async def _hold_back(self, address: str) -> None:
        if self._take(address, asyncio.get_running_loop().time()) or self._waiting >= MAX_WAITING:
            return
        self._waiting += 1
        try:
            await asyncio.sleep(self._delay_s)
        finally:
            self._waiting -= 1

    def _take(self, address: str, now: float) -> bool:
        """Whether ``address`` may have one more refusal at once."""
        left, then = self._allowances.pop(address, (float(BURST), now))
        left = min(BURST, left + (now - then) * RATE)
        self._allowances[address] = (left - 1 if left >= 1 else left, now)
        if len(self._allowances) > MAX_ADDRESSES:
            self._allowances.popitem(last=False)
        return left >= 1
