"""The decode pool: right pixels, nothing decoded twice, and no file that takes the server down."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import uvloop
from PIL import Image
from tracer import needs_stops

from sightline_models.config import read_config
from sightline_models.images import ImageError, PreprocessConfig, prepare, read_preprocess_config
from sightline_models.presets import demo_checkpoint
from sightline_server.chat import decode_pool
from sightline_server.chat.decode_pool import DecodePool
from sightline_server.errors import ServerFault

MAX_PIXELS = 20_000_000


def preprocess() -> PreprocessConfig:
    return read_preprocess_config(demo_checkpoint(), read_config(demo_checkpoint()))


def make_pool(**options: Any) -> DecodePool:
    known = {"workers": 1, "timeout_s": 20.0, "memory_mb": 1024, "max_pixels": MAX_PIXELS}
    return DecodePool(preprocess(), **(known | options))


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[DecodePool]:
    made = make_pool()
    await made.start()
    yield made
    await made.close()


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def slow_png() -> bytes:
    """Small to send, some hundred milliseconds to decode and to hash."""
    return png(Image.new("RGB", (4400, 4400), "teal"))


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def of_process(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/{name}") as file:
        return file.read()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def workers_killed(pool: DecodePool, times: int, by: signal.Signals = signal.SIGKILL) -> Iterator[list[int]]:
    """Kills each worker as soon as it is there, ``times`` of them."""
    killed: list[int] = []

    async def kill() -> None:
        while len(killed) < times:
            for pid in pool.worker_pids():
                if pid not in killed and len(killed) < times:
                    os.kill(pid, by)
                    killed.append(pid)
            await asyncio.sleep(0.001)

    task = asyncio.create_task(kill())
    try:
        yield killed
    finally:
        task.cancel()


async def test_pixels_and_identity_are_those_of_decoding_here(pool: DecodePool) -> None:
    expected = prepare(picture(), preprocess())
    handle = await pool.read(png(picture()))
    assert handle.digest == expected.digest
    assert handle.num_tokens == expected.num_tokens == 144
    assert handle.pixels_count == 70 * 90
    assert np.array_equal(await pool.pixels(handle), expected.pixels)


async def test_a_file_seen_before_is_not_decoded_until_its_pixels_are_wanted(pool: DecodePool) -> None:
    first = await pool.read(png(picture()))
    second = await pool.read(png(picture()))
    assert pool.decoded_total == 1
    assert second.digest == first.digest
    assert second.pixels_count == first.pixels_count
    assert np.array_equal(await pool.pixels(second), await pool.pixels(first))
    await pool.pixels(second)
    assert pool.decoded_total == 2


async def test_I17_salts_do_not_share_what_was_seen(pool: DecodePool) -> None:
    for salt in (b"", b"one", b"two", b"one"):
        await pool.read(png(picture()), salt=salt)
    assert pool.decoded_total == 3


async def test_identical_images_at_once_are_decoded_once(pool: DecodePool) -> None:
    handles = await asyncio.gather(*(pool.read(png(picture())) for _ in range(20)))
    assert pool.decoded_total == 1
    assert len({handle.digest for handle in handles}) == 1


async def test_the_memo_is_bounded(pool: DecodePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_pool, "MEMO_ENTRIES", 3)
    for seed in (0, 1, 2, 0, 3):
        await pool.read(png(picture(seed)))
    assert pool.decoded_total == 4
    await pool.read(png(picture(0)))
    assert pool.decoded_total == 4, "the one used last was forgotten"
    await pool.read(png(picture(1)))
    assert pool.decoded_total == 5


async def test_I1_I5_refusals_keep_their_code_and_the_worker(pool: DecodePool) -> None:
    pids = pool.worker_pids()
    cases = {
        b"": "empty_image_file",
        b"no picture": "unsupported_image_media_type",
        png(picture())[:900]: "image_parse_error",
        png(Image.new("1", (5000, 4001))): "image_too_large",
    }
    for data, code in cases.items():
        with pytest.raises(ImageError) as refused:
            await pool.read(data)
        assert refused.value.code == code
    assert "20005000" in refused.value.message
    assert str(MAX_PIXELS) in refused.value.message
    assert pool.worker_pids() == pids
    assert pool.decoded_total == 0


async def test_O5_a_picture_that_nobody_waits_for_any_more_is_not_decoded(pool: DecodePool) -> None:
    first = asyncio.create_task(pool.read(slow_png(), salt=b""))
    await asyncio.sleep(0.05)
    left, stays = (asyncio.create_task(pool.read(png(picture(seed)), salt=b"")) for seed in (1, 2))
    also = asyncio.create_task(pool.read(png(picture(2)), salt=b""))
    await asyncio.sleep(0.05)
    left.cancel()
    also.cancel()
    await asyncio.gather(first, stays)
    await asyncio.sleep(0.1)
    assert pool.decoded_total == 2, "one that another waits for is decoded all the same"
    assert pool._waiters == pool._running == {}
    assert (await pool.read(png(picture(1)), salt=b"")).num_tokens
    assert pool.decoded_total == 3


async def test_O5_whoever_sends_a_picture_again_as_the_last_one_leaves_gets_it(pool: DecodePool) -> None:
    first = asyncio.create_task(pool.read(slow_png()))
    await asyncio.sleep(0.05)
    leaving = asyncio.create_task(pool.read(png(picture(1))))
    await asyncio.sleep(0.05)
    leaving.cancel()
    # In the moment in which what was done for the one that left is being called off.
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert (await pool.read(png(picture(1)))).num_tokens
    await first
    assert pool._waiters == pool._running == {}


@needs_stops
async def test_E4_a_stopped_worker_is_replaced_and_the_image_still_read(pool: DecodePool) -> None:
    (pid,) = pool.worker_pids()
    os.kill(pid, signal.SIGSTOP)
    image = picture()
    async with asyncio.timeout(15):
        handle = await pool.read(png(image), salt=b"")
    assert handle.pixels_count == image.width * image.height
    assert pool.worker_pids() != [pid]


async def test_a_worker_lost_once_is_replaced_and_the_image_still_read(pool: DecodePool) -> None:
    with workers_killed(pool, times=1) as killed:
        handle = await pool.read(slow_png())
    assert handle.pixels_count == 4400 * 4400
    assert len(killed) == 1
    assert pool.worker_pids() != killed
    assert len(pool.worker_pids()) == 1


async def test_an_image_that_ends_two_workers_is_refused(pool: DecodePool) -> None:
    with workers_killed(pool, times=2), pytest.raises(ImageError) as refused:
        await pool.read(slow_png())
    assert refused.value.code == "image_parse_error"
    assert (await pool.read(png(picture()))).pixels_count == 70 * 90
    assert len(pool.worker_pids()) == 1


async def test_I18_an_image_that_uses_up_its_processor_time_is_not_tried_again(pool: DecodePool) -> None:
    # The signal that the kernel sends then.
    with workers_killed(pool, times=1, by=signal.SIGXCPU) as killed, pytest.raises(ImageError) as refused:
        await pool.read(slow_png())
    assert refused.value.code == "image_parse_error"
    assert len(killed) == 1
    assert (await pool.read(png(picture()))).pixels_count == 70 * 90


async def test_I18_an_image_past_its_deadline_is_refused_and_its_worker_ended() -> None:
    pool = make_pool(timeout_s=0.005)
    await pool.start()
    pids = pool.worker_pids()
    with pytest.raises(ImageError) as refused:
        await pool.read(slow_png())
    assert refused.value.code == "image_parse_error"
    assert "time" in refused.value.message
    assert not any(map(is_alive, pids))
    await pool.close()


async def test_I5_memory_is_limited() -> None:
    pool = make_pool(memory_mb=256, max_pixels=10**9)
    await pool.start()
    with pytest.raises(ImageError) as refused:
        await pool.read(png(Image.new("1", (12000, 12000))))
    assert refused.value.code == "image_too_large"
    assert (await pool.read(png(picture()))).pixels_count == 70 * 90
    await pool.close()


async def test_I18_processor_time_is_limited() -> None:
    pool = make_pool()
    await pool.start()
    (pid,) = pool.worker_pids()
    await pool.read(png(picture()))
    limits = {line[:26].strip(): line[26:].split()[0] for line in of_process(pid, "limits").splitlines()}
    assert 20 <= int(limits["Max cpu time"]) <= 23
    assert int(limits["Max address space"]) == 1024 << 20
    assert limits["Max core file size"] == "0"
    await pool.close()


async def test_workers_are_small_and_hold_no_secrets(pool: DecodePool, monkeypatch: pytest.MonkeyPatch) -> None:
    await pool.read(png(picture()))
    (pid,) = pool.worker_pids()
    mapped = of_process(pid, "maps")
    assert "numpy" in mapped
    for unwanted in ("torch", "pydantic", "uvloop", "zmq"):
        assert unwanted not in mapped
    names = {entry.partition("=")[0] for entry in of_process(pid, "environ").split("\0") if entry}
    assert names <= {"PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}
    status = dict(line.split(":", 1) for line in of_process(pid, "status").splitlines())
    assert int(status["VmRSS"].split()[0]) < 100_000
    assert int(status["Threads"]) == 1


async def test_closing_leaves_no_process_and_no_file() -> None:
    before = open_files()
    pool = make_pool(workers=2)
    await pool.start()
    pids = pool.worker_pids()
    assert len(pids) == 2
    jobs = [asyncio.create_task(pool.read(data)) for data in (slow_png(), png(picture()))]
    await asyncio.sleep(0.02)
    await pool.close()
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert isinstance(results[0], ServerFault)
    assert not any(map(is_alive, pids))
    assert pool.worker_pids() == []
    assert open_files() == before
    with pytest.raises(ServerFault):
        await pool.read(png(picture(1)))
    await pool.close()


async def test_one_caller_that_leaves_does_not_fail_the_other(pool: DecodePool) -> None:
    data = slow_png()
    leaver, stayer = (asyncio.create_task(pool.read(data)) for _ in range(2))
    await asyncio.sleep(0.01)
    leaver.cancel()
    with suppress(asyncio.CancelledError):
        await leaver
    assert (await stayer).pixels_count == 4400 * 4400
    assert pool.decoded_total == 1


async def test_an_image_that_takes_long_does_not_hold_up_the_others() -> None:
    pool = make_pool(workers=2)
    await pool.start()
    stuck = pool.worker_pids()[0]
    os.kill(stuck, signal.SIGSTOP)
    first_two = [asyncio.create_task(pool.read(png(picture(seed)))) for seed in (0, 1)]
    done, waiting = await asyncio.wait(first_two, return_when=asyncio.FIRST_COMPLETED)
    assert (len(done), len(waiting)) == (1, 1)
    for seed in range(2, 7):
        await pool.read(png(picture(seed)))
    os.kill(stuck, signal.SIGCONT)
    await asyncio.gather(*first_two)
    assert pool.decoded_total == 7
    await pool.close()


async def test_workers_that_cannot_start_are_our_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    pool = make_pool()
    with pytest.raises(ServerFault):
        await pool.start()
    assert pool.worker_pids() == []


def test_lost_workers_are_noticed_at_once_under_the_servers_event_loop() -> None:
    async def main() -> None:
        pool = make_pool(workers=3, timeout_s=60.0)
        await pool.start()
        for pid in pool.worker_pids():
            files = os.listdir(f"/proc/{pid}/fd")
            assert sorted(files) == ["0", "1", "2"]
        started = time.monotonic()
        with workers_killed(pool, times=1):
            await asyncio.gather(*(pool.read(data) for data in (slow_png(), png(picture(1)), png(picture(2)))))
        assert time.monotonic() - started < 30
        await pool.close()

    uvloop.run(main())


def test_workers_end_with_the_process_that_started_them() -> None:
    code = (
        "import asyncio, os, signal\n"
        "from tests_pool import make_pool\n"
        "async def main():\n"
        "    pool = make_pool(workers=2)\n"
        "    await pool.start()\n"
        "    print(*pool.worker_pids(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    loader = (
        "import importlib.util, sys\n"
        f"sys.path.append({str(Path(__file__).parents[1])!r})\n"
        f"spec = importlib.util.spec_from_file_location('tests_pool', {__file__!r})\n"
        "sys.modules['tests_pool'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
    )
    ended = subprocess.run([sys.executable, "-c", loader + code], capture_output=True, text=True, timeout=60)
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2, ended.stderr
    deadline = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_alive, pids))
