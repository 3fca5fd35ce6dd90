"""A whole run of the load generator: the workload it draws, when requests start, what it prints."""

import argparse
import asyncio
import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from bench_stub import END, STREAM_HEAD, chunked, event, reply, serving, serving_on_a_thread, usage
from PIL import Image

from sightline_server.bench.client import Record
from sightline_server.bench.http import Endpoint
from sightline_server.bench.load import Arrivals, BenchError, Target, find_model, measure_tokens_per_word, run_load
from sightline_server.bench.report import percentile, spread_ms
from sightline_server.bench.workload import WORDS, WorkloadSpec, draw_image, draw_words, make_bodies
from sightline_server.cli import bench as cli


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
