"""Over a true socket, in bytes: deadlines, caps, smuggling and what isn't HTTP/1.1 at all."""

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import pytest
from api_calls import CHAT, chat_body, running
from fakes import FakeEngine, fake_app
from hostile.answers import RawResponse, exchange, problem_with

from sightline_server.cli.lifetime import SEND_BUFFER
from sightline_server.http.limits import LINGER_BYTES, MAX_HEADERS, MAX_URL

BODY = json.dumps(chat_body()).encode()


@contextmanager
def server(engine: FakeEngine | None = None, **settings: Any) -> Iterator[tuple[str, int]]:
    with running(fake_app(engine, **settings)) as address:
        host, _, port = address.removeprefix("http://").rpartition(":")
        yield host, int(port)


def head(line: str = "GET /health HTTP/1.1", *headers: str, host: str = "localhost") -> bytes:
    return "\r\n".join([line, f"Host: {host}", *headers, "", ""]).encode("latin-1")


def post(*headers: str, body: bytes = BODY) -> bytes:
    return head(f"POST {CHAT} HTTP/1.1", "Content-Type: application/json", *headers) + body


def code_of(response: RawResponse) -> str:
    return str(json.loads(response.body)["error"]["code"])


def refused(address: tuple[str, int], raw: bytes) -> RawResponse:
    """The answer to ``raw``, which is to be an error after which the server closes."""
    response = exchange(address, raw, waits_for_close=True)
    assert problem_with(response) is None, raw[:80]
    assert response.headers["connection"] == "close"
    assert response.closed
    return response


CHUNKED = "Transfer-Encoding: chunked"
SMUGGLED = {
    "a length and chunks": post(f"Content-Length: {len(BODY)}", CHUNKED),
    "chunks and a length": post(CHUNKED, "Content-Length: 5", body=b"0\r\n\r\n"),
    "two lengths": post(f"Content-Length: {len(BODY)}", "Content-Length: 3"),
    "one length twice": post(f"Content-Length: {len(BODY)}", f"Content-Length: {len(BODY)}"),
    "a list of lengths": post(f"Content-Length: {len(BODY)}, {len(BODY)}"),
    "a signed length": post(f"Content-Length: +{len(BODY)}"),
    "a hexadecimal length": post(f"Content-Length: {len(BODY):#x}"),
    "a length beyond 64 bits": post("Content-Length: 99999999999999999999"),
    "two encodings": post(CHUNKED, CHUNKED, body=b"0\r\n\r\n"),
    "an encoding behind chunked": post("Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n"),
    "an encoding before chunked": post("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "nearly chunked": post("Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
    "chunks in HTTP/1.0": head(f"POST {CHAT} HTTP/1.0", CHUNKED) + b"0\r\n\r\n",
    "a space before the colon": post("Transfer-Encoding : chunked", body=b"0\r\n\r\n"),
    "a bare line feed": b"GET /health HTTP/1.1\nHost: localhost\n\n",
    "a bare line feed between headers": head("GET /health HTTP/1.1", "X: a\nY: b"),
    "a bare return between headers": head("GET /health HTTP/1.1", "X: a\rY: b"),
    "a folded header": head("GET /health HTTP/1.1", "X: a\r\n b"),
    "a header that starts with a space": head("GET /health HTTP/1.1", " X: a"),
    "NUL in a header": head("GET /health HTTP/1.1", "X: a\0b"),
    "NUL in a name": head("GET /health HTTP/1.1", "X\0: a"),
    "a header without a name": head("GET /health HTTP/1.1", ": a"),
    "a chunk ended by a line feed": post(CHUNKED, body=b"5\nhello\r\n0\r\n\r\n"),
    "a chunk extension ended by a line feed": post(CHUNKED, body=b"5;a=b\nhello\r\n0\r\n\r\n"),
    "a negative chunk": post(CHUNKED, body=b"-5\r\nhello\r\n0\r\n\r\n"),
    "a chunk beyond 64 bits": post(CHUNKED, body=b"fffffffffffffffff\r\n"),
    "a chunk that is longer than told": post(CHUNKED, body=b"3\r\nhello\r\n0\r\n\r\n"),
    "a megabyte of chunk extension": post(CHUNKED, body=b"1;" + b"a" * 2**20 + b"\r\nx\r\n0\r\n\r\n"),
    "a megabyte of trailers": post(CHUNKED, body=b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 2**17 + b"\r\n"),
    "no version": b"GET /health\r\n\r\n",
    "a version to come": head("GET /health HTTP/2.0"),
    "a version between": head("GET /health HTTP/1.2"),
}


@pytest.mark.parametrize("raw", SMUGGLED.values(), ids=SMUGGLED.keys())
def test_O7_what_two_programs_could_read_in_two_ways(raw: bytes) -> None:
    engine = FakeEngine()
    with server(engine) as address:
        # What follows is what would be smuggled.
        response = refused(address, raw + head())
        assert response.status == 400
        assert engine.requests == []


def test_O7_trailers_are_no_headers() -> None:
    trailers = b"Authorization: Bearer k\r\nX-Request-Id: smuggled\r\nContent-Encoding: gzip\r\n"
    chunks = b"%x\r\n%s\r\n0\r\n%s\r\n" % (len(BODY), BODY, trailers)
    with server(api_key=("k",)) as address:
        without = exchange(address, post(CHUNKED, body=chunks))
        allowed = exchange(address, post(CHUNKED, "Authorization: Bearer k", body=chunks))
    assert (without.status, allowed.status) == (401, 200)
    assert "smuggled" not in (without.headers["x-request-id"], allowed.headers["x-request-id"])


def test_O7_honest_chunks_are_read() -> None:
    chunks = b"".join(b"1;name=value\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    with server() as address:
        assert exchange(address, post(CHUNKED, body=chunks)).status == 200


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (head("GET /health HTTP/1.1", "X: " + "a" * 200_000), 431, "headers_too_large"),
        (head("GET /health HTTP/1.1", "X" * 200_000 + ": a"), 431, "headers_too_large"),
        (b"GET /health HTTP/1.1\r\nX: " + b"a" * 200_000, 431, "headers_too_large"),
        (head("GET /health HTTP/1.1", *(f"X-{index}: a" for index in range(5000))), 431, "headers_too_large"),
        (head("GET /health HTTP/1.1", *(f"X-{index}: a" for index in range(MAX_HEADERS))), 431, "headers_too_large"),
        (head(f"GET /{'a' * 65536} HTTP/1.1"), 414, "url_too_long"),
        (b"GET /" + b"a" * 65536, 414, "url_too_long"),
        (head("GET /health?" + "&".join(f"a{index}=1" for index in range(10_000)) + " HTTP/1.1"), 414, "url_too_long"),
    ],
    ids=["one", "name", "unended", "many", "one too many", "url", "unended url", "parameters"],
)
def test_O6_more_head_than_any_request_needs(raw: bytes, status: int, code: str) -> None:
    with server() as address:
        response = refused(address, raw)
    assert (response.status, code_of(response)) == (status, code)


