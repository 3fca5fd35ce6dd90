"""One measured request against a server of raw bytes: what is timed, what is counted, what is called a failure."""

import asyncio

import pytest
from bench_stub import END, STREAM_HEAD, chunked, event, reply, serving, usage

from sightline_server.bench.client import Record, ask
from sightline_server.bench.http import ChunkedBody, Endpoint, TransportError


async def one(endpoint: Endpoint, timeout_s: float = 20.0) -> Record:
    return await ask(endpoint, b"{}", headers={}, index=3, run_started=0.0, timeout_s=timeout_s)


async def test_a_stream_is_timed_by_content_chunks_and_counted_by_usage() -> None:
    async def answer(_head: str, _body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunked(event("")))
        await asyncio.sleep(0.05)
        writer.write(chunked(event("one ")))
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.write(chunked(event("two three")))
        writer.write(chunked(event(None, "length") + usage(700, 9, cached=64) + b"data: [DONE]\n\n") + END)

    async with serving(answer) as endpoint:
        record = await one(endpoint)
    assert record.error is None
    assert (record.chunks, record.output_tokens, record.prompt_tokens, record.cached_tokens) == (2, 9, 700, 64)
    assert record.finish_reason == "length"
    assert record.ttft_s is not None
    assert record.ttft_s >= 0.05, "the role chunk was taken for the first token"
    assert len(record.gaps_s) == 1
    assert record.gaps_s[0] == pytest.approx(0.1, abs=0.05)
    assert record.tpot_s == pytest.approx((record.e2e_s - record.ttft_s) / 8)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
async def test_any_split_of_the_same_bytes_reads_the_same(size: int) -> None:
    whole = STREAM_HEAD + chunked(event("été ")) + chunked(event("雪", "stop")[:11])
    whole += chunked(event("雪", "stop")[11:]) + chunked(usage(5, 2) + b"data: [DONE]\r\n\r\n") + END

    async def answer(_head: str, _body: bytes, writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(whole), size):
            writer.write(whole[start : start + size])
            await asyncio.sleep(0)

    async with serving(answer) as endpoint:
        record = await one(endpoint)
    assert (record.error, record.chunks, record.completion_tokens, record.finish_reason) == (None, 2, 2, "stop")


def test_a_chunked_body_survives_every_cut() -> None:
    wire = b"5\r\nhello\r\n7;name=x\r\n, world\r\n0\r\n\r\n"
    for cut in range(len(wire)):
        body = ChunkedBody()
        assert body.feed(wire[:cut]) + body.feed(wire[cut:]) == b"hello, world"
        assert body.ended
    with pytest.raises(TransportError, match="size"):
        ChunkedBody().feed(b"zz\r\n")


async def test_no_usage_means_chunks_are_counted() -> None:
    async def answer(_head: str, _body: bytes, writer: asyncio.StreamWriter) -> None:
        # No length and no chunking: the body ends with the connection, as from an HTTP/1.0 proxy.
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + event("a") + event("b") + event(None, "stop"))

    async with serving(answer) as endpoint:
        record = await one(endpoint)
    assert (record.error, record.completion_tokens, record.output_tokens) == (None, None, 2)


@pytest.mark.parametrize(
    ("wire", "name", "words"),
    [
        (
            reply("400 Bad Request", b'{"error":{"message":"No such field.","code":"unsupported_parameter"}}'),
            "400 unsupported_parameter",
            "No such field.",
        ),
        (reply("422 Unprocessable", b'{"detail":"Unexpected fields"}'), "422", "Unexpected fields"),
        (reply("502 Bad Gateway", b"<html>oops</html>", "text/html"), "502", "<html>oops</html>"),
        (
            STREAM_HEAD
            + chunked(event("a") + b'data: {"error":{"message":"Gone.","code":"engine_restarting"}}\n\n')
            + END,
            "in_stream engine_restarting",
            "Gone.",
        ),
        (STREAM_HEAD + chunked(b'data: {"error": "boom"}\n\n') + END, "in_stream", "boom"),
        (STREAM_HEAD + chunked(event("a")) + END, "ended_early", "finish_reason"),
        (STREAM_HEAD + chunked(event("a")), "closed_early", "inside"),
        (STREAM_HEAD + chunked(b"data: not json\n\n") + END, "bad_chunk", "not json"),
        (b"", "closed_early", "before"),
        (b"SSH-2.0-nope\r\n\r\n", "bad_framing", "SSH-2.0"),
    ],
)
async def test_every_failure_has_a_name_and_the_servers_words(wire: bytes, name: str, words: str) -> None:
    async def answer(_head: str, _body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(wire)

    async with serving(answer) as endpoint:
        record = await one(endpoint)
    assert record.error == name
    assert words in (record.message or "")
    assert record.e2e_s > 0


async def test_silence_is_a_timeout_and_a_closed_port_a_connection_failure() -> None:
    async def answer(_head: str, _body: bytes, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1)

    async with serving(answer) as endpoint:
        assert (await one(endpoint, timeout_s=0.1)).error == "timeout"
    assert (await one(Endpoint("127.0.0.1", 1, "/v1", tls=False))).error == "connection_failed"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000/v1", Endpoint("127.0.0.1", 8000, "/v1", False)),
        ("http://box/v1/", Endpoint("box", 80, "/v1", False)),
        ("https://box", Endpoint("box", 443, "/v1", True)),
        ("http://[::1]:9/api", Endpoint("::1", 9, "/api", False)),
    ],
)
def test_urls(url: str, expected: Endpoint) -> None:
    assert Endpoint.parse(url) == expected
