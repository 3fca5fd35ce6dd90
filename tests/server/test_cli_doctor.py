"""`sightline doctor`: facts read from files, verdicts from planned machines, and the command on this one."""

import io
import json
import socket
import subprocess
import sys

import pytest
from planned_machines import GIB, GPU_MACHINE, NO_GPU, WITH_GPU, examined, machine, torch_gpu
from rich.console import Console

from sightline_models.parameter_count import kv_bytes_per_token
from sightline_models.presets import demo_checkpoint, write_preset
from sightline_models.tiny import write_checkpoint
from sightline_server.cli import diagnosis, doctor
from sightline_server.cli.machine import (
    DriverGpu,
    TorchView,
    read_cpuinfo,
    read_machine,
    read_nvidia_smi,
    read_probe,
)
from sightline_server.cli.terminal import size
from sightline_server.engine import cgroups
from sightline_server.settings import Settings

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


def test_every_gpu_that_engines_need_is_looked_at(monkeypatch):
    two = TorchView(error=None, cuda_build="13", gpus=(torch_gpu(), torch_gpu(index=1, name="Other", error="ECC")))
    found = machine(**GPU_MACHINE)
    (broken,) = examined(monkeypatch, found, two, device="cuda:0,cuda:1").findings
    assert broken.sentence == "Other can't be used: ECC."
    (absent,) = examined(monkeypatch, found, WITH_GPU, device="cuda:0,cuda:1").findings
    assert absent.sentence == "--device cuda:0,cuda:1 names a GPU that isn't there: the last one is cuda:0."
    (short,) = examined(monkeypatch, found, WITH_GPU, environ={"SIGHTLINE_ENGINES": "2"}).findings
    assert short.sentence == "Engine 2 of 2 would need cuda:1: the last is cuda:0."
    assert short.fix == "sightline serve --engines 1"
    assert not examined(monkeypatch, found, two, device="cuda:0").findings


def test_what_engines_divide_is_told(monkeypatch):
    environ = {"SIGHTLINE_ENGINES": "2"}
    report = examined(monkeypatch, machine(cpu_quota=5.0), NO_GPU, environ=environ)
    assert [finding.fix for finding in report.findings] == ["sightline serve --threads 2"]
    page = io.StringIO()
    report.show(Console(file=page, width=120))
    assert "in each of 2 engines" in page.getvalue()


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


def test_bad_device_is_a_usage_error(capsys):
    import argparse

    assert doctor.run(argparse.Namespace(model="", device="tpu", quantize=None, json=False)) == 2
    assert "--device must be" in capsys.readouterr().err
