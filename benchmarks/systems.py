"""The systems that a comparison is between, how each may be started, and which way of starting one competes.

Knows servers and their flags. Knows nothing of rounds, figures or pages.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import llama_server, transformers_serve
from benchmarks.figures import BASE
from benchmarks.gate import Kind, Verdict
from benchmarks.servers import Server, free_port, running, sightline_command

CONCURRENCIES = (1, 8, 32)
PRECISIONS = ("float32", "bfloat16")
"""Ours on a CPU; ``auto`` is the first."""
DEFAULT = "default"
"""Threads as a server chooses them by itself."""
TWO_ENGINES = "2 engines"
"""Ours with ``--engines 2``, which divide the cores: another choice of threads."""
OUR_THREADS = (DEFAULT, "1", TWO_ENGINES)
INT8, COMPILED, COMPILED_INT8, DEFAULTS = "ours-int8", "ours-compiled", "ours-compiled-int8", "ours-defaults"
DETERMINISTIC = "ours-deterministic"

Start = Callable[[str, str], AbstractContextManager[Server]]
"""A server, from a setting (a precision or a file's name) and a choice of threads."""


@dataclass(frozen=True)
class System:
    """One row of the comparison."""

    key: str
    label: str
    start: Start
    settings: tuple[str, ...]
    """All are tried with the first of ``threads``, then the fastest with the others."""
    threads: tuple[str, ...] = (DEFAULT,)
    concurrencies: tuple[int, ...] = CONCURRENCIES
    takes_ignore_eos: bool = True
    few_requests: bool = False
    """It is slow by design or computes one request at a time: fewer tell its speed."""
    quantize: str = "none"
    gated: bool = False
    """Whether its answers must pass the gate: ours must."""
    deterministic: bool = False

    def kind(self, setting: str) -> Kind:
        return Kind(setting, self.quantize)


@dataclass(frozen=True)
class Tried:
    """One way to start a system, and what came of it."""

    setting: str
    threads: str
    tokens_per_s: float | None
    """Nothing when it failed the gate, or was the only way and not tried."""
    gate: str | None = None
    """The gate's sentence."""
    passed: bool = True

    def to_json(self) -> dict[str, Any]:
        told = {"setting": self.setting, "threads": self.threads, "tokens_per_s": self.tokens_per_s}
        return told if self.gate is None else {**told, "gate": self.gate, "passed": self.passed}


@dataclass
class Choice:
    """What competes for a system; nothing does when every way of starting it failed the gate."""

    system: System
    tried: list[Tried] = field(default_factory=list)

    @property
    def best(self) -> Tried | None:
        passed = [one for one in self.tried if one.passed]
        return max(passed, key=lambda one: one.tokens_per_s or 0.0, default=None)

    @property
    def passed(self) -> bool:
        """Whether no way failed: a variant that computes wrongly is a defect though another is faster."""
        return all(one.passed for one in self.tried)

    def to_json(self) -> dict[str, Any]:
        best = self.best
        return {
            "key": self.system.key,
            "label": self.system.label,
            "setting": best.setting if best else None,
            "threads": best.threads if best else None,
            "tried": [one.to_json() for one in self.tried],
        }


def choose(
    system: System, check: Callable[[System, str, Server], Verdict], speed: Callable[[System, Server], float]
) -> Choice:
    """Check every way to start ``system`` if it is gated, time those that pass, and keep what was found.

    The only way to start one is checked and not timed.
    """
    choice = Choice(system)
    alone = len(system.settings) == len(system.threads) == 1

    def attempt(setting: str, threads: str) -> None:
        if alone and not system.gated:
            choice.tried.append(Tried(setting, threads, None))
            return
        with system.start(setting, threads) as server:
            verdict = check(system, setting, server) if system.gated else None
            timed = not alone and (verdict is None or verdict.passed)
            rate = speed(system, server) if timed else None
        if verdict is None:
            choice.tried.append(Tried(setting, threads, rate))
        else:
            choice.tried.append(Tried(setting, threads, rate, verdict.says, verdict.passed))

    for setting in system.settings:
        attempt(setting, system.threads[0])
    fastest = choice.best
    for threads in system.threads[1:] if fastest else ():
        attempt(fastest.setting, threads)
    return choice


def thread_counts() -> tuple[str, ...]:
    """A server's own choice, one, and for a server that may not look at the cores it has, all of these."""
    cores = len(os.sched_getaffinity(0))
    return (DEFAULT, "1", str(cores)) if cores > 1 else (DEFAULT, "1")


def ours(folder: Path, serve_flags: Sequence[str]) -> System:
    return System(BASE, "Sightline", _sightline(folder, serve_flags), PRECISIONS, threads=OUR_THREADS, gated=True)


def ours_int8(folder: Path, serve_flags: Sequence[str]) -> System:
    return System(
        INT8,
        "Sightline `--quantize int8`",
        _sightline(folder, [*serve_flags, "--quantize", "int8"]),
        PRECISIONS,
        threads=OUR_THREADS,
        quantize="int8",
        gated=True,
    )


def can_compile() -> bool:
    return shutil.which("g++") is not None


def ours_compiled(folder: Path, serve_flags: Sequence[str]) -> System:
    return System(
        COMPILED,
        "Sightline `--compile`",
        _sightline(folder, [*serve_flags, "--compile"]),
        PRECISIONS,
        threads=OUR_THREADS,
        gated=True,
    )


def ours_compiled_int8(folder: Path, serve_flags: Sequence[str]) -> System:
    return System(
        COMPILED_INT8,
        "Sightline `--compile --quantize int8`",
        _sightline(folder, [*serve_flags, "--compile", "--quantize", "int8"]),
        PRECISIONS,
        threads=OUR_THREADS,
        quantize="int8",
        gated=True,
    )


def ours_defaults(folder: Path, serve_flags: Sequence[str]) -> System:
    """Without a flag about speed: what competes was chosen at 32 streams, and a few may be served best by less."""
    return System(
        DEFAULTS,
        "Sightline, its defaults",
        _sightline(folder, serve_flags),
        PRECISIONS[:1],
        gated=True,
    )


def ours_deterministic(folder: Path, serve_flags: Sequence[str], like: Tried) -> System:
    """The same as the one that competes, but for the flag: what the flag costs."""
    return System(
        DETERMINISTIC,
        "Sightline `--deterministic`",
        _sightline(folder, [*serve_flags, "--deterministic"]),
        (like.setting,),
        threads=(like.threads,),
        concurrencies=(8,),
        few_requests=True,
        gated=True,
        deterministic=True,
    )


def transformers_tuned(linked: Path) -> System:
    """``linked`` is the checkpoint as ``link_checkpoint`` makes it."""
    return System(
        "transformers",
        "`transformers serve`, tuned",
        _transformers(linked),
        transformers_serve.DTYPES,
        threads=(DEFAULT, "1"),
        takes_ignore_eos=False,
        few_requests=True,
    )


def transformers_defaults(linked: Path) -> System:
    """Not at 32: requests that wait in one line are served no faster for being more."""
    return System(
        "transformers-defaults",
        "`transformers serve`, its defaults",
        _transformers(linked),
        ("auto",),
        concurrencies=(1, 8),
        takes_ignore_eos=False,
        few_requests=True,
    )


def llamas(llama: llama_server.Llama) -> list[System]:
    """One for each file; its threads are tried."""
    return [
        System(
            f"llama-{gguf.stem}",
            f"`llama-server`, {gguf.stem}",
            _llama(llama, gguf),
            (gguf.name,),
            threads=thread_counts(),
        )
        for gguf in llama.ggufs
    ]


def _sightline(folder: Path, flags: Sequence[str]) -> Start:
    @contextlib.contextmanager
    def start(setting: str, threads: str) -> Iterator[Server]:
        port = free_port()
        told = {DEFAULT: [], TWO_ENGINES: ["--engines", "2"]}.get(threads, ["--threads", threads])
        command = sightline_command(port, str(folder), "--device", "cpu", "--dtype", setting, *told, *flags)
        with running("sightline", command, port=port, ready_path="/ready") as server:
            yield server

    return start


def _transformers(linked: Path) -> Start:
    def start(setting: str, threads: str) -> AbstractContextManager[Server]:
        environment = {} if threads == DEFAULT else {"OMP_NUM_THREADS": threads}
        return transformers_serve.serving(linked, setting, environment=environment)

    return start


def _llama(llama: llama_server.Llama, gguf: Path) -> Start:
    def start(_setting: str, threads: str) -> AbstractContextManager[Server]:
        return llama_server.serving(llama, gguf, threads, slots=max(CONCURRENCIES))

    return start