def test_O6_what_just_fits() -> None:
    with server(max_header_kb=1) as address:
        many = exchange(address, head("GET /health HTTP/1.1", *(f"X{index}: a" for index in range(100))))
        assert many.status == 200
        assert exchange(address, head("GET /health HTTP/1.1", "X: " + "a" * 900)).status == 200
        assert refused(address, head("GET /health HTTP/1.1", "X: " + "a" * 1024)).status == 431
    with server() as address:
        assert exchange(address, head(f"GET /{'a' * (MAX_URL - 1)} HTTP/1.1")).status == 404


def test_O6_headers_without_end_are_not_kept() -> None:
    with server() as (host, port), socket.create_connection((host, port), timeout=10) as connection:
        sent = 0
        with suppress(OSError):
            connection.sendall(b"GET /health HTTP/1.1\r\n")
            while sent < 64 * 2**20:
                sent += connection.send(b"X: " + b"a" * 60_000 + b"\r\n")
    assert sent < LINGER_BYTES + 32 * 2**20, "what is dropped for courtesy, and what the sockets' buffers take"


NOT_HTTP = {
    "HTTP/2 with prior knowledge": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", "HTTP/2 is not served"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), "use http://"),
    "a websocket": (
        head(
            "GET /v1/models HTTP/1.1",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ),
        "no websockets",
    ),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n", "not a valid HTTP"),
    "zeros": (bytes(1000), "not a valid HTTP"),
    "SMTP": (b"EHLO example.com\r\n", "not a valid HTTP"),
}


@pytest.mark.parametrize(("raw", "told"), NOT_HTTP.values(), ids=NOT_HTTP.keys())
def test_O11_other_protocols(raw: bytes, told: str) -> None:
    with server() as address:
        response = refused(address, raw)
    assert response.status == 400
    assert told in json.loads(response.body)["error"]["message"]


