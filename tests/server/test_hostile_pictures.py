"""Hostile pictures over HTTP: each is answered 400 with its place, or 200, and nothing is left of it."""

import asyncio
import base64
import io
import json
import struct
import time
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import pytest_asyncio
from api_calls import CHAT, chat_body, http
from fakes import FakeEngine, FakePool, fake_app, fake_image, fake_model
from hostile.flat_jpegs import flat_jpeg
from hostile.pictures import as_file, exif_block, mutated_pictures, png_file
from PIL import Image

from sightline_models.images import prepare
from sightline_server.chat.decode_pool import DecodePool

PLACE = "messages[0].content[0].image_url"


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[DecodePool]:
    made = DecodePool(fake_model().preprocess, workers=1, timeout_s=20.0, memory_mb=1024, max_pixels=50_000_000)
    await made.start()
    yield made
    await made.close()


def part(data: bytes, media_type: str = "image/png") -> dict[str, Any]:
    url = f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


async def ask(client: httpx.AsyncClient, *parts: dict[str, Any]) -> httpx.Response:
    return await client.post(CHAT, json=chat_body(messages=[{"role": "user", "content": list(parts)}]))


def refusal(answer: httpx.Response, code: str | None = None, param: str = PLACE) -> str:
    """The sentence of a 400 in OpenAI's shape that quotes nothing of ours."""
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert code is None or error["code"] == code
    for leaked in ("0x", "BytesIO", "Traceback", "PIL", ".py"):
        assert leaked not in answer.text
    return str(error["message"])


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def ihdr(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,", "empty_image_file"),
        ("data:,", "empty_image_file"),
        ("data:image/png;base64,iQ==", "unsupported_image_media_type"),
        ("data:,x", "unsupported_image_media_type"),
        ("data:image/png;base64", "invalid_image_url"),
        ("data:image/png;base64,iVBORw0KGgo", "invalid_base64_image"),
        ("data:image/png;base64,iVBORw0KGgo=", "image_parse_error"),
    ],
)
async def test_I1_next_to_nothing(url: str, code: str) -> None:
    pool = FakePool()
    async with http(fake_app(pool=pool)) as client:
        answer = await ask(client, {"type": "image_url", "image_url": {"url": url}})
    refusal(answer, code)
    assert pool.salts == [], "no worker was asked"


