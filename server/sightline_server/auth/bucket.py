"""A token bucket: so much a minute, at most a minute's worth at once. Knows numbers, and the time it is told."""


class Bucket:
    """Full at first. What is used may be corrected afterwards, even below nothing: a debt is waited off.

    Every call takes the time in seconds by a clock that never goes back.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self.size = float(per_minute)
        self._level = self.size
        self._told = now

    def level(self, now: float) -> float:
        """What is left; negative is a debt."""
        elapsed = max(0.0, now - self._told)
        self._told = max(self._told, now)
        self._level = min(self.size, self._level + elapsed * self.size / 60)
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` is there; 0 when it is, infinity when it never will be."""
        if amount > self.size:
            return float("inf")
        missing = amount - self.level(now)
        # A remainder of rounding is no reason to wait.
        return missing * 60 / self.size if missing > 1e-9 * self.size else 0.0

    def use(self, amount: float, now: float) -> None:
        """Take ``amount`` whether it is there or not; a negative one is given back."""
        self._level = min(self.size, self.level(now) - amount)

    def full_in_s(self, now: float) -> float:
        return (self.size - self.level(now)) * 60 / self.size
