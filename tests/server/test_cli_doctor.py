"""`sightline doctor`: facts read from files, verdicts from planned machines, and the command on this one."""

import dataclasses
import functools
import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sightline_models.parameter_count import kv_bytes_per_token
from sightline_models.presets import demo_checkpoint, write_preset
from sightline_models.tiny import write_checkpoint
from sightline_server import settings as settings_table
from sightline_server.cli import diagnosis, doctor, verified
from sightline_server.cli.fit import Memory, plan, precisions
from sightline_server.cli.machine import (
    DriverGpu,
    Machine,
    TorchGpu,
    TorchView,
    read_cpuinfo,
    read_machine,
    read_nvidia_smi,
    read_probe,
)
from sightline_server.cli.terminal import size
from sightline_server.engine import cgroups
from sightline_server.engine.types import EngineInfo, Pace, Verification
from sightline_server.settings import Settings

GIB = 2**30

DRIVER_GPU = DriverGpu(name="NVIDIA A10", total_bytes=24 * GIB, driver="550.54", capability="8.6")


def machine(**changes):
    facts = {
        "cpu": "Some CPU",
        "architecture": "x86_64",
        "cores": 8,
        "allowed_cores": 8,
        "cpu_quota": None,
        "features": ("AVX2",),
        "memory_total": 64 * GIB,
        "memory_free": 48 * GIB,
        "memory_limited": False,
        "driver_gpus": (),
        "nvidia_devices": 0,
        "open_files": 4096,
        "in_container": False,
    }
    return Machine(**facts | changes)


def torch_gpu(**changes):
    facts = {
        "index": 0,
        "name": "NVIDIA A10",
        "total_bytes": 24 * GIB,
        "free_bytes": 23 * GIB,
        "capability": "8.6",
        "bfloat16": True,
        "error": None,
    }
    return TorchGpu(**facts | changes)


SHAPES = functools.cache(doctor.read_shape)

NO_GPU = TorchView(error=None, cuda_build="13.2", reason="Found no NVIDIA driver")
WITH_GPU = TorchView(error=None, cuda_build="13.2", gpus=(torch_gpu(),))
GPU_MACHINE = {"driver_gpus": (DRIVER_GPU,), "nvidia_devices": 1}


def examined(monkeypatch, found, torch, *, model="", device="auto", environ=None):
    """The doctor's report on a planned machine."""

    class Probe:
        def result(self):
            return torch

    monkeypatch.setattr(doctor, "read_machine", lambda: found)
    monkeypatch.setattr(doctor, "TorchProbe", Probe)
    monkeypatch.setattr(doctor, "is_port_taken", lambda host, port: False)
    monkeypatch.setattr(doctor, "read_shape", SHAPES)
    return doctor.examine(settings_table.load({"model": str(model), "device": device}, environ or {}))


# Facts


