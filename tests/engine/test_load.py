"""How a cache is sized and a GPU made ready, shown without a GPU."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Album, make_prompt, make_request, picture, run
from live_bytes import LiveBytes

from sightline_kernels.dispatch import REFERENCES
from sightline_kernels.layout import PagedLayout
from sightline_kernels.paged_attention import reference as paged_attention
from sightline_models.kv import KvPool
from sightline_models.presets import write_preset
from sightline_models.vlm import Vlm
from sightline_server.engine import load, sizing
from sightline_server.engine.bounds import images_per_step
from sightline_server.engine.gpu_memory import bytes_of_recordings
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


def test_the_largest_step_runs_within_its_cache(tiny: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    kv = KvPool.allocate(
        tiny.config.decoder, num_blocks=17, block_size=4, dtype=torch.float32, device=torch.device("cpu")
    )
    memory = LiveBytes([*tiny.parameters(), *tiny.buffers(), kv.k_LNPGD, kv.v_LNPGD])
    rows: list[tuple[str, int]] = []
    layouts: list[PagedLayout] = []
    held: list[int] = []
    for name in ("encode_images", "forward", "logits"):
        true = getattr(Vlm, name)

        def counted(self: Vlm, first: torch.Tensor, *rest: Any, name: str = name, true: Any = true) -> torch.Tensor:
            rows.append((name, len(first)))
            if name == "forward":
                layouts.append(rest[-1])
                held.append(memory.live - first.nbytes)
            made: torch.Tensor = true(self, first, *rest)
            return made

        monkeypatch.setattr(Vlm, name, counted)
    with memory:
        sizing.run_largest_step(tiny, kv, LIMITS, torch.device("cpu"))
    images = images_per_step(tiny.config, 64)
    assert rows == [("encode_images", images), ("forward", 64), ("forward", 64), ("logits", 16)]
    assert kv.k_LNPGD[:, :16].abs().sum(-1).all()
    assert not kv.k_LNPGD[:, 16].any()
    # A chunk that looks back at a whole context; then all but one decode at theirs, and a chunk in the rest.
    assert [layout.query_lens for layout in layouts] == [(64,), (1,) * 15 + (49,)]
    assert [layout.context_lens for layout in layouts] == [(128,), (128,) * 16]
    # What was encoded lives on while the decoder runs.
    assert min(held) >= images * tiny.config.num_image_tokens * tiny.config.decoder.hidden_size * 4

    layouts.clear()
    sizing.run_largest_step(tiny, kv, replace(LIMITS, max_model_len=50), torch.device("cpu"))
    assert [layout.query_lens for layout in layouts] == [(50, 14), (1,) * 15 + (49,)]


def steps_peak(model: Vlm, limits: EngineConfig, seed: int) -> int:
    """The most bytes that the steps of a mixed run held, beside weights and cache."""
    album, size = Album(), model.config.vision.image_size
    rng = random.Random(seed)
    asked: dict[str, Any] = {"temperature": 1.0, "top_p": 0.5, "logit_bias": {0: 0.0}, "logprobs": True}
    requests = []
    for index in range(40):
        parts: list[Any] = [rng.randint(1, 12)]
        for _ in range(rng.randint(0, 4)):
            parts += [picture(size, rng.randint(0, 30)), rng.randint(1, 6)]
        prompt = make_prompt(model, album, parts, seed=index)
        tokens = rng.choice([1, 20, limits.max_model_len - len(prompt.token_ids)])
        requests.append(make_request(f"r{index}", prompt, seed=index, **asked | {"max_tokens": tokens}))
    engine = load.assemble(model, limits, device=torch.device("cpu"), dtype=torch.float32)
    kv = engine._runner._kv
    with LiveBytes([*model.parameters(), *model.buffers(), kv.k_LNPGD, kv.v_LNPGD]) as memory:
        run(engine, requests, album)
    return memory.peak


@pytest.mark.parametrize("limits", [LIMITS, replace(LIMITS, max_model_len=50), replace(LIMITS, max_running=4)])
@pytest.mark.parametrize("path", ["cpu", "gpu"])
def test_no_step_needs_more_memory_than_the_largest(
    path: str, tiny: Vlm, limits: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures, prompts in chunks, decodes at their contexts' ends and all of sampling, against what was measured."""
    if path == "gpu":
        monkeypatch.setattr(paged_attention, "can_attend_in_place", lambda *_arguments: False)
        monkeypatch.setattr(paged_attention, "can_attend_by_blocks", lambda *_arguments: False)
    kv = KvPool.allocate(
        tiny.config.decoder, num_blocks=17, block_size=4, dtype=torch.float32, device=torch.device("cpu")
    )
    with LiveBytes([*tiny.parameters(), *tiny.buffers(), kv.k_LNPGD, kv.v_LNPGD]) as memory:
        sizing.run_largest_step(tiny, kv, limits, torch.device("cpu"))
    an_image = tiny.config.num_image_tokens * tiny.config.decoder.hidden_size * 4
    limits = replace(limits, num_blocks=400, encoder_cache_bytes=8 * an_image)
    peaks = [steps_peak(tiny, limits, seed) for seed in range(2)]
    assert max(peaks) <= memory.peak + limits.encoder_cache_bytes
    assert max(peaks) > 0.4 * memory.peak, "the run came nowhere near the largest step, so it shows nothing"


