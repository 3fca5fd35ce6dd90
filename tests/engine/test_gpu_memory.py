"""`--gpu-memory`, shown without a GPU: what is told to torch, what is left for the cache, and the sentences."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import Album, make_prompt, make_request, picture, run

from sightline_models.config import read_config
from sightline_models.kv import KvPool
from sightline_models.parameter_count import kv_bytes_per_token
from sightline_models.presets import demo_checkpoint
from sightline_models.vlm import Vlm
from sightline_server.engine import gpu_memory, load, sizing
from sightline_server.engine.bounds import images_per_step
from sightline_server.engine.gpu_memory import Needs, room_for_cache, why_too_little
from sightline_server.engine.load import limit_memory
from sightline_server.engine.types import EngineConfig
from sightline_server.settings import Settings, SettingsError

LIMITS = EngineConfig(
    num_blocks=1,
    block_size=4,
    max_model_len=128,
    max_step_tokens=64,
    max_running=16,
    max_queue=16,
    encoder_cache_bytes=2**20,
)
CUDA = torch.device("cuda:0")
GIB, MIB = 2**30, 2**20
NEEDS = Needs(weights=13 * GIB, step=2 * GIB, encoder_cache=GIB // 4, smallest_cache=GIB // 2)


def test_torch_is_held_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *arguments: told.append(arguments))
    limit_memory(20 * GIB, CUDA)
    assert told == [(0.25, CUDA)]
    limit_memory(0, CUDA)
    assert len(told) == 1
    with pytest.raises(SettingsError, match=r"--gpu-memory 81\.00 GiB is more than the 80\.00 GiB of cuda:0"):
        limit_memory(81 * GIB, CUDA)


def test_without_a_gpu_the_limit_is_said_to_have_no_effect(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *arguments: 1 / 0)
    limit_memory(20 * GIB, torch.device("cpu"))
    assert "--gpu-memory has no effect without a GPU" in caplog.text


def test_the_cache_gets_what_the_limit_leaves() -> None:
    # Slack is a fiftieth.
    assert room_for_cache(20 * GIB, 60 * GIB, NEEDS) == 20 * GIB - 20 * GIB // 50 - NEEDS.beside_cache


def test_the_cache_is_smaller_where_others_hold_the_gpu() -> None:
    assert room_for_cache(20 * GIB, 4 * GIB, NEEDS) == 4 * GIB - 20 * GIB // 50 - NEEDS.step - NEEDS.encoder_cache
    assert why_too_little(20 * GIB, 4 * GIB, NEEDS) is None
    sentence = why_too_little(20 * GIB, 5 * GIB // 2, NEEDS)
    assert sentence is not None
    assert "the GPU has 2.50 GiB free beside our weights, too little for weights 13.00 GiB" in sentence
    assert sentence.endswith("End what else runs there, or use --quantize nf4.")


def test_a_limit_that_is_too_low_says_which_is_not() -> None:
    sentence = why_too_little(14 * GIB, 60 * GIB, NEEDS)
    assert sentence is not None
    assert "weights 13.00 GiB, the largest step 2.00 GiB, the encoder cache 0.25 GiB and a cache" in sentence
    assert "use --quantize nf4, or lower --max-step-tokens" in sentence
    wanted = int(sentence.partition("Raise it to ")[2].partition("MiB")[0])
    assert why_too_little(wanted * MIB, 60 * GIB, NEEDS) is None
    assert why_too_little((wanted - 2) * MIB, 60 * GIB, NEEDS) is not None


def planted_gpu(monkeypatch: pytest.MonkeyPatch, *, weights: int, step: int, held: int, free: int) -> None:
    """A GPU on which our weights lie and the largest step allocates ``step`` bytes, for which torch holds ``held``."""
    before = {"memory_allocated": weights - 1000, "memory_reserved": weights}
    after = {"max_memory_allocated": weights - 1000 + step, "max_memory_reserved": weights + held}
    for name, size in (before | after).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    monkeypatch.setattr(sizing, "allocate_cache", lambda *arguments: None)
    monkeypatch.setattr(sizing, "run_largest_step", lambda *arguments: None)


def test_blocks_are_counted_under_the_limit(tiny: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    planted_gpu(monkeypatch, weights=600 * MIB, step=90 * MIB, held=100 * MIB, free=60 * GIB)
    settings = Settings(gpu_memory=GIB)
    blocks = sizing.count_blocks(tiny, settings, CUDA, torch.float32, LIMITS)
    a_block = KvPool.bytes_per_block(tiny.config.decoder, block_size=4, dtype=torch.float32)
    left = GIB - gpu_memory.slack(GIB) - 600 * MIB - 100 * MIB - LIMITS.encoder_cache_bytes
    assert blocks == left // a_block - 1
    images = images_per_step(tiny.config, LIMITS.max_step_tokens)
    recorded = sizing.count_blocks(tiny, settings, CUDA, torch.float32, replace(LIMITS, graphs=True))
    assert (
        recorded
        == (left - gpu_memory.bytes_of_recordings(tiny.config, max_running=16, max_images=images, decodes=False))
        // a_block
        - 1
    )
    assert settings.gpu_memory_utilization * 80 * GIB > 2 * GIB, "the share, which is unused, would give far more"


def test_weights_and_step_beyond_the_limit_stop_the_start(tiny: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    planted_gpu(monkeypatch, weights=950 * MIB, step=90 * MIB, held=100 * MIB, free=60 * GIB)
    with pytest.raises(SettingsError, match=r"--gpu-memory 1\.00 GiB is too little: weights 0\.93 GiB"):
        sizing.count_blocks(tiny, Settings(gpu_memory=GIB), CUDA, torch.float32, LIMITS)
    # A context that is asked for must fit.
    planted_gpu(monkeypatch, weights=600 * MIB, step=90 * MIB, held=100 * MIB, free=60 * GIB)
    settings = Settings(gpu_memory=GIB, max_model_len=10**6)
    with pytest.raises(SettingsError, match=r"a cache for one request 0\.48 GiB"):
        sizing.count_blocks(tiny, settings, CUDA, torch.float32, LIMITS)


@pytest.mark.gpu
def test_an_engine_on_a_gpu_checks_its_weights_and_stays_under_its_limit() -> None:
    limit = 4 * GIB
    settings = Settings(device="cuda", gpu_memory=limit, quantize="nf4", verify=True)
    torch.cuda.reset_peak_memory_stats()
    try:
        engine, info = load.load_engine(demo_checkpoint(), settings, lambda stage, share: None)
        assert torch.cuda.max_memory_reserved() <= limit
        assert info.verification is not None
        assert info.verification.outcome == "compared", info.verification.message
        assert info.verification.mean_kl is not None
        assert 0 < info.verification.mean_kl < 0.05
        used = (
            info.num_blocks * info.block_size * kv_bytes_per_token(read_config(demo_checkpoint()).decoder, info.dtype)
        )
        assert used > limit // 4, "the cache is what the limit leaves"
        album, model = Album(), engine._runner._model
        size = model.config.vision.image_size
        requests = [
            make_request(f"r{i}", make_prompt(model, album, [20, picture(size, i), 9], seed=i), max_tokens=40)
            for i in range(64)
        ]
        answers = run(engine, requests, album)
        assert all(len(answer.token_ids) == 40 for answer in answers.values())
        assert torch.cuda.max_memory_reserved() <= limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
