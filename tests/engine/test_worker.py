"""The engine process's loop without a process: what can't be read or told ends one request, not the engine."""

from typing import Any

import msgspec
import numpy as np
import pytest
from engines import make_request
from worker_engines import CountingEngine

from sightline_server.engine import wire
from sightline_server.engine.types import FinishEvent, FinishReason, Prompt, Request, TokenEvent
from sightline_server.engine.worker import EngineLoop, Stopped


class Line:
    """Stands in for both sockets: commands to take, reports sent."""

    def __init__(self) -> None:
        self.commands: list[list[bytes]] = []
        self.events: list[Any] = []
        self.adds_taken = 0

    def poll(self, timeout: int | None) -> bool:
        if not self.commands and timeout is None:
            self.commands.append([wire.encode(wire.Stop())])
        return bool(self.commands)

    def recv_multipart(self) -> list[bytes]:
        return self.commands.pop(0)

    def send(self, frame: bytes) -> None:
        report = wire.decode_report(frame)
        assert isinstance(report, wire.StepReport)
        self.events += report.events
        self.adds_taken = report.adds_taken


class Heart:
    step_began: float | None = None


def serve(engine: CountingEngine, commands: list[list[bytes]]) -> Line:
    line = Line()
    line.commands = commands
    loop = EngineLoop(line, line, Heart())  # type: ignore[arg-type]
    with pytest.raises(Stopped):
        loop.run(engine)
    return line


def add(name: str, **changed: Any) -> list[bytes]:
    message = msgspec.msgpack.decode(wire.encode(wire.Add(request(name))))
    message["request"] |= changed
    return [msgspec.msgpack.encode(message)]


def request(name: str, images: tuple[Any, ...] = ()) -> Request:
    return make_request(name, Prompt((5,), images), max_tokens=3)


def ends(line: Line) -> dict[str, FinishReason]:
    found = [(event.request_id, event.reason) for event in line.events if isinstance(event, FinishEvent)]
    assert len(found) == len(dict(found)), f"a request ended twice: {found}"
    return dict(found)


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": {"token_ids": ["five"]}},
        {"sampling": {"max_tokens": 1.5}},
        {"sampling": None},
        {"cache_salt": 7},
    ],
)
def test_E3_a_request_that_cannot_be_read_ends_alone(changed: dict[str, Any]) -> None:
    line = serve(CountingEngine(), [add("before"), add("odd", **changed), add("after")])
    assert ends(line) == {
        "before": FinishReason.LENGTH,
        "odd": FinishReason.ERROR,
        "after": FinishReason.LENGTH,
    }
    odd = next(event for event in line.events if event.request_id == "odd")
    assert odd.error_code == "server_error"
    assert line.adds_taken == 3


def test_E3_pixels_that_cannot_be_read_end_their_request_alone() -> None:
    engine = CountingEngine()
    span = {"start": 0, "length": 1, "digest": b"d"}
    head, _ = wire.encode_pixels("odd", b"d", np.zeros((2, 2, 3), np.uint8))
    line = serve(engine, [add("odd", prompt={"token_ids": [5], "images": [span]}), add("fine"), [head, b"too short"]])
    assert ends(line) == {"odd": FinishReason.ERROR, "fine": FinishReason.LENGTH}


@pytest.mark.parametrize("frame", [b"\xc1", msgspec.msgpack.encode({"type": "add"}), msgspec.msgpack.encode([1])])
def test_E3_bytes_that_are_nobodys_end_the_engine(frame: bytes) -> None:
    line = Line()
    line.commands = [[frame]]
    loop = EngineLoop(line, line, Heart())  # type: ignore[arg-type]
    with pytest.raises(wire.WireError):
        loop.run(CountingEngine())


class Rambling(CountingEngine):
    """Gives one request a token that no message can hold."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step(self) -> list[Any]:
        return [
            TokenEvent("odd", 2**70)
            if isinstance(event, TokenEvent) and (event.request_id, event.token_id) == ("odd", self.at)
            else event
            for event in super().step()
        ]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_E3_what_cannot_be_told_ends_its_request_alone(at: int) -> None:
    """Its last token comes together with its end."""
    line = serve(Rambling(at), [add("fine"), add("odd")])
    assert ends(line) == {"fine": FinishReason.LENGTH, "odd": FinishReason.ERROR}
    told = [event.token_id for event in line.events if isinstance(event, TokenEvent) and event.request_id == "odd"]
    assert told == list(range(at))
    assert [e.token_id for e in line.events if isinstance(e, TokenEvent) and e.request_id == "fine"] == [0, 1, 2]
