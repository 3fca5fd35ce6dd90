"""Some hundred hostile requests against the true app on a true socket: each answer is one that may be given."""

import json
from itertools import islice

import pytest
from api_calls import running
from fakes import FakeEngine, fake_app
from hostile.answers import RawResponse, exchange, parse, problem_with
from hostile.requests import KINDS, hostile_requests

ERROR = {"error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": "invalid_value"}}


@pytest.mark.parametrize("seed", range(3))
def test_J1_J3_J5_J9_O7_O11_no_bytes_make_the_server_fail(seed: int) -> None:
    engine = FakeEngine()
    with running(fake_app(engine, header_timeout_s=2.0, body_timeout_s=2.0)) as address:
        host, _, port = address.removeprefix("http://").rpartition(":")
        for sent in hostile_requests(seed, 100):
            answer = exchange((host, int(port)), sent.raw, timeout_s=20 if sent.answered else 0.05)
            if answer.status is not None or sent.answered:
                assert problem_with(answer) is None, (sent.kind, sent.raw[:500])
        honest = exchange((host, int(port)), b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert honest.status == 200
    assert engine.live == set()


def test_a_seed_says_which_requests() -> None:
    one, again, other = (list(hostile_requests(seed, 200)) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert {sent.kind for sent in one} == set(KINDS)
    assert len({sent.raw for sent in one}) > 150
    assert max(len(sent.raw) for sent in hostile_requests(3, 1000)) < 2 * 2**20, "sizes have tests of their own"
    assert list(islice(hostile_requests(1, 10**9), 200)) == one


def error(status: int = 400, body: object = ERROR, kind: str = "application/json", **headers: str) -> RawResponse:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return RawResponse(status, {"content-type": kind, "x-request-id": "r", **headers}, raw, complete=True)


def test_the_oracle_takes_what_is_right() -> None:
    assert problem_with(error()) is None
    assert problem_with(error(200, {"ok": True})) is None
    assert problem_with(error(200, b'data: {"a":1}\n\ndata: [DONE]\n\n', "text/event-stream")) is None
    assert problem_with(error(200, b'data: {"error":{}}\n\n', "text/event-stream")) is None


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (RawResponse(None), "no status line"),
        (error(500), "status 500"),
        (error(422), "status 422"),
        (error(body=b"no"), "no JSON"),
        (error(body={"detail": "x"}), "not the error object"),
        (error(kind="text/plain"), "of type 'text/plain'"),
        (error(body={"error": ERROR["error"] | {"message": ""}}), "has 0 characters"),
        (error(body={"error": ERROR["error"] | {"message": "at 0x7f00aa11bb22"}}), "tells of the inside"),
        (error(body={"error": ERROR["error"] | {"message": "/home/x/y"}}), "tells of the inside"),
        (error(503), "for the reason 'invalid_value'"),
        (error(200, ERROR), "a 200 with an 'error'"),
        (error(200, b"data: {}\n\n", "text/event-stream"), "without [DONE]"),
        (error(200, b'data: {"error":{}}\n\ndata: [DONE]\n\n', "text/event-stream"), "ends with [DONE]"),
        (error(200, b"data: {}\n\ndata: [DONE]\n", "text/event-stream"), "within an event"),
        (RawResponse(400, {"content-type": "application/json"}, b"{}", complete=False), "ends early"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_oracle_sees_what_is_wrong(wrong: RawResponse, told: str) -> None:
    assert told in (problem_with(wrong) or "")


def test_answers_are_read_from_bytes() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n"
    assert not parse(chunked).complete
    assert parse(chunked + b"0\r\n\r\n").body == b"abc"
    assert parse(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n").status == 204
    assert parse(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", is_head=True).complete
    assert parse(b"<html>").status is None
