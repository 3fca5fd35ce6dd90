"""llama.cpp's `llama-server` as a peer, where the caller has a binary and GGUF files of the same weights.

Knows its command line and its OpenAI endpoint. Brings neither binary nor files, and can't tell whether a file holds
the weights that the others serve: that is the caller's word.
"""

import contextlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import Server, free_port, running

SLOT_TOKENS = 1024
"""Room of one request: the load's text, a picture's tokens and the answer."""


class LlamaServerError(ValueError):
    """Flags that can't be used; the sentence says which and the fix."""


@dataclass(frozen=True)
class Llama:
    """The program and what it serves."""

    program: Path
    ggufs: tuple[Path, ...]
    mmproj: Path | None = None

    def version(self) -> str:
        """As the program tells it, or ``unknown``."""
        try:
            done = subprocess.run([self.program, "--version"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        found = re.search(r"version: *(.+)", done.stderr + done.stdout)
        return found[1].strip() if found else "unknown"


def read_flags(
    program: Path | None, ggufs: str | None, mmproj: Path | None, *, images: str, models: Sequence[str]
) -> Llama | None:
    """What the flags ask for, nothing when there are none. Raises LlamaServerError for what can't be compared."""
    if program is None and ggufs is None and mmproj is None:
        return None
    if program is None or ggufs is None:
        raise LlamaServerError(
            "llama-server needs its program and its weights: --llama-server PATH --gguf FILE[,FILE]."
        )
    files = tuple(Path(name) for name in ggufs.split(",") if name)
    for path in (program, *files, *([mmproj] if mmproj else [])):
        if not path.is_file():
            raise LlamaServerError(
                f"There is no file {path}: give --llama-server, --gguf and --mmproj files that exist."
            )
    if mmproj is None and images != "none":
        raise LlamaServerError(
            "Without a projector llama-server sees no picture: give --mmproj FILE, or compare text only: --images none."
        )
    if len(models) != 1:
        raise LlamaServerError(f"A GGUF file holds one model and --models names {len(models)}: name the one it holds.")
    return Llama(program, files, mmproj)


def make_command(llama: Llama, gguf: Path, *, port: int, threads: str, slots: int) -> list[str]:
    """``threads`` is a number, or ``default`` for its own choice; every one of ``slots`` requests has its own room."""
    command = [str(llama.program), "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-np", str(slots), "-c", str(slots * SLOT_TOKENS), "-ngl", "0", "--jinja"]
    if llama.mmproj is not None:
        command += ["--mmproj", str(llama.mmproj)]
    if threads != "default":
        command += ["-t", threads]
    return command


@contextlib.contextmanager
def serving(llama: Llama, gguf: Path, threads: str, *, slots: int) -> Iterator[Server]:
    """The peer on a free port, its model loaded. Raises ServerError when it doesn't start."""
    port = free_port()
    command = make_command(llama, gguf, port=port, threads=threads, slots=slots)
    # A build that knows CUDA would put whole prompts on a GPU though no layer lies there.
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    with running(f"llama-server {gguf.name}", command, port=port, ready_path="/health", environment=hidden) as server:
        yield server