def test_O11_connect() -> None:
    with server() as address:
        assert refused(address, b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n").status == 405


def test_O11_an_offer_of_http_2_is_passed_over() -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
    with server() as address:
        whole = post(*offer, f"Content-Length: {len(BODY)}")
        assert exchange(address, whole).status == 200
        with socket.create_connection(address, timeout=8) as connection:
            for byte in whole:
                connection.sendall(bytes([byte]))
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            connection.sendall(head())
            assert connection.recv(4096).startswith(b"HTTP/1.1 200"), "the connection goes on"


def test_O11_pipelined_requests_get_one_answer() -> None:
    engine = FakeEngine()
    one = post(f"Content-Length: {len(BODY)}")
    with server(engine) as address:
        response = exchange(address, one * 1000, waits_for_close=True)
    assert response.status == 200
    assert response.closed
    assert len(engine.requests) == 1


def test_requests_follow_each_other_on_one_connection() -> None:
    with server() as (host, port), httpx.Client(base_url=f"http://{host}:{port}") as client:
        for _ in range(3):
            assert client.get("/health").status_code == 200
            assert client.post(CHAT, json=chat_body()).status_code == 200


PARTIAL = {
    "nothing": b"",
    "empty lines": b"\r\n\r\n",
    "half a line": b"GET /hea",
    "half the headers": b"GET /health HTTP/1.1\r\nHost: loc",
}


@pytest.mark.parametrize("raw", PARTIAL.values(), ids=PARTIAL.keys())
def test_O3_headers_that_never_end(raw: bytes) -> None:
    with server(header_timeout_s=0.3) as address:
        began = time.monotonic()
        response = exchange(address, raw, timeout_s=8, waits_for_close=True)
        assert 0.25 < time.monotonic() - began < 6
    assert response.closed
    if raw.strip():
        assert (response.status, code_of(response)) == (408, "request_timeout")
    else:
        assert response.status is None, "who asked nothing gets no answer"


@pytest.mark.parametrize("line", [b"X: y\r\n", b"\r\n"], ids=["headers", "empty lines"])
def test_O3_a_byte_now_and_then_moves_no_deadline(line: bytes) -> None:
    with server(header_timeout_s=0.5) as (host, port), socket.create_connection((host, port), timeout=8) as connection:
        began = time.monotonic()
        with suppress(OSError):
            if line.strip():
                connection.sendall(b"GET /health HTTP/1.1\r\n")
            while time.monotonic() - began < 8:
                connection.sendall(line)
                time.sleep(0.05)
        assert time.monotonic() - began < 6


def test_O3_a_connection_that_is_idle_after_an_answer() -> None:
    with server(keep_alive_s=1) as (host, port), socket.create_connection((host, port), timeout=8) as connection:
        connection.sendall(head())
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        for _ in range(3):
            # Empty lines begin no request.
            connection.sendall(b"\r\n")
            time.sleep(0.2)
        assert connection.recv(4096) == b""
        assert 0.5 < time.monotonic() - began < 6


def test_O3_bodies_that_never_arrive_hold_no_place_and_end() -> None:
    with server(body_timeout_s=1.0, max_queue=2) as (host, port), ExitStack() as open_ones:
        waiting = [open_ones.enter_context(socket.create_connection((host, port), timeout=8)) for _ in range(50)]
        for connection in waiting:
            connection.sendall(post("Content-Length: 100", body=b'{"model":'))
        victim = httpx.post(f"http://{host}:{port}{CHAT}", json=chat_body())
        assert victim.status_code == 200, "a queue of two isn't filled by fifty bodies on their way"
        for connection in waiting:
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_O3_a_body_after_an_early_answer_has_an_end_too() -> None:
    with server(api_key=("k",), body_timeout_s=0.2) as address:
        host, port = address
        with socket.create_connection((host, port), timeout=15) as connection:
            connection.sendall(post("Content-Length: 1000000", body=b"{"))
            assert connection.recv(4096).startswith(b"HTTP/1.1 401")
            began = time.monotonic()
            with suppress(OSError):
                while time.monotonic() - began < 15:
                    connection.sendall(b" ")
                    time.sleep(0.1)
            assert time.monotonic() - began < 14


def test_O3_more_connections_than_allowed() -> None:
    with server(max_connections=20) as (host, port), ExitStack() as open_ones:
        kept = [open_ones.enter_context(socket.create_connection((host, port), timeout=8)) for _ in range(20)]
        for connection in kept:
            connection.sendall(head())
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        refusal = refused((host, port), head())
        assert (refusal.status, code_of(refusal)) == (503, "too_many_connections")
        assert int(refusal.headers["retry-after"]) > 0
        for connection in kept:
            connection.sendall(head())
            assert connection.recv(4096).startswith(b"HTTP/1.1 200"), "who is in stays served"
        open_ones.close()
        deadline = time.monotonic() + 5
        while exchange((host, port), head()).status != 200:
            assert time.monotonic() < deadline, "the places were not given back"
            time.sleep(0.05)


def test_O3_one_address_cannot_take_all_places() -> None:
    def connect(source: str) -> socket.socket:
        return socket.create_connection((host, port), timeout=8, source_address=(source, 0))

    with server(max_connections=20, max_connections_per_address=5) as (host, port), ExitStack() as open_ones:
        for _ in range(5):
            open_ones.enter_context(connect("127.0.0.2"))
        with connect("127.0.0.2") as late:
            late.sendall(head())
            answer = late.recv(4096)
        for _ in range(400):
            open_ones.enter_context(connect("127.0.0.2"))
        assert exchange((host, port), head()).status == 200, "another address is served: the refused take no place"
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"from your address" in answer


def test_O3_a_refusal_is_logged_once_without_its_bytes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sightline_server.access"), server() as address:
        response = refused(address, b"GET /secret\x01 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    lines = [
        record.getMessage() for record in caplog.records if response.headers["x-request-id"] in record.getMessage()
    ]
    assert len(lines) == 1
    assert "status=400" in lines[0]
    assert "secret" not in lines[0]


def test_O8_a_body_that_is_announced_too_large_gets_no_100_continue() -> None:
    with server(max_body_mb=1) as address:
        raw = post("Expect: 100-continue", f"Content-Length: {2**21}", body=b"")
        host, port = address
        with socket.create_connection((host, port), timeout=8) as connection:
            connection.sendall(raw)
            assert connection.recv(4096).startswith(b"HTTP/1.1 413")
        small = post("Expect: 100-continue", f"Content-Length: {len(BODY)}", body=b"")
        with socket.create_connection((host, port), timeout=8) as connection:
            connection.sendall(small)
            assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(BODY)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_O8_all_bodies_together_have_a_bound() -> None:
    with server(max_bodies_mb=1, body_timeout_s=5) as (host, port), ExitStack() as open_ones:
        for _ in range(3):
            connection = open_ones.enter_context(socket.create_connection((host, port), timeout=8))
            connection.sendall(post("Content-Length: 1000000", body=b" " * 300_000))
        time.sleep(0.3)
        raw = post("Content-Length: 400000", body=b" " * 400_000)
        full = exchange((host, port), raw)
        assert (full.status, code_of(full)) == (503, "server_is_overloaded")
        assert exchange((host, port), post(f"Content-Length: {len(BODY)}")).status == 200, "small ones fit"
        open_ones.close()
        deadline = time.monotonic() + 5
        while (freed := exchange((host, port), raw)).status != 400:
            assert time.monotonic() < deadline, f"the memory was not given back: {freed}"
            time.sleep(0.05)


@pytest.mark.parametrize("reads", [0, 1], ids=["nothing", "a byte now and then"])
def test_O4_a_slow_reader_is_cut_and_costs_a_bounded_buffer(reads: int) -> None:
    engine = FakeEngine("x" * 500)
    engine.step_s = 0.05
    body = json.dumps(chat_body(stream=True, max_tokens=450, logprobs=True, top_logprobs=20, n=8)).encode()
    with server(engine, stall_timeout_s=0.5) as (host, port), socket.socket() as connection:
        # Buffers of the least size, so that the server's own fill.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(8)
        connection.connect((host, port))
        connection.sendall(post(f"Content-Length: {len(body)}", body=body))
        deadline = time.monotonic() + 5
        while not engine.requests:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        done = threading.Event()

        def read() -> None:
            with suppress(OSError):
                while reads and not done.wait(0.05):
                    connection.recv(reads)

        reader = threading.Thread(target=read)
        reader.start()
        while (
            engine.live or 'outcome="cancelled"} 1.0' not in httpx.get(f"http://{host}:{port}/metrics", timeout=30).text
        ):
            assert time.monotonic() < deadline + 10, "the slow reader still has its place"
            time.sleep(0.05)
        done.set()
        reader.join()
        kept = 0
        with suppress(OSError):
            while part := connection.recv(65536):
                kept += len(part)
        assert kept < 2 * SEND_BUFFER + 2**18, "what the system and the server had kept for it"
        assert len(engine.aborted) == 8, "the engine was freed, it wasn't done"
        assert httpx.post(f"http://{host}:{port}{CHAT}", json=chat_body(max_tokens=2)).status_code == 200
