"""`transformers serve` as a peer: the same weights, told to do the same work.

Knows what that server takes and what it can't be told over HTTP. It runs vision models one request at a time
(its continuous batching covers text models only), refuses `ignore_eos` and samples only where the checkpoint's
generation config says so, so the peer gets a folder whose generation config samples and names no end token.
"""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.servers import Server, free_port, running

NEEDS = ("fastapi", "uvicorn", "openai", "typer")
DTYPES = ("auto", "float32")
"""Tried before the comparison: the faster one competes. ``auto`` is the checkpoint's."""


def missing_packages() -> tuple[str, ...]:
    return tuple(name for name in NEEDS if importlib.util.find_spec(name) is None)


def link_checkpoint(source: Path, folder: Path) -> None:
    """Make ``folder`` the checkpoint ``source`` with another generation config: sampling, no end token."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name not in ("generation_config.json", "config.json"):
            (folder / path.name).symlink_to(path.resolve())
    generation = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config = json.loads((source / "config.json").read_text())
    # Where the generation config names no end token, the model's own config would.
    for part in (config, config.get("text_config", {})):
        if "eos_token_id" in part:
            part["eos_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))


@contextlib.contextmanager
def serving(
    folder: Path, dtype: str, *, device: str = "cpu", environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """The peer on a free port, its model loaded. Raises ServerError when it doesn't start."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        str(folder),
        "--dtype",
        dtype,
        "--device",
        device,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    name = "transformers serve"
    with running(name, command, port=port, ready_path="/health", model=str(folder), environment=environment) as server:
        yield server