async def test_I2_I3_spoiled_pictures_are_400_or_200_and_the_next_is_served(pool: DecodePool) -> None:
    engine, pids = FakeEngine(), pool.worker_pids()
    whole = [as_file(noise(40, 30), format) for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]
    cuts = [data[: len(data) * percent // 100] for data in whole for percent in range(1, 99, 7)]
    spoiled = [data for _, data in mutated_pictures(2026, 200)]
    async with http(fake_app(engine, pool=pool, refusal_delay_s=0.0)) as client:
        for data in cuts + spoiled:
            answer = await ask(client, part(data))
            if answer.status_code != 200:
                refusal(answer)
        assert all([(await ask(client, part(data))).status_code == 200 for data in whole])
        assert (await client.get("/ready")).status_code == 200
    assert pool.worker_pids() == pids, "no process died"


def bombs() -> dict[str, bytes]:
    webp = b"RIFF\x1a\0\0\0WEBPVP8 \x0e\0\0\0\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 8_000, 8_000) + bytes(4)
    return {
        "png 182 MP": png_file(ihdr(13_000, 14_000), bytes(20_000_000)),
        "png 2^31-1": png_file(ihdr(2**31 - 1, 2**31 - 1), b""),
        "png 1 bit 81 MP": png_file(ihdr(9_000, 9_000, 1, 0), bytes(9_000 * 1126)),
        "webp 34 bytes 64 MP": webp,
        "scans": flat_jpeg([[(9,)]], progressive=True, later_scans=5_000),
        "chunks": png_file(ihdr(1, 1), b"\0abc", *[(b"tEXt", b"a\0b")] * 100_000),
    }


@pytest.mark.parametrize("name", bombs())
async def test_I4_I5_I7_I18_bombs_are_refused_before_a_worker_is_asked(name: str) -> None:
    pool, content = FakePool(), part(bombs()[name])
    async with http(fake_app(pool=pool)) as client:
        await ask(client, fake_image())
        asked = len(pool.salts)
        started, memory = time.process_time(), psutil.Process().memory_info().rss
        answer = await ask(client, content)
        assert time.process_time() - started < (0.05 if len(content["image_url"]["url"]) < 100_000 else 0.2)
        assert psutil.Process().memory_info().rss - memory < 5_000_000 + 8 * len(content["image_url"]["url"])
    refusal(answer, "image_parse_error" if name in ("scans", "chunks") else "image_too_large")
    assert len(pool.salts) == asked


async def test_I5_a_requests_pixels_are_counted_before_any_is_decoded() -> None:
    pool, flat = FakePool(), png_file(ihdr(7_000, 7_000, 1, 0), bytes(7_000 * 876))
    async with http(fake_app(pool=pool)) as client:
        assert (await ask(client, fake_image(), fake_image())).status_code == 200
        asked = len(pool.salts)
        sentence = refusal(await ask(client, *[part(flat)] * 3), "image_too_large", "messages[0].content[2].image_url")
        refusal(await ask(client, fake_image(), part(b"no picture")), None, "messages[0].content[1].image_url")
    assert "147.0 megapixels" in sentence
    assert "120" in sentence
    assert len(pool.salts) == asked, "not even those that come first"


def gif_frames(count: int, later: bytes) -> bytes:
    """A GIF of ``count`` frames of one pixel each; all but the first hold ``later`` in place of pixels."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes([10, 20, 30, 200, 100, 50])
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2"
    return head + frame + b"\2\x4c\1\0" + (frame + bytes([len(later)]) + later + b"\0") * (count - 1) + b";"


def spoiled_from(data: bytes, kind: bytes, count: int) -> bytes:
    """``data`` with rubbish in the body of each chunk of a PNG or WebP but the first ``count`` of that ``kind``."""
    made, place = bytearray(data), 0
    for index in range(data.count(kind)):
        place = data.index(kind, place) + 4
        if index >= count:
            made[place + 40 : place + 56] = b"\xa5" * 16
    return bytes(made)


async def test_I6_of_300_frames_the_first_is_decoded_and_no_other(pool: DecodePool) -> None:
    frames = [noise(64 + index, 64).crop((0, 0, 64, 64)) for index in range(20)]
    options = {"save_all": True, "append_images": frames[1:]}
    files = {
        "gif": (gif_frames(300, b"\xff\xff\xff"), Image.new("RGB", (1, 1), (200, 100, 50))),
        "png": (spoiled_from(as_file(frames[0], "PNG", **options), b"fdAT", 0), frames[0]),
        "webp": (
            spoiled_from(as_file(frames[0], "WEBP", lossless=True, **options), b"ANMF", 1),
            frames[0],
        ),
    }
    for data, expected in files.values():
        handle = await pool.read(data)
        assert np.array_equal(await pool.pixels(handle), prepare(expected, fake_model().preprocess).pixels)


async def test_I7_bombs_in_texts_and_profiles_cost_nothing(pool: DecodePool) -> None:
    bomb = zlib.compress(bytes(200_000_000), 9)
    chunks = [(b"iCCP", b"p\0\0" + bomb), (b"zTXt", b"k\0\0" + bomb), (b"iTXt", b"k\0\1\0\0\0" + bomb)]
    data = png_file(ihdr(1, 1), b"\0abc", *chunks)
    worker = psutil.Process(pool.worker_pids()[0])
    before = sum(worker.cpu_times()[:2])
    async with http(fake_app(pool=pool)) as client:
        assert (await ask(client, part(data))).status_code == 200
    assert sum(worker.cpu_times()[:2]) - before < 0.1


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (10_000, 1), (1, 65_535), (65_535, 1)])
async def test_I12_narrow_pictures(size: tuple[int, int], pool: DecodePool) -> None:
    async with http(fake_app(pool=pool)) as client:
        answer = await ask(client, part(as_file(Image.new("RGB", size), "PNG")))
    if answer.status_code != 200:
        refusal(answer, "image_aspect_ratio")


async def test_I13_formats_that_are_not_served() -> None:
    pool = FakePool()
    async with http(fake_app(pool=pool)) as client:
        for format in ("EPS", "PDF", "TIFF", "ICO", "JPEG2000", "AVIF"):
            sentence = refusal(await ask(client, part(as_file(noise(20, 20), format))), "unsupported_image_media_type")
            assert "PNG, JPEG, WebP, GIF or BMP" in sentence
        for text in (b"<svg/>", b"<html>", b"%!PS", b"%PDF-1.7", b"SIMPLE  =", b"8BPS\0\1", b"\0\0\0\x18ftypheic"):
            refusal(await ask(client, part(text)), "unsupported_image_media_type")
    assert pool.salts == []


async def test_I14_the_bytes_decide_and_not_the_media_type(pool: DecodePool) -> None:
    engine, data = FakeEngine(), as_file(noise(20, 20), "JPEG")
    async with http(fake_app(engine, pool=pool)) as client:
        for media_type in ("image/png", "image/jpeg", "", "text/html", "image/svg+xml", "x" * 500):
            assert (await ask(client, part(data, media_type))).status_code == 200
        refusal(await ask(client, part(b"<svg/>", "image/png")), "unsupported_image_media_type")
    assert len({request.prompt.images[0].digest for request in engine.requests}) == 1


async def test_I16_a_body_that_is_announced_too_large_is_refused_before_it_is_read() -> None:
    taken, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal taken
        assert sent, "nothing is read before the answer"
        taken += 65_536
        return {"type": "http.request", "body": bytes(65_536), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    limit = 2**20
    headers = [(b"content-type", b"application/json"), (b"content-length", b"62914560"), (b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b""}
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "server": ("server", 80), "root_path": ""}
    await asyncio.wait_for(fake_app(max_body_mb=1)(scope, receive, send), 30)
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_too_large"
    assert taken <= limit + 65_536


async def test_I16_too_many_pictures_are_counted_before_any_is_read() -> None:
    pool = FakePool()
    async with http(fake_app(pool=pool)) as client:
        for count in (17, 500, 10_000):
            parts = [part(b"no picture")] * count
            sentence = refusal(await ask(client, *parts), "too_many_images", "messages")
            assert f"{count} images; at most 16" in sentence
    assert pool.salts == []


async def test_I17_what_changes_pixels_changes_the_name_that_caches_go_by(pool: DecodePool) -> None:
    engine, pixels = FakeEngine(), b"".join(b"\0" + bytes(range(row, row + 24)) for row in range(8))
    turned = [(b"eXIf", exif_block(orientation)) for orientation in (2, 3, 6)]
    files = [png_file(ihdr(8, 8), pixels, *chunks) for chunks in ((), *([chunk] for chunk in turned))]
    files += [png_file(ihdr(24, 8, 8, 0), pixels), png_file(ihdr(8, 8), pixels, (b"tRNS", bytes([0, 0, 0, 1, 0, 2])))]
    files += [png_file(ihdr(24, 8, 8, 3), pixels, (b"PLTE", bytes([1, shade, 3] * 31))) for shade in (0, 1)]
    app = fake_app(engine, pool=pool, api_key=("one", "two"))
    async with http(app) as client:
        for key in ("one", "two", "one"):
            client.headers["Authorization"] = f"Bearer {key}"
            for data in files:
                assert (await ask(client, part(data))).status_code == 200
    names = [(request.cache_salt, request.prompt.images[0].digest) for request in engine.requests]
    assert len(set(names)) == 2 * len(files)
    assert pool.decoded_total == 2 * len(files), "the second time the file was known, but not to another key"


async def test_I18_a_phones_picture_with_another_behind_it(pool: DecodePool) -> None:
    file = io.BytesIO()
    noise(40, 30).save(file, "MPO", save_all=True, append_images=[noise(20, 20)])
    handle = await pool.read(file.getvalue())
    assert handle.pixels_count == 40 * 30
