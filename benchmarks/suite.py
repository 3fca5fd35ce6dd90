"""The comparison behind every speed claim on a CPU, and the project's one bench: `scripts/bench --help`.

Ours, quantized and not, `--deterministic`, and the peers serve the same weights, all up at once; each round asks every
system in turn and the next one the other way round (ABBA), so that a machine that slows down or a neighbour that wakes
up takes from all. Ours is asked twice a round: what it differs from itself by is noise. Whatever fails the gate
(``gate.py``) gets no figure.
"""

import argparse
import contextlib
import datetime
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import gate, llama_server, regression, report, tables, transformers_serve
from benchmarks.figures import AGAIN, BASE, FORMAT, figures_of
from benchmarks.machine import ROOT, describe_machine, load_average, matmul_gflops, nvidia_smi
from benchmarks.servers import Server, ServerError, bench
from benchmarks.systems import (
    CONCURRENCIES,
    Choice,
    System,
    can_compile,
    choose,
    llamas,
    ours,
    ours_compiled,
    ours_compiled_int8,
    ours_defaults,
    ours_deterministic,
    ours_int8,
    transformers_defaults,
    transformers_tuned,
)
from sightline_models.presets import PRESETS

INPUT_LEN, OUTPUT_LEN = 64, 128
TRIED_LEN, TRIED_FEW = OUTPUT_LEN // 2, 4


@dataclass(frozen=True)
class Size:
    name: str
    rounds: int
    requests: Mapping[int, int]
    """By concurrency, a load's requests."""
    few: Mapping[int, int]
    """The same for a server that is slow or takes them one by one: a shorter line flatters its first tokens."""


QUICK = Size("quick", 2, {1: 2, 8: 8, 32: 32}, {1: 1, 8: 8, 32: 32})
FULL = Size("full", 5, {1: 4, 8: 16, 32: 64}, {1: 2, 8: 8, 32: 32})


@dataclass(frozen=True)
class Plan:
    """What the command line asked for."""

    size: Size
    rounds: int
    images: str
    with_peer: bool
    llama: llama_server.Llama | None
    serve_flags: Sequence[str]


@dataclass
class Outcome:
    """What one model gave."""

    model: str
    choices: list[Choice] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(choice.passed for choice in self.choices)

    def to_json(self) -> dict[str, Any]:
        systems = [choice.to_json() for choice in self.choices]
        return {"model": self.model, "passed": self.passed, "systems": systems, "loads": self.loads}


@contextlib.contextmanager
def checkpoint(name: str) -> Iterator[Path]:
    """A folder with the weights that all servers load: the demo model's own, or random ones of a named shape."""
    # Only for writing weights is torch wanted: the rest of this process starts servers and waits.
    from sightline_models import presets, tiny

    if name == "demo":
        yield presets.demo_checkpoint()
        return
    folder = Path(tempfile.mkdtemp(prefix="sightline-weights-"))
    try:
        tiny.write_checkpoint(folder, preset=name, seed=0, dtype="bfloat16")
        yield folder
    finally:
        shutil.rmtree(folder)


