"""Every message comes back as it went, and nothing else is taken for one."""

import msgspec
import numpy as np
import pytest

from sightline_server.engine import wire
from sightline_server.engine.types import (
    EngineInfo,
    EngineStats,
    FinishEvent,
    FinishReason,
    ImageSpan,
    PixelsWanted,
    Prompt,
    Request,
    SamplingParams,
    TokenEvent,
    TopLogprob,
    Usage,
)
from sightline_server.settings import Settings, replace

REQUEST = Request(
    id="chatcmpl-1",
    prompt=Prompt(tuple(range(300)), (ImageSpan(4, 144, b"\x00\xff" * 16),)),
    sampling=SamplingParams(max_tokens=5, seed=2**64 - 1, logit_bias={7: -100.0, 0: 0.5}, stop_token_ids=(2,)),
    cache_salt=b"tenant",
    arrived=1.5,
)
INFO = EngineInfo(
    device="cpu",
    dtype="float32",
    parameters=10,
    weight_bytes=40,
    num_blocks=8,
    block_size=16,
    max_model_len=128,
    load_seconds=0.5,
)


@pytest.mark.parametrize(
    "command",
    [
        wire.Start("/models/demo", replace(Settings(), served_model_name=("a", "b"), dtype="bfloat16")),
        wire.Add(REQUEST),
        wire.Abort("chatcmpl-1"),
        wire.FailImage("chatcmpl-1", b"\x80", "invalid_image", "Not an image: ünïcödé."),
        wire.Stop(),
    ],
    ids=lambda command: type(command).__name__,
)
def test_commands_come_back_as_they_went(command: wire.Command) -> None:
    assert wire.decode_command([wire.encode(command)]) == (command, None)


@pytest.mark.parametrize(
    "report",
    [
        wire.Hello(),
        wire.Progress("weights", 0.25),
        wire.Ready(INFO),
        wire.StartFailed("config.json is missing."),
        wire.Heartbeat(1.25),
        wire.StepReport(
            [
                TokenEvent("a", 5, -0.5, (TopLogprob(5, -0.5), TopLogprob(6, -1.5))),
                TokenEvent("b", 0),
                PixelsWanted("b", b"\x00" * 32),
                FinishEvent("a", FinishReason.ERROR, Usage(1, 2, 3, 4), "engine_oom", "Too large."),
            ],
            EngineStats(running=1, steps_total=2**40),
            adds_taken=3,
        ),
    ],
    ids=lambda report: type(report).__name__,
)
def test_reports_come_back_as_they_went(report: wire.Report) -> None:
    assert wire.decode_report(wire.encode(report)) == report


def test_pixels_travel_beside_the_message_byte_for_byte() -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    head, body = wire.encode_pixels("r", b"digest", pixels)
    assert len(head) < 64
    command, received = wire.decode_command([head, bytes(body)])
    assert command == wire.Provide("r", b"digest", height=5, width=7)
    assert received is not None
    np.testing.assert_array_equal(received, pixels)
    received[0, 0, 0] = 9  # a copy of its own: torch warns about read-only arrays


def test_pixels_that_are_not_contiguous_are_sent_in_order() -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)[::-1, ::2]
    _, received = wire.decode_command([bytes(frame) for frame in wire.encode_pixels("r", b"d", pixels)])
    assert received is not None
    np.testing.assert_array_equal(received, pixels)


@pytest.mark.parametrize("body", [b"", b"\x00" * 104, b"\x00" * 106])
def test_pixels_of_another_size_than_announced_are_refused(body: bytes) -> None:
    head, _ = wire.encode_pixels("r", b"d", np.zeros((5, 7, 3), np.uint8))
    with pytest.raises(wire.WireError, match="7x5"):
        wire.decode_command([head, body])
    with pytest.raises(wire.WireError):
        wire.decode_command([head])


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"type": "shell", "run": "id"})])
def test_other_bytes_are_no_message(frame: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode_report(frame)
    with pytest.raises(wire.WireError):
        wire.decode_command([frame])
