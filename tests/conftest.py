"""What holds for every test: no network, one thread, poisoned fresh memory, `gpu` tests only where a GPU is.

Knows nothing of any one room; a fixture that only some tests need stands in their own folder's conftest.
"""

import os

# Before torch is imported anywhere: tiny models run fastest on one thread, and the machine may be shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A library that would look something up must fail here, as it would on a machine without a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import ipaddress
import signal
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import threat_rows

# A shell that starts the tests in the background has them, and all they start, ignore Ctrl-C; some are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
POISONED = ("tests/kernels", "tests/models", "tests/engine")

# Examples are found by a fixed seed: a failure is the same on every machine, and no time limit fails a busy one.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("house")


def _refuse_other_machines(event: str, args: tuple[Any, ...]) -> None:
    if event != "socket.connect" or not isinstance(args[1], tuple):
        return
    host = str(args[1][0]).split("%")[0]
    if host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise PermissionError(f"A test tried to reach {host}. Tests use this machine only.")


sys.addaudithook(_refuse_other_machines)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if "gpu" in item.keywords]
    if not wanting:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in wanting:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(threat_rows.summary(ROOT))


@pytest.fixture(autouse=True)
def _poison_fresh_tensors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under kernels, models and engine, ``torch.empty`` holds NaN or huge integers, never lucky zeros."""
    if not request.path.is_relative_to(ROOT) or not str(request.path.relative_to(ROOT)).startswith(POISONED):
        return
    import torch
    from torch.utils._device import _device_constructors

    # At first use torch notes which functions a `with torch.device(...)` redirects: it must note the true ones, or
    # models meant for the meta device take real memory.
    _device_constructors()
    true_empty, true_empty_like = torch.empty, torch.empty_like

    def poison(made: "torch.Tensor") -> "torch.Tensor":
        if made.device.type == "meta":
            return made
        if made.is_floating_point() or made.is_complex():
            return made.fill_(float("nan"))
        return made.fill_(True if made.dtype == torch.bool else torch.iinfo(made.dtype).max)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(true_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(true_empty_like(*a, **k)))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def demo_checkpoint_folder(repository: Path) -> Path:
    """The bundled demo model, in Hugging Face layout."""
    folder = repository / "models/sightline_models/demo/checkpoint"
    assert (folder / "model.safetensors").is_file(), f"{folder} holds no weights"
    return folder
