"""What a figure was measured on: versions, commit, processor, load. Every result file opens with it.

Knows the operating system and package metadata. Imports neither torch nor anything of the server's.
"""

import atexit
import datetime
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = tuple(ROOT / name for name in ("server", "models", "kernels"))
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "pillow", "fastapi", "uvicorn", "uvloop")

GPU_FIELDS = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def describe_machine(commit: str | None = None) -> dict[str, Any]:
    """Facts for a result file; ``commit`` names the source when the machine holds no git history."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or _git_commit() or "unknown",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": load_average(),
    }


def nvidia_smi() -> dict[str, str] | None:
    """The driver's word on the first GPU, nothing where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return None
    return dict(zip(GPU_FIELDS, (value.strip() for value in lines[0].split(",")), strict=False))


def load_average() -> list[float]:
    """How busy the machine was over the last 1, 5 and 15 minutes, in cores."""
    return [round(value, 2) for value in os.getloadavg()]


def matmul_gflops(size: int = 512, tries: int = 25) -> float:
    """How fast one fixed matrix product is at best right now: beside another such figure, whether clocks changed."""
    import numpy as np

    noise = np.random.default_rng(0)
    left, right = (noise.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return round(2e-9 * size**3 / best, 1)


def child_environment() -> dict[str, str]:
    """The environment for a child process: everything is importable, with its metadata, though nothing is installed."""
    known = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    paths = [str(path) for path in (*SOURCE_ROOTS, ROOT)]
    if _version("sightline") is None:
        paths.append(_metadata_folder())
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *(part for part in known if part not in paths)]),
        "HF_HUB_OFFLINE": "1",
    }


@functools.cache
def _metadata_folder() -> str:
    """A folder that says of the checkout what an installation would: the server asks for its own version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tempfile.mkdtemp(prefix="sightline-metadata-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    told = Path(folder) / f"{project['name']}-{project['version']}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    return folder


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout, with ``+changes`` when tracked files differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
