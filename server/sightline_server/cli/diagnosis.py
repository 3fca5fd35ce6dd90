"""Judges what was found: which device would be used and why, what stands in the way of serving, and each fix.

Pure functions of facts gathered elsewhere: `machine.py` looks, this judges, `doctor_report.py` writes it down.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sightline_models.config import VlmConfig
from sightline_models.parameter_count import QUANTIZED_BITS
from sightline_models.quantization_config import choose_quantization
from sightline_server import settings as settings_table
from sightline_server.cli.fit import CONTEXT_BYTES, Fit, Memory, plan
from sightline_server.cli.machine import Machine, TorchGpu, TorchView
from sightline_server.cli.terminal import own_command, size
from sightline_server.engine.placement import count_engines
from sightline_server.settings import Settings

_SPARE_FILES = 256
"""File descriptors beside one for each request: libraries, sockets to the engine, pipes to the decoders."""

_INSTALL_DRIVER = "sudo ubuntu-drivers install (elsewhere: the newest NVIDIA driver of your distribution), then restart"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that isn't as it should be."""

    level: Literal["problem", "warning"]
    """A problem stops the model from being served."""
    sentence: str
    fix: str | None
    """A command, or a sentence where no command can do it; None where the sentence itself says what to do."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The device that `sightline serve` would take."""

    device: str
    why: str
    gpu: TorchGpu | None
    memory: Memory
    planned: bool = False
    """Whether it is a GPU of the size of ``--gpu-memory`` that this machine doesn't have."""

    @property
    def bfloat16(self) -> bool:
        return self.gpu is None or self.gpu.bfloat16

    def bounds(self, settings: Settings) -> Settings:
        """The settings that the plan for this device goes by: a planned card's size is no limit within it."""
        return settings_table.replace(settings, gpu_memory=0) if self.planned else settings


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder that can be read."""

    name: str
    folder: Path
    config: VlmConfig
    disk_bytes: int
    num_files: int


def choose(machine: Machine, torch: TorchView, settings: Settings) -> Choice:
    """What ``--device`` comes to here; auto is the first GPU that torch sees, else the CPU."""
    # Of several engines the first one's: what is planned is one engine on one GPU.
    asked = settings.devices[0]
    index = int(asked.partition(":")[2] or 0)
    gpu = next((gpu for gpu in torch.gpus if gpu.index == index), None) if asked != "cpu" else None
    if gpu is not None:
        why = "the first GPU that torch sees" if asked == "auto" else f"--device {asked} asks for it"
        memory = Memory(is_gpu=True, total=gpu.total_bytes, free=gpu.free_bytes or 0)
        return Choice(device=f"cuda:{gpu.index}", why=why, gpu=gpu, memory=memory)
    if settings.gpu_memory and not torch.gpus:
        # The check of the settings has refused it beside a CPU that is asked for.
        size_asked = settings.gpu_memory
        return Choice(
            device=f"a GPU of {size(size_asked)}",
            why="what one would hold; this machine has none that can be used",
            gpu=None,
            memory=Memory(is_gpu=True, total=size_asked, free=max(0, size_asked - CONTEXT_BYTES)),
            planned=True,
        )
    memory = Memory(is_gpu=False, total=machine.memory_total, free=machine.memory_free)
    if asked == "cpu":
        why = "--device cpu asks for it"
    elif not machine.nvidia_devices and not machine.driver_gpus:
        why = "this machine has no NVIDIA GPU"
    else:
        why = "torch can't use this machine's GPU, see below"
    return Choice(device="cpu", why=why, gpu=None, memory=memory)


def precision_of(config: VlmConfig, choice: Choice, settings: Settings) -> str:
    """The precision that `--dtype` comes to on the chosen device, of all that isn't quantized."""
    if settings.dtype != "auto":
        asked: str = settings.dtype
    else:
        asked = config.dtype if choice.memory.is_gpu else "float32"
    return "float16" if asked == "bfloat16" and not choice.bfloat16 else asked