def test_a_gpus_cache_is_its_share_less_what_others_hold_and_a_step_needs(
    tiny: Vlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache that the largest step itself runs in is part of the cache, not beside it."""
    allocated = [1_000]
    peak = [0]

    def allocate(*_arguments: Any) -> None:
        allocated[0] += 500_000

    def step(*_arguments: Any) -> None:
        peak[0] = allocated[0] + 700_000

    monkeypatch.setattr(sizing, "allocate_cache", allocate)
    monkeypatch.setattr(sizing, "run_largest_step", step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6_000_000, 10_000_000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[0])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: allocated[0] + 50_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peak[0] + 90_000)
    settings = Settings(gpu_memory_utilization=0.9)
    blocks = sizing.count_blocks(tiny, settings, torch.device("cuda:0"), torch.float32, LIMITS)
    a_block = KvPool.bytes_per_block(tiny.config.decoder, block_size=4, dtype=torch.float32)
    assert blocks == (9_000_000 - 4_000_000 - 700_000 - 2**20) // a_block - 1
    images = images_per_step(tiny.config, LIMITS.max_step_tokens)
    recordings = bytes_of_recordings(tiny.config, max_running=LIMITS.max_running, max_images=images, decodes=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    whole, rest = (
        sizing.count_blocks(tiny, settings, torch.device("cuda:0"), torch.float32, replace(LIMITS, graphs=graphs))
        for graphs in (False, True)
    )
    assert (whole - rest) * a_block == pytest.approx(recordings, abs=2 * a_block)


def test_the_gpu_asked_for_becomes_the_current_one_before_its_precision_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: told.append(("cudnn", enabled)))

    def choose_dtype(*_arguments: Any) -> torch.dtype:
        raise RuntimeError("far enough")

    monkeypatch.setattr(load, "choose_dtype", choose_dtype)
    monkeypatch.setattr(load, "read_config", lambda folder: None)
    with pytest.raises(RuntimeError, match="far enough"):
        load.load_engine(tmp_path, Settings(device="cuda:1"), lambda stage, share: None)
    assert told == [torch.device("cuda:1"), ("cudnn", False)]
    told.clear()
    load.use_device(torch.device("cpu"))
    assert told == []


def test_a_cache_larger_than_the_machine_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    write_preset("tiny", tmp_path)
    # More than the address space of a process, so that no machine has it, however it counts memory.
    with pytest.raises(SettingsError, match=r"1000000\.0 GiB.*--cpu-cache-gb"):
        load.load_engine(
            tmp_path, Settings(device="cpu", random="tiny", threads=1, cpu_cache_gb=1e6), lambda stage, share: None
        )


def test_fused_kernels_where_they_cannot_run_are_refused_by_the_settings_name(tiny: Vlm) -> None:
    cpu = torch.device("cpu")
    for mode in ("auto", "reference"):
        assert load.choose_kernels(Settings(kernels=mode), tiny.config, cpu, torch.float32, "int8") is REFERENCES
    with pytest.raises(SettingsError, match=r"^--kernels fused: .*this is a CPU\. Use --kernels auto\.$"):
        load.choose_kernels(Settings(kernels="fused"), tiny.config, cpu, torch.float32, "none")


_LOADS_AND_ANSWERS = """
import sys
from pathlib import Path

from sightline_models.presets import demo_checkpoint
from sightline_server.engine.load import load_engine
from sightline_server.engine.types import Prompt, Request, SamplingParams
from sightline_server.settings import Settings

engine, info = load_engine(demo_checkpoint(), Settings(device="cpu", quantize="{quantize}"), lambda stage, share: None)
engine.add(Request(id="first", prompt=Prompt((20, 21, 22)), sampling=SamplingParams(max_tokens=2, logprobs=True)))
while engine.has_work:
    engine.step()
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
"""


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_an_engine_that_compiles_nothing_does_not_import_the_compiler(quantize: str) -> None:
    # It takes as long as all the rest of torch, and an engine that died is missed meanwhile.
    code = _LOADS_AND_ANSWERS.format(quantize=quantize)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
