"""Which request a failing step fails for: suspects run apart from all others, in ever smaller groups.

Knows errors, sequences and what they have drawn. Knows no plan, no device and no request's end: the engine runs the
groups and ends the one it is left with.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from sightline_server.engine.types import Sequence, SequenceStatus


@dataclass(frozen=True)
class Failure:
    """What is left of an error once it is gone."""

    code: str
    message: str
    """For the request's sender."""
    reason: str
    """For the log."""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        reason = f"{type(error).__name__}: {error}"
        if _is_out_of_memory(error):
            message = "The device ran out of memory on this request alone. Send fewer or shorter inputs."
            return cls("engine_oom", message, reason)
        return cls("server_error", "The engine failed on this request alone. Change it before trying again.", reason)


NOT_FINITE = Failure(
    "server_error",
    "The model's numbers for this request are not finite. Change its pictures or its text before trying again.",
    "its logits or embeddings are not finite, computed twice",
)


def is_beyond_containing(error: Exception) -> bool:
    """Whether nothing this process computes can be trusted any more: broken books, or a lost device."""
    if isinstance(error, torch.AcceleratorError):
        # Pinned memory and graphs are had from the driver itself, whose refusal leaves the device as it was.
        return not _is_out_of_memory(error)
    return isinstance(error, AssertionError)


def _is_out_of_memory(error: Exception) -> bool:
    """Torch has a class for its own allocator on a device; the driver, Triton and a CPU say it in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


class Probation:
    """Suspects in groups, the first of which runs now and alone.

    A group is through when each of its members has drawn a token, or ended: so every round of this brings every
    suspect forward, and ends. A group that fails is cut in two; one that is cut down to a single member is the culprit.
    """

    def __init__(self, suspects: Iterable[Sequence]) -> None:
        self._groups = [list(suspects)]
        self._drawn = [sequence.num_generated for sequence in self._groups[0]]

    @property
    def ids(self) -> frozenset[str]:
        """Whose turn it is; empty when all are through."""
        return frozenset(sequence.id for sequence in self._group)

    @property
    def is_through(self) -> bool:
        """Whether each of the group has got past the step that failed."""
        return all(
            sequence.status is SequenceStatus.FINISHED or sequence.num_generated > drawn
            for sequence, drawn in zip(self._group, self._drawn, strict=True)
        )

    def next_group(self) -> None:
        """The group is through: the next one's turn."""
        del self._groups[0]
        self._begin()

    def narrow(self) -> Sequence | None:
        """The group has failed. Return its only member, the culprit; or None, and the first half of it is next."""
        alive = [sequence for sequence in self._groups.pop(0) if sequence.status is not SequenceStatus.FINISHED]
        half = (len(alive) + 1) // 2
        if len(alive) > 1:
            self._groups[:0] = [alive[:half], alive[half:]]
        self._begin()
        return alive[0] if len(alive) == 1 else None

    @property
    def _group(self) -> Seq[Sequence]:
        return self._groups[0] if self._groups else ()

    def _begin(self) -> None:
        self._drawn = [sequence.num_generated for sequence in self._group]