class Comparison:
    """One model's: gate, trials, then rounds."""

    def __init__(self, model: str, plan: Plan, console: Console) -> None:
        self.outcome = Outcome(model)
        self._plan, self._console = plan, console

    def run(self) -> Outcome:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(checkpoint(self.outcome.model))
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="sightline-peer-"))
            servers = self._start(folder, Path(scratch) / "model", stack)
            if BASE in {system.key for system, _ in servers}:
                self._rounds(servers)
        return self.outcome

    def _start(self, folder: Path, linked: Path, stack: contextlib.ExitStack) -> list[tuple[System, Server]]:
        """The servers that compete, in the order of a round."""
        base, int8 = ours(folder, self._plan.serve_flags), ours_int8(folder, self._plan.serve_flags)
        self._say("asking the reference")
        kinds = [system.kind(setting) for system in (base, int8) for setting in system.settings]
        self._reference = gate.ask_reference(folder, kinds)
        chosen = self._choose(base)
        self._choose(int8)
        if can_compile():
            self._choose(ours_compiled(folder, self._plan.serve_flags))
            self._choose(ours_compiled_int8(folder, self._plan.serve_flags))
        self._choose(ours_defaults(folder, self._plan.serve_flags))
        if chosen.best is None:
            self._say("[bold red]Sightline failed the gate: nothing is compared[/]")
            return []
        self._choose(ours_deterministic(folder, self._plan.serve_flags, chosen.best))
        if self._plan.with_peer:
            transformers_serve.link_checkpoint(folder, linked)
            self._choose(transformers_tuned(linked))
            self._choose(transformers_defaults(linked))
        for system in llamas(self._plan.llama) if self._plan.llama else ():
            self._choose(system)
        servers = []
        for choice in self.outcome.choices:
            if best := choice.best:
                server = stack.enter_context(choice.system.start(best.setting, best.threads))
                self._warm_up(choice.system, server)
                servers.append((choice.system, server))
        return servers

    def _choose(self, system: System) -> Choice:
        choice = choose(system, self._check, self._speed)
        self.outcome.choices.append(choice)
        for one in choice.tried:
            rate = "" if one.tokens_per_s is None else f", {one.tokens_per_s:,.0f} tokens/s"
            verdict = (
                "" if one.gate is None else f"; {'passed' if one.passed else 'FAILED the gate, no speed'}: {one.gate}"
            )
            self._say(f"{system.label}, {tables.started_with(one.to_json())}{rate}{verdict}")
        return choice

    def _check(self, system: System, setting: str, server: Server) -> gate.Verdict:
        kind = system.kind(setting)
        logits = gate.judge_logits(self._reference, kind)
        if not logits.passed:
            return logits
        answers = gate.judge_server(server, self._reference, kind, deterministic=system.deterministic)
        return gate.Verdict(answers.passed, f"{logits.says}; {answers.says}")

    def _speed(self, system: System, server: Server) -> float:
        self._warm_up(system, server)
        streams = TRIED_FEW if system.few_requests else max(CONCURRENCIES)
        summary = self._ask(system, server, requests=streams, streams=streams, output_len=TRIED_LEN)
        return float(summary["throughput"]["output_tokens_per_s"])

    def _warm_up(self, system: System, server: Server) -> None:
        """A warm-up inside each load would count in the processor time."""
        streams = 1 if system.few_requests else max(CONCURRENCIES)
        self._ask(system, server, requests=streams, streams=streams, output_len=8 if system.few_requests else 24)

    def _rounds(self, servers: list[tuple[System, Server]]) -> None:
        base, base_server = servers[0]
        assert base.key == BASE, f"the first system is {base.key}, not {BASE}"
        order = [(system.key, system, server) for system, server in servers] + [(AGAIN, base, base_server)]
        for turn in range(self._plan.rounds):
            for concurrency in CONCURRENCIES:
                for key, system, server in order if turn % 2 == 0 else reversed(order):
                    if concurrency in system.concurrencies:
                        self._load(turn, concurrency, key, system, server)

    def _load(self, turn: int, concurrency: int, key: str, system: System, server: Server) -> None:
        requests = (self._plan.size.few if system.few_requests else self._plan.size.requests)[concurrency]
        summary = self._ask(system, server, requests=requests, streams=concurrency, output_len=OUTPUT_LEN)
        figures = figures_of(summary, summary["server_cpu_s"])
        row = {"system": key, "concurrency": concurrency, "round": turn, "requests": requests, "figures": figures}
        told = ("duration_s", "seed", "caches", "client_cpu_share", "server_cpu_s")
        self.outcome.loads.append({**row, **{name: summary[name] for name in told}, "load": load_average()})
        self._say(f"round {turn + 1}, {concurrency} at once, {key}: {figures['tokens_per_s']:,.0f} tokens/s")

    def _ask(self, system: System, server: Server, *, requests: int, streams: int, output_len: int) -> dict[str, Any]:
        summary = bench(
            server,
            num_prompts=requests,
            max_concurrency=streams,
            input_len=INPUT_LEN,
            output_len=output_len,
            images=self._plan.images,
            warmup=0,
            ignore_eos=system.takes_ignore_eos,
        )
        if summary["counts"]["short"]:
            raise ServerError(f"{server.name} ended {summary['counts']['short']} answers early: the loads differ.")
        return summary

    def _say(self, sentence: str) -> None:
        self._console.print(f"  {sentence}", highlight=False, soft_wrap=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        epilog="With --suite gpu, every flag but --suite and --full goes to scripts/gpu_check: see its --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=("cpu", "gpu"), help="default: gpu where there is a GPU, else cpu")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="2 rounds of few requests (default)")
    size.add_argument("--full", action="store_true", help="5 rounds, meant for under 20 minutes: what is quoted")
    parser.add_argument("--rounds", type=int, metavar="N", help="instead of the size's own")
    parser.add_argument("--models", default="demo,llava-45m", help="demo or names of shapes (%(default)s)")
    parser.add_argument("--images", choices=("own", "same", "none"), default="own", help="fresh pictures (%(default)s)")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="transformers serve too")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="llama.cpp's server, as a peer")
    parser.add_argument("--gguf", metavar="FILE,FILE", help="the model's weights for it, such as BF16 and Q8_0")
    parser.add_argument("--mmproj", type=Path, metavar="FILE", help="the model's projector for it")
    parser.add_argument("--serve-flag", action="append", default=[], metavar="FLAG", help="for sightline serve")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: a dated file in benchmarks/results")
    parser.add_argument("--against", type=Path, metavar="FILE", help="fail when a ratio is worse than in this result")
    parser.add_argument("--report", action="store_true", help="instead: write README, page and chart from the results")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args, others = parser.parse_known_args(arguments)
    if args.report:
        return report.main([])
    if (args.suite or ("gpu" if nvidia_smi() else "cpu")) == "gpu":
        return run_gpu(arguments if arguments is not None else sys.argv[1:])
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds must be at least 1")
    models = [name for name in args.models.split(",") if name]
    if not models or not set(models) <= {"demo", *PRESETS}:
        parser.error(f"--models {args.models}: name some of demo, {', '.join(PRESETS)}")
    try:
        llama = llama_server.read_flags(args.llama_server, args.gguf, args.mmproj, images=args.images, models=models)
    except llama_server.LlamaServerError as error:
        parser.error(str(error))
    console = Console()
    if args.peer and (missing := transformers_serve.missing_packages()):
        console.print(
            f"transformers serve needs {', '.join(missing)}: .venv/bin/pip install -e '.[bench]', or leave it out "
            "with --no-peer."
        )
        return 1
    try:
        baseline = regression.read(args.against) if args.against else None
    except ValueError as error:
        parser.error(str(error))
    # Ended from outside, it still ends the servers it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    size = FULL if args.full else QUICK
    plan = Plan(size, args.rounds or size.rounds, args.images, args.peer, llama, args.serve_flag)
    try:
        document = run_cpu(models, plan, console)
    except ServerError as error:
        console.print(str(error), markup=False)
        return 1
    name = (
        f"cpu-{datetime.date.today():%Y-%m-%d}.json"
        if args.full
        else f"cpu-quick-{datetime.date.today():%Y-%m-%d}.json"
    )
    path = args.json or ROOT / "benchmarks/results" / name
    path.write_text(json.dumps(document, indent=1) + "\n")
    for line in tables.terminal(document):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(f"Written: {path}. Next: scripts/bench --report")
    try:
        worse = regression.regressions(baseline, document) if baseline else []
    except ValueError as error:
        worse = [str(error)]
    if baseline and not worse:
        console.print(f"No ratio is worse than in {args.against}.")
    for sentence in worse:
        console.print(sentence, style="red", highlight=False, soft_wrap=True, markup=False)
    return 1 if worse or not all(model["passed"] for model in document["models"]) else 0


