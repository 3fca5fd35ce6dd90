"""What fits: the plan equals what the engine does, under a share, under a limit and on a card that isn't there."""

import io
from pathlib import Path

import pytest
import torch
from planned_machines import GIB, GPU_MACHINE, NO_GPU, WITH_GPU, examined, machine, torch_gpu
from rich.console import Console

from sightline_kernels.paged_attention import reference
from sightline_models.presets import demo_checkpoint, write_preset
from sightline_models.tiny import write_checkpoint
from sightline_server.cli import diagnosis, doctor
from sightline_server.cli import fit as fit_module
from sightline_server.cli.fit import TEXT_TOKENS, Memory, plan, precisions
from sightline_server.cli.machine import TorchView
from sightline_server.settings import Settings


@pytest.fixture(scope="module")
def shape_7b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape") / "llava-1.5-7b"
    write_preset("llava-1.5-7b", folder)
    return doctor.read_config(folder)


def test_a_gpu_holds_weights_step_and_cache(shape_7b):
    memory = Memory(is_gpu=True, total=24 * GIB, free=23 * GIB)
    fit = plan("m", shape_7b, "bfloat16", memory, Settings())
    assert fit.fits
    assert fit.kv_bytes_per_token == 512 * 1024
    held = fit.weight_bytes + fit.cache_tokens * fit.kv_bytes_per_token
    assert 0.80 * 24 * GIB < held + GIB < 0.9 * 24 * GIB
    assert not plan("m", shape_7b, "float32", memory, Settings()).fits
    crowded = plan("m", shape_7b, "bfloat16", Memory(is_gpu=True, total=24 * GIB, free=12 * GIB), Settings())
    assert (crowded.fits, crowded.cache_tokens, crowded.max_context) == (False, 0, 0)


def test_a_cpu_holds_the_cache_that_is_set(shape_7b):
    memory = Memory(is_gpu=False, total=32 * GIB, free=20 * GIB)
    fit = plan("m", shape_7b, "bfloat16", memory, Settings())
    assert fit.fits
    assert fit.cache_tokens == 2048 - 16
    assert fit.max_context == fit.cache_tokens
    assert not plan("m", shape_7b, "bfloat16", memory, Settings(cpu_cache_gb=6.0)).fits
    assert not plan("m", shape_7b, "bfloat16", memory, Settings(max_model_len=4096)).fits


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16", "block_size": 7, "max_model_len": 300}])
def test_the_plan_is_what_the_engine_does(quantize, changes):
    """The true engine's figures on a CPU, where nothing is estimated: weights and cache to the byte."""
    from sightline_server.engine.load import load_engine

    settings = Settings(device="cpu", threads=1, cpu_cache_gb=0.01, quantize=quantize, **changes)
    engine, info = load_engine(demo_checkpoint(), settings, lambda stage, share: None)
    rest = info.dtype
    memory = Memory(is_gpu=False, total=64 * GIB, free=64 * GIB)
    precision = rest if quantize == "none" else quantize
    fit = plan("demo", doctor.read_config(demo_checkpoint()), precision, memory, settings, rest=rest)
    assert (fit.cache_tokens, fit.max_context) == (info.kv_tokens, info.max_model_len)
    assert fit.weight_bytes == info.weight_bytes
    kv = engine._runner._kv
    assert fit.kv_bytes == kv.k_LNPGD.nbytes + kv.v_LNPGD.nbytes