def plan_served(checkpoint: Checkpoint, choice: Choice, settings: Settings) -> Fit:
    """How the checkpoint would lie in memory if it were served with ``settings``."""
    config = checkpoint.config
    rest = precision_of(config, choice, settings)
    quantization = choose_quantization(config.quantization, settings.quantize)
    precision = rest if quantization == "none" else quantization
    return plan(checkpoint.name, config, precision, choice.memory, choice.bounds(settings), rest=rest)


def software_findings(versions: Mapping[str, str | None], torch: TorchView) -> list[Finding]:
    """Missing packages, and a torch that doesn't import."""
    findings = [
        Finding(level="problem", sentence=f"The package {name} is not installed.", fix=_pip(name))
        for name, version in versions.items()
        if version is None
    ]
    if torch.error is not None and versions.get("torch") is not None:
        fix = _pip("--force-reinstall torch torchvision")
        findings.append(Finding(level="problem", sentence=f"torch can't be used: {torch.error}.", fix=fix))
    return findings


def gpu_findings(machine: Machine, torch: TorchView, settings: Settings, visible: str | None) -> list[Finding]:
    """Why a GPU that is there isn't used. ``visible`` is the value of CUDA_VISIBLE_DEVICES."""
    if torch.error is not None or settings.device == "cpu":
        return []
    present = bool(machine.driver_gpus or machine.nvidia_devices)
    # A GPU that was asked for by name and isn't there stops the start; auto goes on with the CPU.
    asked = settings.device.startswith("cuda")
    level: Literal["problem", "warning"] = "problem" if asked else "warning"
    if torch.gpus:
        return [finding for index in _wanted(settings) for finding in _gpu_finding(index, torch, settings)]
    if not present:
        if not asked:
            return []
        sentence = f"--device {settings.device}: this machine has no NVIDIA GPU."
        return [Finding(level="problem", sentence=sentence, fix=f"{own_command()} serve --device cpu")]
    if not machine.driver_gpus:
        if machine.in_container:
            sentence = "There is an NVIDIA GPU, but this container was started without it."
            return [Finding(level=level, sentence=sentence, fix="docker run --gpus all ...")]
        sentence = "There is an NVIDIA GPU, but no working driver for it."
        return [Finding(level=level, sentence=sentence, fix=_INSTALL_DRIVER)]
    if torch.cuda_build is None:
        sentence = f"{machine.driver_gpus[0].name} is there, but this torch was built without CUDA."
        return [Finding(level=level, sentence=sentence, fix=_pip("--force-reinstall torch torchvision"))]
    if visible is not None:
        sentence = f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPU from torch."
        return [Finding(level=level, sentence=sentence, fix="unset CUDA_VISIBLE_DEVICES")]
    driver = machine.driver_gpus[0].driver
    sentence = f"torch is built for CUDA {torch.cuda_build} and can't use driver {driver}: {torch.reason}."
    return [Finding(level=level, sentence=sentence, fix=_INSTALL_DRIVER)]


def _wanted(settings: Settings) -> Sequence[int]:
    """The numbers of the GPUs that would be used, if there are any."""
    named = settings.devices
    if len(named) == 1 and ":" not in named[0]:
        return range(count_engines(settings))
    return [int(name.partition(":")[2]) for name in named]


def _gpu_finding(index: int, torch: TorchView, settings: Settings) -> list[Finding]:
    gpu = next((gpu for gpu in torch.gpus if gpu.index == index), None)
    if gpu is None:
        last = torch.gpus[-1].index
        if ":" in settings.device:
            sentence = f"--device {settings.device} names a GPU that isn't there: the last one is cuda:{last}."
            return [Finding(level="problem", sentence=sentence, fix=f"{own_command()} doctor --device cuda:{last}")]
        sentence = f"Engine {index + 1} of {count_engines(settings)} would need cuda:{index}: the last is cuda:{last}."
        return [Finding(level="problem", sentence=sentence, fix=f"{own_command()} serve --engines {len(torch.gpus)}")]
    if gpu.error is not None:
        return [Finding(level="problem", sentence=f"{gpu.name} can't be used: {gpu.error}.", fix="nvidia-smi")]
    return []