def test_cpuinfo_of_intel_and_arm():
    intel = (
        "processor : 0\nmodel name  : Intel(R)  Xeon(R)\nflags : fpu avx2 avx512f amx_tile amx_bf16\n\nprocessor : 1\n"
    )
    assert read_cpuinfo(intel) == ("Intel(R) Xeon(R)", ("AVX2", "AVX-512", "AMX", "AMX BF16"))
    assert read_cpuinfo("Features\t: fp asimd sve bf16\n") == ("", ("NEON", "SVE", "BF16"))
    assert read_cpuinfo("") == ("", ())


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_cgroup_v2_takes_the_tightest_limit_on_the_way_up(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    root = tmp_path / "root"
    write(root / "outer", cpu__max="150000 100000", memory__max="1000", memory__current="400")
    write(root / "outer" / "inner", cpu__max="max 100000", memory__max="max", memory__current="7")
    (root / "outer" / "memory.stat").write_text("anon 1\ninactive_file 100\n")
    assert cgroups.cpu_quota(root, own) == 1.5
    assert cgroups.memory_left(root, own) == 700


def test_cgroup_v1(tmp_path):
    own = tmp_path / "own"
    own.write_text("4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    root = tmp_path / "root"
    # A container sees its own group as the root of the mount.
    write(root / "cpu", cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    write(root / "memory", memory__limit_in_bytes="5000", memory__usage_in_bytes="6000")
    assert cgroups.cpu_quota(root, own) == 2
    assert cgroups.memory_left(root, own) == 0
    write(root / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(root / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="6000")
    assert cgroups.cpu_quota(root, own) is None
    assert cgroups.memory_left(root, own) is None


def test_no_cgroups(tmp_path):
    assert cgroups.cpu_quota(tmp_path, tmp_path / "none") is None
    assert cgroups.memory_left(tmp_path, tmp_path / "none") is None


def test_nvidia_smi_lines():
    gpus = read_nvidia_smi("NVIDIA H200, 143771, 570.124.06, 9.0\nOrin, [N/A], 540.4\n")
    assert gpus[0] == DriverGpu(name="NVIDIA H200", total_bytes=143771 * 2**20, driver="570.124.06", capability="9.0")
    assert gpus[1] == DriverGpu(name="Orin", total_bytes=0, driver="540.4", capability=None)


@pytest.mark.parametrize(
    ("status", "out", "err", "sentence"),
    [
        (-11, "", "", "SIGSEGV"),
        (1, "", "Traceback ...\nImportError: no libcuda\n", "no libcuda"),
        (0, '{"error": "broken \\u001b[31m"}', "", "broken [31m"),
        (0, "", "", "said nothing"),
    ],
)
def test_a_probe_that_fails_is_an_answer(status, out, err, sentence):
    assert sentence in (read_probe(status, out, err).error or "")


def test_this_machine():
    found = read_machine()
    assert 1 <= found.usable_cores <= found.cores
    assert 0 < found.memory_free <= found.memory_total


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 bytes"), (18 * 1024, "18 KiB"), (int(13.13 * GIB), "13.1 GiB"), (139 * GIB, "139 GiB")],
)
def test_size(number, shown):
    assert size(number) == shown


# What fits


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


def test_the_plan_is_what_the_engine_does():
    """The true engine's figures on a CPU, where nothing is estimated."""
    from sightline_server.engine.load import load_engine

    settings = Settings(device="cpu", cpu_cache_gb=0.01)
    _, info = load_engine(demo_checkpoint(), settings, lambda stage, share: None)
    assert isinstance(info, EngineInfo)
    memory = Memory(is_gpu=False, total=64 * GIB, free=64 * GIB)
    fit = plan("demo", doctor.read_config(demo_checkpoint()), "float32", memory, settings)
    assert (fit.cache_tokens, fit.max_context) == (info.kv_tokens, info.max_model_len)


def test_precisions_of_an_old_gpu():
    gpu = Memory(is_gpu=True, total=1, free=1)
    assert precisions(gpu, gpu_bfloat16=False) == ("float32", "float16", "int8", "nf4")
    assert precisions(gpu, gpu_bfloat16=True)[1] == "bfloat16"


# Verdicts


def test_a_plain_cpu_machine_is_ready(monkeypatch):
    report = examined(monkeypatch, machine(), NO_GPU)
    assert report.can_serve
    assert report.findings == ()
    assert (report.choice.device, report.choice.why) == ("cpu", "this machine has no NVIDIA GPU")
    assert report.served.precision == "float32"


def test_a_gpu_machine_takes_the_first_gpu(monkeypatch):
    report = examined(monkeypatch, machine(**GPU_MACHINE), WITH_GPU)
    assert report.choice.device == "cuda:0"
    assert report.served.precision == "bfloat16"
    fits = {(fit.model, fit.precision): fit.fits for fit in report.fits}
    assert fits["llava-1.5-7b", "bfloat16"]
    assert not fits["llava-1.5-13b", "bfloat16"]
    assert fits["llava-1.5-13b", "nf4"]
    assert examined(monkeypatch, machine(**GPU_MACHINE), WITH_GPU, device="cpu").choice.device == "cpu"


def test_a_gpu_without_bfloat16_serves_in_float16(monkeypatch):
    torch = TorchView(error=None, cuda_build="13.2", gpus=(torch_gpu(capability="7.5", bfloat16=False),))
    assert examined(monkeypatch, machine(**GPU_MACHINE), torch).served.precision == "float16"


@pytest.mark.parametrize(
    ("found", "torch", "environ_visible", "sentence", "fix"),
    [
        ({"nvidia_devices": 1}, NO_GPU, None, "no working driver", "ubuntu-drivers install"),
        ({"nvidia_devices": 1, "in_container": True}, NO_GPU, None, "started without it", "docker run --gpus all"),
        (GPU_MACHINE, TorchView(error=None), None, "built without CUDA", "pip install --force-reinstall torch"),
        (GPU_MACHINE, NO_GPU, "", "hides the GPU", "unset CUDA_VISIBLE_DEVICES"),
        (GPU_MACHINE, NO_GPU, None, "can't use driver 550.54", "NVIDIA driver"),
    ],
)
def test_a_gpu_that_is_not_used(monkeypatch, found, torch, environ_visible, sentence, fix):
    if environ_visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environ_visible)
    report = examined(monkeypatch, machine(**found), torch)
    (finding,) = report.findings
    assert finding.level == "warning"
    assert sentence in finding.sentence
    assert fix in finding.fix
    assert report.can_serve, "the CPU still serves"
    assert not examined(monkeypatch, machine(**found), torch, device="cuda").can_serve


@pytest.mark.parametrize(
    ("torch", "device", "sentence"),
    [
        (NO_GPU, "cuda", "no NVIDIA GPU"),
        (WITH_GPU, "cuda:3", "the last one is cuda:0"),
        (TorchView(error=None, cuda_build="13", gpus=(torch_gpu(free_bytes=None, error="ECC"),)), "auto", "ECC"),
        (TorchView(error="no libcudart"), "auto", "no libcudart"),
    ],
)
def test_problems_end_in_not_ready(monkeypatch, torch, device, sentence):
    found = machine(**({} if torch is NO_GPU else GPU_MACHINE))
    report = examined(monkeypatch, found, torch, device=device)
    assert not report.can_serve
    assert any(sentence in finding.sentence for finding in report.findings if finding.level == "problem")


def test_limits_of_the_process(monkeypatch):
    report = examined(monkeypatch, machine(open_files=256, cpu_quota=1.5, features=()), NO_GPU)
    assert [finding.fix for finding in report.findings] == [
        "ulimit -n 4096",
        "sightline serve --threads 1",
        "use a machine with a GPU or a newer processor",
    ]
    assert report.can_serve
    quiet = examined(monkeypatch, machine(cpu_quota=1.5), NO_GPU, environ={"SIGHTLINE_THREADS": "1"})
    assert quiet.findings == ()


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


def test_a_quantized_model_is_planned_as_it_would_be_served(monkeypatch, tmp_path):
    write_checkpoint(tmp_path)
    plain = examined(monkeypatch, machine(), NO_GPU, model=tmp_path)
    assert (plain.served.precision, plain.served.rest) == ("float32", "float32")
    asked = examined(monkeypatch, machine(), NO_GPU, model=tmp_path, environ={"SIGHTLINE_QUANTIZE": "nf4"})
    assert (asked.served.precision, asked.served.rest) == ("nf4", "float32")
    assert asked.served.weight_bytes < plain.served.weight_bytes
    assert asked.served.kv_bytes_per_token == plain.served.kv_bytes_per_token
    shown = io.StringIO()
    asked.show(Console(file=shown, width=120))
    assert "in nf4 (all but linear layers float32): weights" in shown.getvalue()
    assert shown.getvalue().rstrip().endswith("--quantize nf4")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = examined(monkeypatch, machine(), NO_GPU, model=tmp_path)
    assert stored.served.precision == "int8"
    assert stored.as_json()["model"]["quantization"] == "int8"
    refused = examined(monkeypatch, machine(), NO_GPU, model=tmp_path, environ={"SIGHTLINE_QUANTIZE": "nf4"})
    assert not refused.can_serve
    assert "already quantized, as int8" in refused.findings[0].sentence


@pytest.mark.parametrize("content", [None, "{", '{"architectures": ["LlavaNextForConditionalGeneration"]}'])
def test_a_folder_that_cannot_be_loaded(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    report = examined(monkeypatch, machine(), NO_GPU, model=tmp_path)
    (finding,) = report.findings
    assert str(tmp_path) in finding.sentence
    assert not report.can_serve
    assert [fit.model for fit in report.fits[::4]] == ["llava-1.5-7b", "llava-1.5-13b"]


def test_missing_folder_and_missing_weights(monkeypatch, tmp_path):
    assert "no folder" in examined(monkeypatch, machine(), NO_GPU, model=tmp_path / "x").findings[0].sentence
    write_preset("tiny", tmp_path)
    assert "holds no weights" in examined(monkeypatch, machine(), NO_GPU, model=tmp_path).findings[0].sentence


def test_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert doctor.is_port_taken("127.0.0.1", port)
    assert not doctor.is_port_taken("127.0.0.1", port)
    (finding,) = diagnosis.process_findings(
        machine(), diagnosis.choose(machine(), NO_GPU, Settings()), Settings(), port_taken=True
    )
    assert (finding.level, finding.fix) == ("warning", "sightline serve --port 8001")


# The text


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_keeps_to_its_width(monkeypatch, width):
    out = io.StringIO()
    report = examined(monkeypatch, machine(cores=192, **GPU_MACHINE), WITH_GPU)
    report.show(Console(file=out, width=width))
    text = out.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    assert "8 usable of 192 (affinity)" in text
    assert "NVIDIA A10, 23 GiB free of 24 GiB, driver 550.54" in " ".join(text.split())
    assert "Ready. sightline-demo can be served: sightline serve" in text


def test_a_fix_is_never_broken_over_lines(monkeypatch):
    out = io.StringIO()
    report = examined(monkeypatch, machine(), TorchView(error="broken"))
    report.show(Console(file=out, width=60))
    assert f"  fix: {sys.executable} -m pip install --force-reinstall torch torchvision\n" in out.getvalue()
    assert "Not ready: 1 problem above." in out.getvalue()


def test_the_command_itself():
    """The real thing on this machine: under ten seconds, sound JSON, and no torch in the process."""
    code = (
        "import argparse, sys\n"
        "from sightline_server.cli import doctor\n"
        "parser = argparse.ArgumentParser()\n"
        "doctor.add_parser(parser.add_subparsers())\n"
        "status = doctor.run(parser.parse_args(['doctor', '--json', '--device', 'cpu']))\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["can_serve"] is True
    assert said["versions"]["torch"]
    assert said["torch"]["error"] is None
    assert said["served"]["model"] == "sightline-demo"
    decoder = doctor.read_config(demo_checkpoint()).decoder
    assert said["served"]["kv_bytes_per_token"] == kv_bytes_per_token(decoder, "float32")


def test_the_check_of_quantized_weights():
    """The real thing: an engine in a process of its own loads the demo model twice, and the report has the figures."""
    code = (
        "import argparse, sys\n"
        "from sightline_server.cli import doctor\n"
        "parser = argparse.ArgumentParser()\n"
        "doctor.add_parser(parser.add_subparsers())\n"
        "words = ['doctor', '--json', '--device', 'cpu', '--quantize', 'nf4', '--verify']\n"
        "status = doctor.run(parser.parse_args(words))\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["verification"]
    assert (found["outcome"], found["quantization"]) == ("compared", "nf4")
    assert 0 < found["mean_kl"] < found["worst_kl"]
    assert found["served"]["weight_bytes"] < found["unquantized"]["weight_bytes"]
    assert "loading the unquantized weights" in done.stderr


def test_a_check_is_shown_with_the_report(monkeypatch):
    shown = io.StringIO()
    report = examined(monkeypatch, machine(), NO_GPU)
    pace = Pace(weight_bytes=1, prompt_tokens_per_s=2.0, decode_tokens_per_s=3.0)
    found = Verification(outcome="failed", message="Planted.", quantization="nf4", served=pace)
    dataclasses.replace(report, verification=found).show(Console(file=shown, width=120))
    told = " ".join(shown.getvalue().split())
    assert "Check checked Planted. 1 bytes, 2 prompt and 3 answer tokens/s alone in the engine What fits" in told
    assert report.as_json()["verification"] is None


def test_an_engine_that_cannot_be_asked_is_an_answer(tmp_path, monkeypatch):
    told = []
    missing = verified.ask_engine(tmp_path, Settings(device="cpu"), lambda stage, share: told.append(stage))
    assert missing.outcome == "failed"
    assert "config.json" in missing.message
    assert told[0] == "starting the engine"
    monkeypatch.setattr(verified, "_PROGRAM", "tests_have_no_such_module")
    crashed = verified.ask_engine(tmp_path, Settings(device="cpu"), lambda stage, share: None)
    assert crashed.outcome == "failed"
    assert "No module named tests_have_no_such_module" in crashed.message


def test_no_model_is_loaded_where_it_cannot_be_served(monkeypatch, tmp_path):
    def ask(*_arguments):
        raise AssertionError("asked")

    monkeypatch.setattr(doctor, "ask_engine", ask)
    report = examined(monkeypatch, machine(), NO_GPU, model=tmp_path / "none", environ={"SIGHTLINE_VERIFY": "1"})
    assert report.verification is None


def test_bad_device_is_a_usage_error(capsys):
    import argparse

    assert doctor.run(argparse.Namespace(model="", device="tpu", quantize=None, json=False)) == 2
    assert "--device must be" in capsys.readouterr().err
