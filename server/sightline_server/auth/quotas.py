"""What each principal has used of its limits, and the refusal when one is reached.

Knows principals, counts and a monotonic clock. Knows no HTTP, no picture and no prompt: others count and tell.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from sightline_server.auth.bucket import Bucket
from sightline_server.auth.principal import Limits, Principal
from sightline_server.errors import RateLimited

_BUSY_RETRY_S = 1.0
MEGA = 1_000_000


class Quotas:
    """All accounts. Only principals with limits have one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    def account(self, principal: Principal) -> "Account":
        """The principal's account. Limits that have changed since begin with full buckets."""
        if principal.limits == Limits():
            return Account(Limits(), self._clock)
        known = self._accounts.get(principal.key_id)
        if known is None or known.limits != principal.limits:
            made = Account(principal.limits, self._clock)
            made.running = known.running if known else made.running
            self._accounts[principal.key_id] = known = made
        return known


class Running:
    """How many requests of one key are being answered; survives a change of its limits."""

    def __init__(self) -> None:
        self.count = 0


class Account:
    """One principal's buckets."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.running = Running()
        self._clock = clock
        now = clock()
        self._requests = _bucket(limits.requests_per_minute, now)
        self._tokens = _bucket(limits.tokens_per_minute, now)
        self._images = _bucket(limits.images_per_minute, now)
        self._megapixels = _bucket(limits.megapixels_per_minute, now)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count one request, and hold its place among those that run. Raises RateLimited."""
        running, most = self.running, self.limits.max_concurrent
        if most is not None and running.count >= most:
            raise RateLimited(
                f"Rate limit reached: {running.count} requests of this key are being answered, and at most {most} may "
                "be. Wait for one to end.",
                retry_after_s=_BUSY_RETRY_S,
            )
        # Before anything of the request is read: a key that is out of tokens or pixels has nothing to gain from it.
        for bucket, what in ((self._tokens, "tokens"), (self._images, "images"), (self._megapixels, "megapixels")):
            if bucket is not None and bucket.level(self._clock()) <= 0:
                self._refuse(bucket, min(1.0, bucket.size), what)
        self._take(self._requests, 1, "requests")
        running.count += 1
        try:
            yield
        finally:
            running.count -= 1

    def images(self, count: int) -> None:
        """Before any is decoded. Raises RateLimited."""
        self._take(self._images, count, "images")

    def pixels(self, count: int) -> None:
        """Before any is decoded; may leave a debt, which refuses the next request."""
        if self._megapixels is not None:
            self._megapixels.use(count / MEGA, self._clock())

    def reserve_tokens(self, prompt: int, answer: int) -> Callable[[int], None]:
        """Set aside the prompt's tokens and as many of the largest answer's as the limit holds at all.

        Call what is returned with the tokens that were used in the end. Raises RateLimited.
        """
        bucket = self._tokens
        if bucket is None:
            return lambda used: None
        held = max(float(prompt), min(float(prompt + answer), bucket.size))
        self._take(bucket, held, "tokens")
        return lambda used: bucket.use(used - held, self._clock())

    def headers(self) -> dict[str, str]:
        """OpenAI's, for the limits there are."""
        now, found = self._clock(), {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(int(bucket.size))
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now))))
                found[f"x-ratelimit-reset-{name}"] = duration(bucket.full_in_s(now))
        return found

    def _take(self, bucket: Bucket | None, amount: float, what: str) -> None:
        if bucket is None or amount == 0:
            return
        if bucket.wait_s(amount, self._clock()) > 0:
            self._refuse(bucket, amount, what)
        bucket.use(amount, self._clock())

    def _refuse(self, bucket: Bucket, amount: float, what: str) -> None:
        wait_s = bucket.wait_s(amount, self._clock())
        limit = f"Rate limit reached for {what} per minute: the limit of this key is {bucket.size:g}"
        if math.isinf(wait_s):
            raise RateLimited(f"{limit}, and this request needs {amount:g} at once. Send less.", should_retry=False)
        seconds = math.ceil(wait_s)
        raise RateLimited(f"{limit}. Try again in {seconds} s.", retry_after_s=seconds)


def _bucket(per_minute: float | None, now: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, now)


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``12ms``, ``1.5s``, ``6m0s``."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:g}s"
    return f"{minutes}m{text}" if minutes else text
