"""`scripts/gpu_check`: every stage in turn, each in a process of its own, within a time that was set beforehand.

Knows stages, clocks and result files. Knows no tensor: a stage that hangs or takes the device down with it is ended,
written down as failed with what it said, and the next one starts.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu import pack, verdicts
from benchmarks.machine import ROOT, child_environment, describe_machine, nvidia_smi

LEAST_S = 5.0
"""A stage with less time than this left is not started."""
END_TIMEOUT_S = 10.0
"""What is waited for a killed stage, and for the last of its words."""


@dataclass(frozen=True)
class Plan:
    """One stage: the module that runs it and the seconds it may take."""

    name: str
    module: str
    limit_s: float
    about: str
    variant: str = ""


# Is it right, then is it fast, then is it faster than others: what is cut off by the limit matters least.
STAGES = (
    Plan("environment", "environment", 60, "the machine and its ceilings"),
    Plan("tests", "gpu_tests", 150, "the tests marked gpu"),
    Plan("kernels", "kernels", 90, "fused kernels beside their references"),
    Plan("oracle", "oracle", 150, "bfloat16 error beside transformers', against float32"),
    Plan("decode", "decode", 90, "a decode step in bfloat16 beside the bandwidth floor"),
    Plan("decode-int8", "decode", 60, "the same in int8", "int8"),
    Plan("decode-nf4", "decode", 60, "the same in NF4", "nf4"),
    Plan("profile", "step_profile", 60, "kernels, waits and idle share of 64 streams"),
    Plan("pictures", "pictures", 60, "the encoder, a second turn, a burst of pictures"),
    Plan("decode-reference", "decode", 45, "the engine without fused kernels", "reference"),
    Plan("peer-eager", "peers", 75, "transformers' generate, alone and in batches", "eager"),
    Plan("peer-compiled", "peers", 150, "transformers with a static cache, compiled", "compiled"),
    Plan("load", "load", 150, "the true server under load over HTTP"),
    Plan("bitsandbytes", "bnb", 60, "bitsandbytes' layers in our graphs"),
    Plan("deterministic", "deterministic", 60, "what --deterministic costs"),
    Plan("peer-int8wo", "peers", 150, "transformers compiled with torchao's int8", "int8wo"),
    Plan("peer-int4wo", "peers", 150, "transformers compiled with torchao's int4", "int4wo"),
    Plan("serve", "serve_peer", 150, "transformers serve over HTTP"),
)


def run_stage(plan: Plan, out: Path, flags: list[str], limit_s: float) -> dict[str, Any]:
    """Run one stage and return what it wrote, with ``failed`` saying why when it did not end well."""
    path = out / f"{plan.name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.gpu.{plan.module}", "--out", str(path), *flags]
    if plan.variant:
        command += ["--variant", plan.variant]
    environment = {**child_environment(), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    said: list[str] = []
    # Not read here: what a stage leaves running may hold its output open after it has ended.
    reader = threading.Thread(target=_repeat, args=(process, said), daemon=True)
    reader.start()
    ended_late = False
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        ended_late = True
        # Not by its session: the server of the load has one of its own.
        with contextlib.suppress(psutil.NoSuchProcess):
            stage = psutil.Process(process.pid)
            for each in (stage, *stage.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        # A process that hangs in the driver may outlive even this, and the next stage is to start all the same.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT_S)
    # What a stage left behind goes with it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    reader.join(END_TIMEOUT_S)
    path.with_suffix(".part").unlink(missing_ok=True)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"stage": plan.name}
    if ended_late:
        results["failed"] = f"ended after its limit of {limit_s:.0f} s"
    elif process.returncode:
        results["failed"] = f"ended with code {process.returncode}"
    elif not results.get("finished"):
        results["failed"] = "ended without a whole result"
    if "failed" in results:
        results["output_tail"] = "".join(said)[-6000:]
    path.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _repeat(process: "subprocess.Popen[str]", said: list[str]) -> None:
    """Print what the process says, and keep it."""
    assert process.stdout is not None, "the stage's output is not piped"
    with process.stdout:
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)


def default_folder(device: str, quick: bool) -> Path:
    """Among the results for what counts as one; elsewhere for what only proves the code."""
    date = f"{datetime.date.today():%Y-%m-%d}"
    if device == "cpu" or quick:
        return Path(tempfile.gettempdir()) / f"sightline-gpu-check-{date}"
    told = nvidia_smi()
    name = re.sub(r"[^a-z0-9]+", "-", (told or {}).get("name", device).lower()).strip("-")
    return ROOT / "benchmarks/results" / f"gpu-{name}-{date}"


def chosen(names: str | None) -> list[Plan]:
    """The stages of a comma-separated list, in their own order. Raises ValueError naming what is unknown."""
    if names is None:
        return list(STAGES)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {plan.name: plan for plan in STAGES}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"There is no stage {', '.join(unknown)}. Stages: {', '.join(known)}.")
    return [plan for plan in STAGES if plan.name in wanted]


def make_parser() -> argparse.ArgumentParser:
    stages = "; ".join(f"{plan.name}: {plan.about}" for plan in STAGES)
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description="Check and measure a CUDA machine in one command; every stage writes its JSON as it ends.",
        epilog=f"Stages: {stages}.",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/gpu-<GPU>-<date>")
    parser.add_argument("--stages", metavar="A,B", help="default: all; a folder gathers those of several commands")
    parser.add_argument("--missing", action="store_true", help="of these, those without a whole result in the folder")
    parser.add_argument("--plan", action="store_true", help="instead: print the stages and what each may take")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu proves the code on tiny shapes")
    parser.add_argument("--quick", action="store_true", help="smaller shapes")
    parser.add_argument("--limit", type=float, default=480.0, metavar="S", help="for all stages (%(default)g)")
    parser.add_argument("--commit", metavar="NAME", help="what is measured, where there is no git history")
    parser.add_argument(
        "--pack",
        nargs="?",
        type=Path,
        const=pack.DEFAULT_FOLDER,
        metavar="DIR",
        help="instead: gather the wheels that a bare CUDA machine without a network lacks (default %(const)s)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.pack is not None:
        return pack.gather(args.pack)
    try:
        plans = chosen(args.stages)
    except ValueError as error:
        parser.error(str(error))
    out = args.out or default_folder(args.device, args.quick)
    if args.missing:
        plans = [plan for plan in plans if not is_whole(read_stage(out, plan.name))]
    if args.plan:
        print("\n".join(f"{plan.name:<17} {plan.limit_s:>4g} s  {plan.about}" for plan in plans))
        print(f"at most {min(args.limit, sum(plan.limit_s for plan in plans)):g} s together (--limit)")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    flags = ["--device", args.device, *(["--quick"] if args.quick else [])]
    deadline = time.monotonic() + args.limit
    machine = describe_machine(args.commit)
    summary: dict[str, Any] = {"machine": machine, "device": args.device, "stages": earlier_stages(out)}
    for plan in plans:
        left = deadline - time.monotonic()
        began = time.monotonic()
        if left < LEAST_S:
            results = leave_out(plan, out, f"not started: --limit {args.limit:g} was used up")
        else:
            print(f"\n== {plan.name}: {plan.about}", flush=True)
            results = run_stage(plan, out, flags, min(plan.limit_s, left))
        verdict = results.get("failed", "ok")
        if "skipped" in results and verdict == "ok":
            verdict = f"skipped: {results['skipped']}"
        seconds = round(time.monotonic() - began, 1)
        summary["stages"][plan.name] = {"verdict": verdict, "seconds": seconds, "commit": machine["commit"]}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        conclude(out, summary)
    print()
    for line in verdicts.table(conclude(out, summary)):
        print(line)
    print()
    mine = [plan.name for plan in plans]
    for name in mine:
        told = summary["stages"][name]
        print(f"{name:<17} {told['seconds']:>6.1f} s  {told['verdict']}")
    print(f"Results: {out}")
    return 0 if all(summary["stages"][name]["verdict"].startswith(("ok", "skipped")) for name in mine) else 1


def read_stage(out: Path, name: str) -> dict[str, Any]:
    path = out / f"{name}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return results


def is_whole(results: dict[str, Any]) -> bool:
    """Whether a stage came to its end and nothing was wrong."""
    return bool(results.get("finished")) and "failed" not in results


def earlier_stages(out: Path) -> dict[str, Any]:
    """What earlier commands did in this folder."""
    path = out / "summary.json"
    stages: dict[str, Any] = json.loads(path.read_text())["stages"] if path.exists() else {}
    return stages


def leave_out(plan: Plan, out: Path, reason: str) -> dict[str, Any]:
    """Write down that a stage did not run, unless an earlier command has results of it."""
    results: dict[str, Any] = {"stage": plan.name, "failed": reason}
    if not read_stage(out, plan.name).get("finished"):
        (out / f"{plan.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def conclude(out: Path, summary: dict[str, Any]) -> dict[str, verdicts.Figure]:
    """Write the verdicts of all that lies in the folder by now, and return them."""
    machine = dict(summary["machine"])
    others = {name: told["commit"] for name, told in summary["stages"].items() if told["commit"] != machine["commit"]}
    if others:
        machine["other_commits"] = others
    figures = verdicts.read_figures(verdicts.Folder.read(out, [plan.name for plan in STAGES]))
    verdicts.write_verdicts(out, machine, figures)
    return figures


if __name__ == "__main__":
    sys.exit(main())
