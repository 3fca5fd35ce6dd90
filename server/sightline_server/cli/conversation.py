"""A conversation as the API wants it repeated each turn, and as it is saved. Knows no terminal and no network."""

from collections.abc import Sequence
from typing import Any

from sightline_server.cli.pictures import Picture

Message = dict[str, Any]


def user_message(question: str, pictures: Sequence[Picture]) -> Message:
    """One turn of the user: the pictures in order, then the question, as LLaVA-style models were trained."""
    if not pictures:
        return {"role": "user", "content": question}
    parts = [picture.part() for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def opening(system: str) -> list[Message]:
    """The messages before the first turn."""
    return [{"role": "system", "content": system}] if system else []


class Conversation:
    """The turns so far, and the pictures that wait for the next question."""

    def __init__(self, *, system: str = "", pictures: Sequence[Picture] = ()) -> None:
        self.system = system
        self.waiting = list(pictures)
        self.sent: list[Picture] = []
        self._turns: list[Message] = []

    def attach(self, picture: Picture) -> bool:
        """Whether the picture was new: one that already waits isn't attached twice."""
        if any(other.data == picture.data for other in self.waiting):
            return False
        self.waiting.append(picture)
        return True

    def detach(self) -> None:
        self.waiting.clear()

    def clear(self) -> None:
        """Forget all turns and pictures. The system message stays."""
        self.waiting.clear()
        self.sent.clear()
        self._turns.clear()

    def ask(self, question: str) -> list[Message]:
        """The messages of a request for the answer to ``question``; nothing is kept before ``answered``."""
        return [*opening(self.system), *self._turns, user_message(question, self.waiting)]

    def answered(self, question: str, answer: str) -> None:
        """Keep a finished turn; the waiting pictures are part of it now."""
        self._turns += [user_message(question, self.waiting), {"role": "assistant", "content": answer}]
        self.sent += self.waiting
        self.waiting = []

    @property
    def messages(self) -> list[Message]:
        """All finished turns, the system message in front."""
        return [*opening(self.system), *self._turns]

    def __len__(self) -> int:
        """Finished turns."""
        return len(self._turns) // 2
