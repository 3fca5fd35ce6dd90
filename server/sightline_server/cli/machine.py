"""What this machine is: processor, memory, GPUs as the driver and the bus see them, limits on this process.

Knows Linux's files and `nvidia-smi`. Knows nothing of models, and imports no torch: what torch sees is asked of a
process of its own.
"""

import json
import os
import platform
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from sightline_server.cli.terminal import one_line
from sightline_server.engine import cgroups

PACKAGES = ("sightline", "torch", "triton", "transformers", "bitsandbytes")

PROBE_TIMEOUT_S = 60.0
_NVIDIA_SMI_TIMEOUT_S = 8.0
_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASS = "0x03"

_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    # 64-bit Arm spells them so.
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
    "i8mm": "I8MM",
}
"""The processor flags that matrix products gain from, as /proc/cpuinfo names them."""


@dataclass(frozen=True, kw_only=True)
class DriverGpu:
    """A GPU as NVIDIA's driver reports it."""

    name: str
    total_bytes: int
    driver: str
    capability: str | None


@dataclass(frozen=True, kw_only=True)
class Machine:
    cpu: str
    architecture: str
    cores: int
    """Cores that are switched on."""
    allowed_cores: int
    """Cores this process may run on (its affinity)."""
    cpu_quota: float | None
    """Cores' worth of time a container leaves it, or None."""
    features: tuple[str, ...]
    memory_total: int
    memory_free: int
    """Bytes a new process can have: what the kernel calls available, or less where a container says so."""
    memory_limited: bool
    """Whether a container's limit is what ``memory_free`` says."""
    driver_gpus: tuple[DriverGpu, ...]
    nvidia_devices: int
    """NVIDIA display devices on the bus, driver or not."""
    open_files: int
    """The soft limit on file descriptors."""
    in_container: bool

    @property
    def usable_cores(self) -> float:
        return min(float(self.allowed_cores), self.cpu_quota or float(self.allowed_cores))


@dataclass(frozen=True, kw_only=True)
class TorchGpu:
    """A GPU as torch sees it."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int | None
    """None when the GPU can't be used; ``error`` says why."""
    capability: str
    bfloat16: bool
    error: str | None


@dataclass(frozen=True, kw_only=True)
class TorchView:
    """What torch said in its own process."""

    error: str | None
    """Why torch can't be imported; the rest is empty then."""
    cuda_build: str | None = None
    """The CUDA version torch was built for, None for a build without CUDA."""
    reason: str | None = None
    """Why a CUDA build finds no GPU."""
    gpus: tuple[TorchGpu, ...] = ()


def read_machine() -> Machine:
    """Look around. Takes a tenth of a second, and as long as `nvidia-smi` does where that exists."""
    memory = psutil.virtual_memory()
    left = cgroups.memory_left()
    limited = left is not None and left < memory.available
    model, features = read_cpuinfo(_text(Path("/proc/cpuinfo")))
    return Machine(
        cpu=model or platform.processor() or "unknown",
        architecture=platform.machine(),
        cores=os.cpu_count() or 1,
        allowed_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_quota=cgroups.cpu_quota(),
        features=features,
        memory_total=memory.total,
        memory_free=left if left is not None and limited else memory.available,
        memory_limited=limited,
        driver_gpus=_driver_gpus(),
        nvidia_devices=_nvidia_devices(Path("/sys/bus/pci/devices")),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        in_container=any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")),
    )


def read_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """The processor's name and its known features, from the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = " ".join((fields.get("model name") or fields.get("Hardware") or "").split())
    return one_line(model), tuple(shown for flag, shown in _FEATURES.items() if flag in flags)


def package_versions() -> dict[str, str | None]:
    """Installed versions by package, None where one is missing. Imports none of them."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


class TorchProbe:
    """A running question to torch. It takes seconds, so it is started before and read after everything else."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sightline_models.device_probe"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> TorchView:
        """Wait for the answer. A probe that crashes or hangs is an answer too."""
        try:
            out, err = self._process.communicate(timeout=PROBE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return TorchView(error=f"importing torch took more than {PROBE_TIMEOUT_S:.0f} s")
        return read_probe(self._process.returncode, out, err)


def read_probe(status: int, out: str, err: str) -> TorchView:
    """What a finished probe process says."""
    if status < 0:
        return TorchView(error=f"importing torch crashed ({signal.Signals(-status).name})")
    try:
        said: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        last = err.strip().splitlines()[-1:] or ["it said nothing"]
        return TorchView(error=one_line(last[0]))
    if "error" in said:
        return TorchView(error=one_line(said["error"]))
    gpus = tuple(TorchGpu(**gpu) for gpu in said["gpus"])
    return TorchView(error=None, cuda_build=said["cuda_build"], reason=said["reason"], gpus=gpus)


def _driver_gpus() -> tuple[DriverGpu, ...]:
    # Drivers before 2021 don't know compute_cap and refuse the whole question.
    for fields in ("name,memory.total,driver_version,compute_cap", "name,memory.total,driver_version"):
        try:
            done = subprocess.run(
                ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                timeout=_NVIDIA_SMI_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ()
        if done.returncode == 0:
            return read_nvidia_smi(done.stdout)
    return ()


def read_nvidia_smi(text: str) -> tuple[DriverGpu, ...]:
    """GPUs from `nvidia-smi`'s lines of name, MiB, driver and, from newer drivers, compute capability."""
    gpus = []
    for line in text.splitlines():
        name, memory, driver, *capability = (one_line(word) for word in line.split(", "))
        # Some integrated GPUs share the machine's memory and answer [N/A].
        total = int(memory) * 2**20 if memory.isdecimal() else 0
        gpus.append(
            DriverGpu(name=name, total_bytes=total, driver=driver, capability=capability[0] if capability else None)
        )
    return tuple(gpus)


def _nvidia_devices(bus: Path) -> int:
    return sum(
        _text(device / "vendor").strip() == _NVIDIA_VENDOR and _text(device / "class").startswith(_DISPLAY_CLASS)
        for device in (bus.iterdir() if bus.is_dir() else ())
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
