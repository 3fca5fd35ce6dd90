"""Gathers the wheels that a bare CUDA machine without a network lacks, for Python 3.12 on x86-64.

Such a machine is taken to hold torch, triton, transformers and what commonly stands beside them. Everything else that
the server, the load generator, the tests and the peers import is named here; versions are those of this environment.
"""

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from benchmarks.machine import ROOT

DEFAULT_FOLDER = ROOT / ".whl"
PACKED = (
    "annotated-doc",
    "annotated-types",
    "anyio",
    "fastapi",
    "httptools",
    "msgspec",
    "opentelemetry-api",
    "pydantic",
    "pydantic-core",
    "pytest-asyncio",
    "pyzmq",
    "starlette",
    "typing-extensions",
    "typing-inspection",
    "uvicorn",
)
PEERS = ("bitsandbytes", "httpcore2", "httpx2", "jiter", "openai", "sniffio", "torchao", "truststore")
"""What is measured beside us, or what that needs. Where one is missing, so is its row, and nothing else."""
NOT_HERE = {"torchao": "0.18.0"}
"""Versions of those that this environment has no use for."""
CUDA_VERSION = "130"
"""bitsandbytes brings a library for each version of CUDA; the one for the machine's is kept."""
ALREADY_THERE = frozenset(
    {
        "click",
        "h11",
        "httpx",
        "httpcore",
        "hypothesis",
        "idna",
        "jinja2",
        "markupsafe",
        "numpy",
        "packaging",
        "pillow",
        "prometheus-client",
        "psutil",
        "pygments",
        "pytest",
        "pytest-timeout",
        "rich",
        "safetensors",
        "tokenizers",
        "torch",
        "torchvision",
        "transformers",
        "triton",
        "uvloop",
    }
)
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


def uncovered() -> dict[str, list[str]]:
    """Requirements of the packed packages that are neither packed nor taken to be there, by package."""
    packed = (*PACKED, *PEERS)
    known = set(packed) | ALREADY_THERE
    gaps: dict[str, list[str]] = {}
    for package in packed:
        for requirement in () if package in NOT_HERE else importlib.metadata.requires(package) or ():
            text, _, marker = requirement.partition(";")
            name = re.split(r"[^A-Za-z0-9._-]", text.strip(), maxsplit=1)[0].lower().replace("_", "-")
            # Extras are not asked for; backports to old Pythons and what other interpreters need are not needed.
            if name not in known and not re.search("extra|python_version|implementation_name|== ?.emscripten", marker):
                gaps.setdefault(package, []).append(name)
    return gaps


def download_command(folder: Path) -> list[str]:
    """The pip command that fetches every packed package at this environment's version."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    versions = {name: NOT_HERE.get(name) or importlib.metadata.version(name) for name in (*PACKED, *PEERS)}
    return [*command, "--dest", str(folder), *(f"{name}=={version}" for name, version in versions.items())]


def slim(wheel: Path) -> None:
    """Leave out of a wheel of bitsandbytes every library but the machine's and the CPU's."""
    kept = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(kept, "w", zipfile.ZIP_DEFLATED) as part:
        for entry in whole.infolist():
            library = re.search(r"libbitsandbytes_(\w+)\.so$", entry.filename)
            if library is None or library[1] in ("cpu", f"cuda{CUDA_VERSION}"):
                part.writestr(entry, whole.read(entry))
    kept.replace(wheel)


def tree_bytes() -> int:
    """What the checkout weighs: tracked files, and untracked ones that git doesn't ignore."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True)
    paths = (ROOT / name.decode() for name in done.stdout.split(b"\0") if name)
    return sum(path.stat().st_size for path in paths if path.is_file())


def gather(folder: Path) -> int:
    """Fill ``folder`` and say how to use it. 0 when all is there and light enough to carry."""
    folder = folder.resolve()
    for package, names in uncovered().items():
        print(f"{package} also needs {', '.join(names)}: add them to PACKED or ALREADY_THERE in {__name__}")
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        # Two versions of one package would stop the whole installation.
        wheel.unlink()
    done = subprocess.run(download_command(folder), cwd=ROOT)
    if done.returncode:
        print("pip could not gather the wheels; its message is above.")
        return 1
    for wheel in folder.glob("bitsandbytes-*.whl"):
        slim(wheel)
    wheels = sorted(folder.glob("*.whl"))
    wheel_mib = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    tree_mib = tree_bytes() / 2**20
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:8.2f} MiB  {wheel.name}")
    print(f"{len(wheels)} wheels, {wheel_mib:.1f} MiB; the tree, {tree_mib:.1f} MiB")
    print(
        f"There, in the checkout's folder:\n"
        f"  python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site {shown}/*.whl\n"
        f"  PYTHONPATH=/tmp/site scripts/gpu_check --out DIR"
    )
    return 0
