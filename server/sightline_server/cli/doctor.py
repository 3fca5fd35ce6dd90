"""`sightline doctor`: what this machine is, what it can serve, and what is missing, each with the fix.

Gathers facts (`machine.py`), has them judged (`diagnosis.py`, `fit.py`) and written down (`doctor_report.py`).
Changes nothing and never imports torch; starts a model only for ``--verify``, in a process of its own.
"""

import argparse
import errno
import json
import os
import socket
import tempfile
from pathlib import Path

from sightline_models.checkpoint_files import read_entries
from sightline_models.config import CheckpointError, VlmConfig, read_config
from sightline_models.images import ImageError
from sightline_models.presets import demo_checkpoint, write_preset
from sightline_models.tokenizer import TokenizerError
from sightline_server import settings as settings_table
from sightline_server.chat.model import ServedModel
from sightline_server.cli import diagnosis
from sightline_server.cli.announce import LoadingProgress
from sightline_server.cli.diagnosis import Checkpoint, Choice, Finding
from sightline_server.cli.doctor_report import Report
from sightline_server.cli.fit import Fit, plan, precisions
from sightline_server.cli.machine import TorchProbe, package_versions, read_machine
from sightline_server.cli.terminal import complain, one_line, own_command
from sightline_server.cli.verified import ask_engine
from sightline_server.settings import Settings, SettingsError

WELL_KNOWN = ("llava-1.5-7b", "llava-1.5-13b")
"""Shapes of published checkpoints, for the table of what would fit."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say what this machine can serve, and what is missing",
        description="Look at this machine and at a checkpoint, and say what can be served at which precision, and what "
        "is missing, with the fix. Exit code 0 when the model can be served, else 1.",
    )
    parser.add_argument(
        "model", nargs="?", default="", metavar="MODEL_DIR", help="checkpoint (default: the demo model)"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="plan for auto, cpu, cuda, cuda:N or cuda:0,cuda:1 (default: auto)"
    )
    parser.add_argument("--engines", metavar="N", help="plan for so many engines")
    parser.add_argument("--quantize", choices=("none", "int8", "nf4"), help="plan for weights quantized at load")
    parser.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="plan for a limit such as 20GiB or, on a machine without a GPU, for a card of that size",
    )
    parser.add_argument(
        "--verify", action="store_const", const="true", help="load the model and compare quantized weights with its own"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 when the model can be served on this machine, 1 when not, 2 for settings that can't be used."""
    flags = {"model": args.model}
    flags |= {
        name: given
        for name in ("device", "engines", "quantize", "gpu_memory", "verify")
        if (given := getattr(args, name, None))
    }
    try:
        settings = settings_table.load(flags)
    except SettingsError as error:
        complain(str(error))
        return 2
    report = examine(settings)
    print(json.dumps(report.as_json(), indent=2)) if args.json else report.show()
    return 0 if report.can_serve else 1


def examine(settings: Settings) -> Report:
    """Everything the report says."""
    probe = TorchProbe()
    machine = read_machine()
    versions = package_versions()
    folder = Path(settings.model).expanduser() if settings.model else demo_checkpoint()
    checkpoint, unreadable = read_checkpoint(folder, settings)
    shapes = {name: read_shape(name) for name in WELL_KNOWN}
    torch = probe.result()
    choice = diagnosis.choose(machine, torch, settings)
    findings = [
        *diagnosis.software_findings(versions, torch),
        *diagnosis.gpu_findings(machine, torch, settings, os.environ.get("CUDA_VISIBLE_DEVICES")),
        *unreadable,
        *diagnosis.process_findings(machine, choice, settings, port_taken=is_port_taken(settings.host, settings.port)),
    ]
    served: Fit | None = None
    if checkpoint is not None:
        shapes = {checkpoint.name: checkpoint.config, **shapes}
        served = diagnosis.plan_served(checkpoint, choice, settings)
        too_big = diagnosis.fit_finding(checkpoint, served, choice, settings, settings.model)
        findings += [too_big] if too_big else []
    verification = None
    if settings.verify and choice.planned:
        sentence = f"--verify loads the model, which it can't on {choice.device} that isn't there."
        fix = f"{own_command()} doctor --verify without --gpu-memory checks on this machine's CPU"
        findings.append(Finding(level="warning", sentence=sentence, fix=fix))
    elif settings.verify and checkpoint is not None and not any(finding.level == "problem" for finding in findings):
        with LoadingProgress() as progress:
            # Weights are checked by one engine, as the server has it.
            alone = settings_table.replace(settings, device=settings.devices[0], engines=1)
            verification = ask_engine(folder, alone, progress)
    return Report(
        machine=machine,
        versions=versions,
        torch=torch,
        choice=choice,
        settings=settings,
        checkpoint=checkpoint,
        served=served,
        fits=tuple(fit for name, config in shapes.items() for fit in _fits(name, config, choice, settings)),
        findings=tuple(findings),
        verification=verification,
    )


def read_checkpoint(folder: Path, settings: Settings) -> tuple[Checkpoint | None, list[Finding]]:
    """The checkpoint in ``folder`` as far as can be told without torch, or why it can't be loaded."""
    if not folder.is_dir():
        sentence = f"There is no folder {one_line(str(folder))}."
        fix = f"{own_command()} doctor MODEL_DIR, with the folder that holds config.json"
        return None, [Finding(level="problem", sentence=sentence, fix=fix)]
    try:
        model = ServedModel.load(folder, settings)
        entries = read_entries(folder)
    except (CheckpointError, TokenizerError, ImageError, SettingsError, OSError) as error:
        return None, [Finding(level="problem", sentence=f"{one_line(str(error)).rstrip('.')}.", fix=None)]
    return (
        Checkpoint(
            name=one_line(model.name),
            folder=folder,
            config=model.config,
            disk_bytes=sum(entry.num_bytes for entry in entries),
            num_files=len({entry.file for entry in entries}),
        ),
        [],
    )


def read_shape(name: str) -> VlmConfig:
    """The config of a named shape."""
    with tempfile.TemporaryDirectory(prefix="sightline-shape-") as folder:
        write_preset(name, Path(folder))
        return read_config(Path(folder))


def is_port_taken(host: str, port: int) -> bool:
    """Whether something listens there already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As the server does: a port that only lingers after its last owner is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _fits(name: str, config: VlmConfig, choice: Choice, settings: Settings) -> list[Fit]:
    kinds = precisions(choice.memory, gpu_bfloat16=choice.bfloat16)
    return [plan(name, config, precision, choice.memory, choice.bounds(settings)) for precision in kinds]