def process_findings(machine: Machine, choice: Choice, settings: Settings, *, port_taken: bool) -> list[Finding]:
    """Limits and neighbours that a running server would meet."""
    findings = []
    needed = settings.max_running + settings.max_queue + _SPARE_FILES
    if machine.open_files < needed:
        findings.append(
            Finding(
                level="warning",
                sentence=f"A process may open {machine.open_files} files here; {needed} would serve a full queue.",
                fix=f"ulimit -n {max(4096, needed)}",
            )
        )
    quota = machine.cpu_quota
    if not choice.memory.is_gpu and not settings.threads and quota is not None and quota < machine.allowed_cores:
        threads = max(1, int(quota / count_engines(settings)))
        findings.append(
            Finding(
                level="warning",
                sentence=f"A container limit leaves {quota:g} of {machine.allowed_cores} CPUs: as many threads as CPUs "
                "would wait for each other.",
                fix=f"{own_command()} serve --threads {threads}",
            )
        )
    if not choice.memory.is_gpu and machine.architecture == "x86_64" and "AVX2" not in machine.features:
        sentence = "This processor has no AVX2, so answers will come slowly."
        findings.append(
            Finding(level="warning", sentence=sentence, fix="use a machine with a GPU or a newer processor")
        )
    if port_taken:
        port = settings.port + 1 if settings.port < 65535 else 0
        findings.append(
            Finding(
                level="warning",
                sentence=f"Port {settings.port} is in use, perhaps by a server that runs already.",
                fix=f"{own_command()} serve --port {port}",
            )
        )
    return findings


def fit_finding(checkpoint: Checkpoint, fit: Fit, choice: Choice, settings: Settings, target: str) -> Finding | None:
    """A model that doesn't fit, with the flags that make it fit where some do. ``target`` is how it was named."""
    if fit.fits:
        return None
    what = f"{checkpoint.name} doesn't fit on {choice.device} in {fit.precision}"
    limit = choice.bounds(settings).gpu_memory
    room = (
        f"--gpu-memory allows {size(limit)}"
        if 0 < limit < choice.memory.free
        else f"{size(choice.memory.free)} are free"
    )
    sentence = f"{what}: it needs about {size(fit.needed_bytes)}, and {room}."
    for flags in _remedies(choice, fit, settings):
        changed = settings_table.replace(settings, **flags)
        if plan_served(checkpoint, choice, changed).fits:
            words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
            command = " ".join(
                word for word in (own_command(), "serve", target, words, limit_flag(choice, settings)) if word
            )
            return Finding(level="problem", sentence=sentence, fix=command)
    others = choice.memory.total - choice.memory.free
    if choice.gpu is not None and others > choice.memory.total // 10:
        return Finding(level="problem", sentence=f"{sentence} Others hold {size(others)}.", fix="nvidia-smi")
    return Finding(level="problem", sentence=sentence, fix="free some memory, or serve a smaller model")


def limit_flag(choice: Choice, settings: Settings) -> str:
    """``--gpu-memory`` as it may be written again, where it is a limit."""
    limit = choice.bounds(settings).gpu_memory
    for unit, name in ((2**30, "GiB"), (10**9, "GB"), (2**20, "MiB"), (10**6, "MB")):
        if limit and limit % unit == 0:
            return f"--gpu-memory {limit // unit}{name}"
    return f"--gpu-memory {limit}" if limit else ""


def _remedies(choice: Choice, fit: Fit, settings: Settings) -> Sequence[Mapping[str, object]]:
    """Settings that make a model smaller, the least painful first."""
    half = {} if fit.rest != "float32" else {"dtype": "bfloat16" if choice.bfloat16 else "float16"}
    small: Mapping[str, object] = {"cpu_cache_gb": 0.5}
    if choice.memory.is_gpu:
        # A limit in bytes stands for a share.
        share = {} if choice.bounds(settings).gpu_memory else {"gpu_memory_utilization": 0.95}
        small = {**share, "max_step_tokens": 512}
    wishes: list[Mapping[str, object]] = [half, small, {**half, **small}]
    if fit.precision == fit.rest:
        wishes += [{**half, "quantize": scheme} for scheme in QUANTIZED_BITS]
        wishes.append({**half, **small, "quantize": "nf4"})
    return [changes for changes in wishes if changes]


def _pip(words: str) -> str:
    return f"{sys.executable} -m pip install {words}"
