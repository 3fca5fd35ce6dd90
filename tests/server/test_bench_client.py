"""The load generator against a server of raw bytes: what it counts, what it times, what it calls a failure."""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sightline_server.bench.client import Record, ask
from sightline_server.bench.http import ChunkedBody, Endpoint, TransportError
from sightline_server.bench.load import Arrivals, BenchError, Target, find_model, measure_tokens_per_word, run_load
from sightline_server.bench.report import percentile, spread_ms
from sightline_server.bench.workload import WORDS, WorkloadSpec, draw_image, draw_words, make_bodies
from sightline_server.cli import bench as cli

Answer = Callable[[str, bytes, asyncio.StreamWriter], Awaitable[None]]


async def handle(answer: Answer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("Content-Length"))
        await answer(head, await reader.readexactly(length), writer)
        await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Endpoint]:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await handle(answer, reader, writer)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield Endpoint.parse(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    finally:
        server.close()


def event(content: str | None = None, finish: str | None = None, **more: object) -> bytes:
    chunk = {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}], **more}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def usage(prompt: int, completion: int, cached: int = 0) -> bytes:
    told = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return b"data: " + json.dumps({"choices": [], "usage": told}).encode() + b"\n\n"


def reply(status: str, body: bytes, kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def chunked(piece: bytes) -> bytes:
    return f"{len(piece):x}\r\n".encode() + piece + b"\r\n"


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


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


async def test_concurrency_is_bounded_and_a_rate_spaces_the_starts() -> None:
    under_way = most = 0

    async def answer(_head: str, _body: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        writer.write(STREAM_HEAD + chunked(event("a", "stop") + usage(1, 1)) + END)
        under_way -= 1

    done: list[Record] = []
    async with serving(answer) as endpoint:
        target = Target(endpoint=endpoint, model="m")
        run = await run_load(target, [b"{}"] * 12, Arrivals(max_concurrency=3), done.append)
        assert most == 3
        assert [record.index for record in run.records] == list(range(12))
        assert len(done) == 12
        assert run.duration_s >= 4 * 0.02
        arrivals = Arrivals(request_rate=200.0, seed=5)
        run = await run_load(target, [b"{}"] * 12, arrivals, done.append)
    for record, offset in zip(run.records, arrivals.offsets(12), strict=True):
        assert record.started_s >= offset - 0.001


def test_poisson_arrivals_have_the_rate_and_repeat_with_the_seed() -> None:
    times = Arrivals(request_rate=50.0, seed=1).offsets(4000)
    assert times == Arrivals(request_rate=50.0, seed=1).offsets(4000)
    assert times != Arrivals(request_rate=50.0, seed=2).offsets(4000)
    assert times[0] == 0
    assert times[-1] == pytest.approx(80, rel=0.1)


def test_percentiles_interpolate_linearly() -> None:
    assert [percentile([1.0, 2.0, 3.0, 4.0], share) for share in (0, 0.5, 1)] == [1, 2.5, 4]
    assert percentile([7.0], 0.99) == 7
    spread = spread_ms(value / 1000 for value in range(101))
    assert spread is not None
    assert (spread.mean, spread.p50, spread.p90, spread.p99, spread.max) == (50, 50, 90, 99, 100)
    assert spread_ms([]) is None


def spec(**changes: object) -> WorkloadSpec:
    known: dict[str, object] = {"seed": 7, "num_prompts": 4, "input_len": 40, "output_len": 8, "image_size": (48, 32)}
    return WorkloadSpec(**{**known, **changes})  # type: ignore[arg-type]


def contents(body: bytes) -> tuple[str | None, str]:
    *pictures, text = json.loads(body)["messages"][0]["content"]
    return (pictures[0]["image_url"]["url"] if pictures else None), text["text"]


def test_a_seed_repeats_a_workload_and_nothing_in_it_repeats() -> None:
    bodies = list(make_bodies(spec(), model="m", tokens_per_word=2.0, warmup=2))
    assert bodies == list(make_bodies(spec(), model="m", tokens_per_word=2.0, warmup=2))
    assert len(bodies) == 6
    assert len({contents(body)[0] for body in bodies}) == 6, "two requests share a picture"
    assert len({contents(body)[1] for body in bodies}) == 6
    assert bodies != list(make_bodies(spec(seed=8), model="m", tokens_per_word=2.0, warmup=2))
    body = json.loads(bodies[0])
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"], body["stream"]) == (8, 1.0, True, True)
    assert len(contents(bodies[0])[1].split()) == 20
    assert "ignore_eos" not in json.loads(next(make_bodies(spec(ignore_eos=False), model="m", tokens_per_word=1.0)))


def test_same_is_one_picture_that_the_warm_up_has_not_shown_and_none_is_none() -> None:
    bodies = list(make_bodies(spec(images="same"), model="m", tokens_per_word=1.0, warmup=1))
    pictures = [contents(body)[0] for body in bodies]
    assert len(set(pictures[1:])) == 1
    assert pictures[0] != pictures[1]
    assert {contents(body)[0] for body in make_bodies(spec(images="none"), model="m", tokens_per_word=1.0)} == {None}


@pytest.mark.parametrize("image_format", ["jpeg", "png"])
def test_pictures_are_real_ones_of_the_size_and_never_flat(image_format: str) -> None:
    body = next(make_bodies(spec(image_format=image_format), model="m", tokens_per_word=1.0))
    url = contents(body)[0] or ""
    head, _, data = url.partition(",")
    assert head == f"data:image/{image_format};base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.format, image.size, image.mode) == (image_format.upper(), (48, 32), "RGB")
    assert len(np.unique(np.asarray(image))) > 100
    assert draw_image(1, 2, (48, 32), "png") != draw_image(1, 3, (48, 32), "png")


def test_words_are_plain_and_distinct() -> None:
    assert len(set(WORDS)) == len(WORDS) > 300
    assert draw_words(1, 2, 5) == draw_words(1, 2, 5) != draw_words(1, 3, 5)


async def test_the_tokenizer_is_measured_before_the_run() -> None:
    async def counting(_head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        words = len(json.loads(body)["messages"][0]["content"][0]["text"].split())
        writer.write(STREAM_HEAD + chunked(event("a", "length") + usage(20 + 3 * words, 1)) + END)

    async def silent(_head: str, _body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunked(event("a", "length")) + END)

    async def refusing(_head: str, _body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply("422 No", b'{"detail":"Unexpected fields: ignore_eos"}'))

    async with serving(counting) as endpoint:
        assert await measure_tokens_per_word(Target(endpoint=endpoint, model="m"), spec()) == 3
    async with serving(silent) as endpoint:
        assert await measure_tokens_per_word(Target(endpoint=endpoint, model="m"), spec()) is None
    async with serving(refusing) as endpoint:
        with pytest.raises(BenchError, match="--no-ignore-eos"):
            await measure_tokens_per_word(Target(endpoint=endpoint, model="m"), spec())


async def test_the_model_is_found_or_the_fix_is_named() -> None:
    async def listing(head: str, _body: bytes, writer: asyncio.StreamWriter) -> None:
        assert head.startswith("GET /v1/models ")
        assert "Bearer k" in head
        writer.write(reply("200 OK", b'{"data":[{"id":"first"},{"id":"second"}]}'))

    async def empty(_head: str, _body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply("200 OK", b'{"data":[]}'))

    async with serving(listing) as endpoint:
        assert await find_model(endpoint, "k") == "first"
    async with serving(empty) as endpoint:
        with pytest.raises(BenchError, match="--model"):
            await find_model(endpoint, None)
    with pytest.raises(BenchError, match="Is the server running"):
        await find_model(Endpoint("127.0.0.1", 1, "/v1", tls=False), None)


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


@contextlib.contextmanager
def serving_on_a_thread(answer: Answer) -> Iterator[str]:
    """The command runs its own event loop, so the stub needs another one."""
    loop, urls, ready = asyncio.new_event_loop(), [], threading.Event()
    stop = asyncio.Event()

    async def main() -> None:
        async with serving(answer) as endpoint:
            urls.append(f"http://127.0.0.1:{endpoint.port}/v1")
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def run_command(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["bench", *flags])
    return cli.run(args)


async def every_third_refused(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
    if head.startswith("GET"):
        writer.write(reply("200 OK", b'{"data":[{"id":"stub"}]}'))
        return
    asked = json.loads(body)
    words = len(asked["messages"][0]["content"][-1]["text"].split())
    if "image_url" in str(asked) and len(body) % 3 == 0:
        writer.write(reply("503 Busy", b'{"error":{"message":"Queue full.","code":"server_is_overloaded"}}'))
        return
    tokens = asked["max_tokens"]
    pieces = [chunked(event("x")) for _ in range(tokens)]
    writer.write(STREAM_HEAD + b"".join(pieces) + chunked(event(None, "length") + usage(600 + words, tokens)) + END)


def test_the_command_prints_one_json_object_last_and_hides_no_failure(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "out.json"
    with serving_on_a_thread(every_third_refused) as url:
        flags = ("--image-size", "40x40", "--output-len", "5", "--warmup", "0", "--max-concurrency", "8")
        code = run_command("--url", url, "--num-prompts", "40", "--seed", "3", "--json", str(path), *flags)
    out, _err = capfd.readouterr()
    summary = json.loads(out.rstrip("\n").splitlines()[-1])
    counts = summary["counts"]
    assert counts["ok"] + counts["failed"] == counts["sent"] == 40
    assert counts["errors"] == {"503 server_is_overloaded": counts["failed"]}
    assert 0 < counts["failed"] < 40
    assert code == 1, "a run with failures must not end like a clean one"
    assert "FAILED" in out
    assert "Queue full." in out
    assert summary["tokens"]["output"] == 5 * counts["ok"]
    assert summary["throughput"]["output_tokens_per_s"] == pytest.approx(
        5 * counts["ok"] / summary["duration_s"], rel=0.01
    )
    assert (summary["model"], summary["seed"], summary["counts"]["short"]) == ("stub", 3, 0)
    assert 0 < summary["client_cpu_share"] < 2
    document = json.loads(path.read_text())
    assert document["summary"] == summary
    assert len(document["records"]) == 40
    assert {record["error"] for record in document["records"]} == {None, "503 server_is_overloaded"}


def test_the_command_fails_in_a_sentence_when_nothing_listens(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("--url", "http://127.0.0.1:1/v1") == 1
    assert "Is the server running" in capfd.readouterr().err
    assert run_command("--url", "ftp://nowhere") == 1
    assert "--url must look like" in capfd.readouterr().err


@pytest.mark.parametrize(
    "flags", [("--image-size", "336"), ("--num-prompts", "0"), ("--request-rate", "-1"), ("--temperature", "nan")]
)
def test_bad_flags_are_refused_by_name(flags: tuple[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(*flags)
    assert flags[0] in capfd.readouterr().err
