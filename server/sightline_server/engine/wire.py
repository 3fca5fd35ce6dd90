"""What the API process and the engine process say to each other: msgspec structs, encoded as MessagePack.

Knows the messages and their two codecs. Knows no socket, no process and no engine. Pixels never stand inside a
message: they travel as a second frame of raw bytes beside the ``Provide`` that announces them.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from sightline_models.images import Pixels
from sightline_server.engine.types import EngineInfo, EngineStats, Event, Request
from sightline_server.settings import Settings

Frame = bytes | memoryview


class WireError(ValueError):
    """Bytes that are no message of this protocol: the two processes run different versions, or memory is broken."""


# From the API process to the engine process


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Load this checkpoint. The first command, sent once; the settings hold no secrets."""

    folder: str
    settings: Settings


class Add(msgspec.Struct, frozen=True, tag="add"):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class Provide(msgspec.Struct, frozen=True, tag="provide"):
    """The answer to ``PixelsWanted``; the second frame holds ``height * width * 3`` bytes."""

    request_id: str
    digest: bytes
    height: int
    width: int


class FailImage(msgspec.Struct, frozen=True, tag="fail_image"):
    """The other answer to ``PixelsWanted``: there are none, and why."""

    request_id: str
    digest: bytes
    code: str
    message: str


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Exit now, with status 0. Requests still there are dropped."""


Command = Start | Add | Abort | Provide | FailImage | Stop


# From the engine process to the API process


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The process is up and connected, and waits for ``Start``."""


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """While loading: what is being done, and how much of it is done (0 to 1)."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    info: EngineInfo


class StartFailed(msgspec.Struct, frozen=True, tag="start_failed"):
    """Loading failed; the process exits. ``message`` is one sentence for the operator."""

    message: str


class StepReport(msgspec.Struct, frozen=True, tag="step"):
    """Everything one step has to tell."""

    events: Sequence[Event]
    stats: EngineStats
    adds_taken: int
    """How many ``Add`` commands this process had taken when ``stats`` was read, so that the other side can tell
    requests that are still under way to it from those the figures include."""


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Sent every second by a thread of its own, also in the middle of a step."""

    step_seconds: float
    """For how long the step under way has been running; 0 between steps."""


Report = Hello | Progress | Ready | StartFailed | StepReport | Heartbeat

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_report_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(message: Command | Report) -> bytes:
    """Raises WireError for what MessagePack can't hold: an integer of more than 64 bits, half a surrogate pair."""
    try:
        return _encoder.encode(message)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"A message holds what can't be sent: {error}") from error


def decode_report(frame: Frame) -> Report:
    """Raises WireError."""
    try:
        return _report_decoder.decode(frame)
    except msgspec.MsgspecError as error:
        raise WireError(f"The engine process sent no valid message: {error}") from error


def request_of(frames: Sequence[Frame]) -> tuple[str, str] | None:
    """Of a command that ``decode_command`` refuses: its tag and the one request it is for; None where that isn't sure.

    Only of commands that bring something for a request: one that doesn't arrive leaves that request alone unserved.
    """
    try:
        fields: Any = msgspec.msgpack.decode(frames[0])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    match fields:
        case {"type": "add", "request": {"id": str(request_id)}}:
            return "add", request_id
        case {"type": "provide", "request_id": str(request_id)}:
            return "provide", request_id
    return None


def encode_pixels(request_id: str, digest: bytes, pixels: np.ndarray[Any, Any]) -> tuple[bytes, memoryview]:
    """The two frames of a ``Provide``. The second one is a view of ``pixels`` where these are contiguous."""
    assert pixels.dtype == np.uint8, f"pixels are uint8, not {pixels.dtype}"
    assert pixels.shape[2:] == (3,), f"pixels are [height, width, 3], not {pixels.shape}"
    height, width, _ = pixels.shape
    head = _encoder.encode(Provide(request_id, digest, height, width))
    return head, np.ascontiguousarray(pixels).data.cast("B")


def decode_command(frames: Sequence[Frame]) -> tuple[Command, Pixels | None]:
    """The command, with the pixels where it is a ``Provide``; these are a copy, the engine's to keep and to write to.

    Raises WireError.
    """
    try:
        command = _command_decoder.decode(frames[0])
    except msgspec.MsgspecError as error:
        raise WireError(f"The API process sent no valid message: {error}") from error
    if not isinstance(command, Provide):
        return command, None
    shape = (command.height, command.width, 3)
    if len(frames) != 2 or min(shape) < 1 or memoryview(frames[1]).nbytes != shape[0] * shape[1] * 3:
        raise WireError(f"Pixels of {shape[1]}x{shape[0]} came without the {shape[0] * shape[1] * 3} bytes they need.")
    return command, np.frombuffer(frames[1], dtype=np.uint8).reshape(shape).copy()