def test_as_many_requests_run_at_once_as_was_planned(tmp_path):
    """In the true engine: so many with a picture each run to their ends side by side, and one more has to wait."""
    from engines import Album, make_prompt, make_request, picture, run
    from oracle import CLIP_NORMALIZATION

    from sightline_models.weights import random_vlm
    from sightline_server.engine.load import assemble
    from sightline_server.engine.types import EngineConfig

    write_preset("tiny", tmp_path)
    config = doctor.read_config(tmp_path)
    settings = Settings(block_size=16, cpu_cache_gb=0.0005, encoder_cache_mb=16)
    memory = Memory(is_gpu=False, total=64 * GIB, free=64 * GIB)
    fit = plan("tiny", config, "float32", memory, settings)
    assert 3 < fit.requests < 20
    model = random_vlm(config, CLIP_NORMALIZATION, dtype=torch.float32, device=torch.device("cpu"), seed=1)

    def preemptions(count):
        album = Album()
        requests = []
        for index in range(count):
            prompt = make_prompt(model, album, [64, picture(32, index)], seed=index)
            requests.append(make_request(f"r{index}", prompt, max_tokens=TEXT_TOKENS - 64))
        limits = EngineConfig(
            num_blocks=fit.cache_tokens // 16,
            block_size=16,
            max_model_len=2048,
            max_step_tokens=4096,
            max_running=256,
            max_queue=256,
            encoder_cache_bytes=2**24,
        )
        engine = assemble(model, limits, device=torch.device("cpu"), dtype=torch.float32)
        most = 0
        true_step = engine.step

        def step():
            nonlocal most
            events = true_step()
            most = max(most, engine.stats().running)
            return events

        engine.step = step
        run(engine, requests, album)
        return most, engine.stats().preemptions_total

    assert preemptions(fit.requests) == (fit.requests, 0)
    most, preempted = preemptions(fit.requests + 1)
    assert most <= fit.requests or preempted > 0


def test_what_plain_torch_gathers_is_what_the_plan_counts():
    assert reference.GATHERED_BYTES == fit_module.GATHERED_BYTES


def test_precisions_of_an_old_gpu():
    gpu = Memory(is_gpu=True, total=1, free=1)
    assert precisions(gpu, gpu_bfloat16=False) == ("float32", "float16", "int8", "nf4")
    assert precisions(gpu, gpu_bfloat16=True)[1] == "bfloat16"


def test_a_limit_in_bytes_bounds_the_plan(shape_7b):
    memory = Memory(is_gpu=True, total=80 * GIB, free=79 * GIB)
    share, limited = (plan("m", shape_7b, "bfloat16", memory, s) for s in (Settings(), Settings(gpu_memory=20 * GIB)))
    assert share.cache_tokens > 5 * limited.cache_tokens > 0
    held = limited.weight_bytes + limited.kv_bytes
    assert 17 * GIB < held < 20 * GIB - GIB // 4
    assert limited.requests == limited.cache_tokens // 16 // ((576 + 128) // 16)
    assert plan("m", shape_7b, "nf4", memory, Settings(gpu_memory=20 * GIB)).requests > 2 * limited.requests
    assert not plan("m", shape_7b, "bfloat16", memory, Settings(gpu_memory=14 * GIB)).fits
    # As much as others leave, and not as much as the limit allows.
    crowded = Memory(is_gpu=True, total=80 * GIB, free=18 * GIB)
    assert plan("m", shape_7b, "bfloat16", crowded, Settings(gpu_memory=20 * GIB)).kv_bytes < limited.kv_bytes


def test_a_card_that_is_not_there_is_planned_for(monkeypatch):
    report = examined(monkeypatch, machine(), NO_GPU, environ={"SIGHTLINE_GPU_MEMORY": "24GiB"})
    assert report.choice.planned
    assert (report.choice.device, report.served.precision) == ("a GPU of 24 GiB", "bfloat16")
    real = examined(
        monkeypatch, machine(**GPU_MACHINE), TorchView(error=None, gpus=(torch_gpu(free_bytes=int(23.5 * GIB)),))
    )
    assert report.fits == real.fits, "a card of that size with nothing else on it"
    assert report.findings == ()
    assert report.as_json()["device"]["planned"] is True
    shown = io.StringIO()
    report.show(Console(file=shown, width=100))
    assert "What fits on a GPU of 24 GiB, 23.5 GiB free" in shown.getvalue()
    assert "It would fit. On a GPU of 24 GiB: sightline serve\n" in shown.getvalue()
    asked = {"SIGHTLINE_GPU_MEMORY": "24GiB", "SIGHTLINE_VERIFY": "on", "SIGHTLINE_QUANTIZE": "nf4"}
    unchecked = examined(monkeypatch, machine(), NO_GPU, environ=asked)
    assert unchecked.verification is None
    assert "--verify loads the model, which it can't on a GPU of 24 GiB" in unchecked.findings[0].sentence


