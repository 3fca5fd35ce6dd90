"""One HTTP request's charges to its key, and the headers that tell what is left. Knows counts; no content."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import Request

from sightline_server.routes.context import context_of, principal_of


class Charges:
    """Every method raises RateLimited when the key's limit is reached. Made once a request."""

    def __init__(self, request: Request) -> None:
        self._account = context_of(request).quotas.account(principal_of(request))
        self._until_answered = request.state.until_answered
        self._headers: dict[str, str] = request.state.answer_headers

    def request(self) -> None:
        """The request itself, and its place among those that run until it is answered."""
        with self._telling():
            self._until_answered.enter_context(self._account.request())

    def images(self, count: int) -> None:
        self._account.images(count)

    def pixels(self, count: int) -> None:
        self._account.pixels(count)

    def tokens(self, prompt: int, answer: int, used: Callable[[], int]) -> None:
        """Reserves prompt and longest answer; once answered, charges what ``used`` tells."""
        with self._telling():
            settle = self._account.reserve_tokens(prompt, answer)
        self._until_answered.callback(lambda: settle(used()))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._headers.update(self._account.headers())