def run_cpu(models: Sequence[str], plan: Plan, console: Console) -> dict[str, Any]:
    """Every model's comparison, and the machine before and after. Raises ServerError when one can't be finished."""
    began = time.monotonic()
    document: dict[str, Any] = {
        "suite": "cpu",
        "format": FORMAT,
        "size": plan.size.name,
        "rounds": plan.rounds,
        "machine": {**describe_machine(), "matmul_gflops": matmul_gflops()},
    }
    if plan.llama is not None:
        document["machine"]["packages"]["llama-server"] = plan.llama.version()
    outcomes = []
    for name in models:
        console.print(f"[bold]{name}[/]")
        outcomes.append(Comparison(name, plan, console).run())
    document["machine_after"] = {"load": load_average(), "matmul_gflops": matmul_gflops()}
    document["seconds"] = round(time.monotonic() - began, 1)
    document["workload"] = {"input_len": INPUT_LEN, "output_len": OUTPUT_LEN, "images": plan.images}
    document["serve_flags"] = list(plan.serve_flags)
    document["models"] = [outcome.to_json() for outcome in outcomes]
    return document


def run_gpu(arguments: Sequence[str]) -> int:
    """`scripts/gpu_check` with the same arguments, but for those that only choose the suite and its usual size."""
    from benchmarks.gpu.main import main as gpu_main

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--suite")
    own.add_argument("--full", action="store_true")
    _, rest = own.parse_known_args(arguments)
    return gpu_main(rest)


if __name__ == "__main__":
    sys.exit(main())