def test_a_limit_on_a_card_that_is_there(monkeypatch, tmp_path):
    write_checkpoint(tmp_path)
    limit = {"SIGHTLINE_GPU_MEMORY": "16GiB"}
    report = examined(monkeypatch, machine(**GPU_MACHINE), WITH_GPU, model=tmp_path, environ=limit)
    assert (report.choice.planned, report.choice.device) == (False, "cuda:0")
    whole = examined(monkeypatch, machine(**GPU_MACHINE), WITH_GPU, model=tmp_path)
    by_name = {(fit.model, fit.precision): fit for fit in whole.fits}
    for fit in report.fits:
        assert fit.cache_tokens < by_name[fit.model, fit.precision].cache_tokens or not fit.fits
    shown = io.StringIO()
    report.show(Console(file=shown, width=120))
    assert "23 GiB free, within 16 GiB" in shown.getvalue()
    assert "(--gpu-memory 16 GiB, estimated)" in shown.getvalue()
    assert shown.getvalue().rstrip().endswith(f"serve {tmp_path} --gpu-memory 16GiB")


def test_a_limit_too_low_for_a_model_gets_the_flags_that_help(shape_7b):
    settings = Settings(gpu_memory=12 * GIB)
    checkpoint = diagnosis.Checkpoint(name="m", folder=Path("m"), config=shape_7b, disk_bytes=14 * GIB, num_files=3)
    choice = diagnosis.choose(machine(**GPU_MACHINE), WITH_GPU, settings)
    fit = diagnosis.plan_served(checkpoint, choice, settings)
    finding = diagnosis.fit_finding(checkpoint, fit, choice, settings, "/m")
    assert diagnosis.limit_flag(choice, Settings(gpu_memory=16 * 10**9)) == "--gpu-memory 16GB"
    assert diagnosis.limit_flag(choice, Settings(gpu_memory=2**30 + 1)) == f"--gpu-memory {2**30 + 1}"
    assert finding is not None
    assert "and --gpu-memory allows 12 GiB" in finding.sentence
    assert finding.fix == "sightline serve /m --quantize int8 --gpu-memory 12GiB"


def test_a_model_too_big_gets_the_flags_that_help(monkeypatch, shape_7b):
    settings = Settings(device="cpu")
    checkpoint = diagnosis.Checkpoint(
        name="m", folder=Path("m"), config=shape_7b, disk_bytes=14 * GIB, num_files=3
    )  # fmt: skip

    def advice(free):
        choice = diagnosis.choose(machine(memory_free=free), NO_GPU, settings)
        fit = plan("m", shape_7b, "float32", choice.memory, settings)
        finding = diagnosis.fit_finding(checkpoint, fit, choice, settings, "/m")
        return finding and finding.fix

    assert advice(40 * GIB) is None
    assert advice(20 * GIB) == "sightline serve /m --dtype bfloat16"
    assert advice(15 * GIB) == "sightline serve /m --dtype bfloat16 --cpu-cache-gb 0.5"
    assert advice(11 * GIB) == "sightline serve /m --dtype bfloat16 --quantize int8"
    assert advice(8 * GIB) == "sightline serve /m --dtype bfloat16 --quantize nf4"
    assert "smaller model" in advice(4 * GIB)


def test_engines_divide_a_cpus_cache_and_each_holds_the_weights(shape_7b):
    memory = Memory(is_gpu=False, total=64 * GIB, free=40 * GIB)
    one = plan("m", shape_7b, "bfloat16", memory, Settings(cpu_cache_gb=4.0))
    two = plan("m", shape_7b, "bfloat16", memory, Settings(cpu_cache_gb=4.0, engines=2))
    assert (one.fits, two.fits) == (True, True)
    assert two.weight_bytes == one.weight_bytes
    # An engine's scratch block is no room.
    assert one.cache_tokens - two.cache_tokens == 16
    assert two.kv_bytes == one.kv_bytes
    assert two.max_context == two.cache_tokens // 2
    assert two.needed_bytes - one.needed_bytes > one.weight_bytes
    assert not plan("m", shape_7b, "bfloat16", memory, Settings(cpu_cache_gb=4.0, engines=3)).fits


def test_each_of_several_gpus_is_planned_like_the_first(shape_7b):
    memory = Memory(is_gpu=True, total=24 * GIB, free=23 * GIB)
    one = plan("m", shape_7b, "bfloat16", memory, Settings(device="cuda"))
    two = plan("m", shape_7b, "bfloat16", memory, Settings(device="cuda:0,cuda:1"))
    assert (two.needed_bytes, two.max_context) == (one.needed_bytes, one.max_context)
    assert (two.cache_tokens, two.requests) == (2 * one.cache_tokens, 2 * one.requests)
