"""Writes the doctor's report, as text for people or as JSON for programs. Judges nothing."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sightline_models.parameter_count import count_parameters
from sightline_server.cli.diagnosis import Checkpoint, Choice, Finding, limit_flag
from sightline_server.cli.fit import TEXT_TOKENS, Fit
from sightline_server.cli.machine import Machine, TorchView
from sightline_server.cli.terminal import own_command, size
from sightline_server.cli.verified import lines_of
from sightline_server.engine.placement import count_engines
from sightline_server.engine.types import Verification
from sightline_server.settings import Settings

Fact = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Report:
    machine: Machine
    versions: Mapping[str, str | None]
    torch: TorchView
    choice: Choice
    settings: Settings
    checkpoint: Checkpoint | None
    served: Fit | None
    """How the checkpoint would be served."""
    fits: tuple[Fit, ...]
    findings: tuple[Finding, ...]
    verification: Verification | None = None
    """With ``--verify``, when the model could be loaded."""

    @property
    def can_serve(self) -> bool:
        return not any(finding.level == "problem" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Everything the text says, under stable names; sizes in bytes."""
        checkpoint = self.checkpoint
        return {
            "can_serve": self.can_serve,
            "machine": dataclasses.asdict(self.machine),
            "versions": dict(self.versions),
            "torch": dataclasses.asdict(self.torch),
            "device": {
                "name": self.choice.device,
                "why": self.choice.why,
                "planned": self.choice.planned,
                **dataclasses.asdict(self.choice.memory),
            },
            "model": checkpoint
            and {
                "name": checkpoint.name,
                "folder": str(checkpoint.folder),
                "architecture": checkpoint.config.architecture,
                "dtype": checkpoint.config.dtype,
                "quantization": checkpoint.config.quantization,
                "disk_bytes": checkpoint.disk_bytes,
                "parameters": count_parameters(checkpoint.config).total,
                "tokens_per_image": checkpoint.config.num_image_tokens,
            },
            "served": self.served and dataclasses.asdict(self.served),
            "fits": [dataclasses.asdict(fit) for fit in self.fits],
            "verification": msgspec.to_builtins(self.verification),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    def show(self, console: Console | None = None) -> None:
        """Print the report, as wide as the terminal."""
        console = console or Console(highlight=False)
        _facts(console, "Machine", self._machine_facts())
        _facts(console, "Software", self._software_facts())
        _facts(console, "Device", [("used", f"{self.choice.device}: {self.choice.why}")])
        if self.checkpoint and self.served:
            _facts(console, "Model", self._model_facts(self.checkpoint, self.served))
        if self.verification:
            first, *rest = lines_of(self.verification)
            _facts(console, "Check", [("checked", first), *(("", line) for line in rest)])
        self._show_fits(console)
        self._show_findings(console)

    def _machine_facts(self) -> list[Fact]:
        machine = self.machine
        cores = f"{machine.usable_cores:g} usable"
        if machine.usable_cores < machine.cores:
            why = "container limit" if machine.usable_cores < machine.allowed_cores else "affinity"
            cores += f" of {machine.cores} ({why})"
        limit = " (what the container's limit leaves)" if machine.memory_limited else ""
        facts = [
            ("processor", f"{machine.cpu} ({machine.architecture})"),
            ("CPUs", cores),
            ("features", ", ".join(machine.features) or "none that speed up matrix products"),
            ("memory", f"{size(machine.memory_free)} free of {size(machine.memory_total)}{limit}"),
        ]
        free = {gpu.name: gpu.free_bytes for gpu in self.torch.gpus}
        if machine.driver_gpus:
            for index, gpu in enumerate(machine.driver_gpus):
                left = free.get(gpu.name)
                memory = size(gpu.total_bytes) if left is None else f"{size(left)} free of {size(gpu.total_bytes)}"
                capability = f", compute capability {gpu.capability}" if gpu.capability else ""
                facts.append((f"GPU {index}", f"{gpu.name}, {memory}, driver {gpu.driver}{capability}"))
        else:
            facts.append(("GPU", "an NVIDIA device without a driver" if machine.nvidia_devices else "none from NVIDIA"))
        return facts

    def _software_facts(self) -> list[Fact]:
        facts = []
        for name, version in self.versions.items():
            build = ""
            if name == "torch" and not self.torch.error:
                cuda = self.torch.cuda_build
                build = f" (built for CUDA {cuda}, runs on CPUs too)" if cuda else " (built without CUDA)"
            facts.append((name, f"{version}{build}" if version else "missing"))
        return facts

    def _model_facts(self, checkpoint: Checkpoint, served: Fit) -> list[Fact]:
        config = checkpoint.config
        parameters = count_parameters(config).total
        files = f"{checkpoint.num_files} file{'s' if checkpoint.num_files > 1 else ''}"
        cpu_cache = f"--cpu-cache-gb {self.settings.cpu_cache_gb:g}"
        limit = self.choice.bounds(self.settings).gpu_memory
        gpu_cache = (
            f"--gpu-memory {size(limit)}"
            if limit
            else f"--gpu-memory-utilization {self.settings.gpu_memory_utilization:g}"
        )
        cache = f"{size(served.kv_bytes_per_token)} a token"
        if served.fits:
            how = f"{gpu_cache}, estimated" if self.choice.memory.is_gpu else cpu_cache
            cache += f", room for {served.cache_tokens:,} tokens ({how})"
        engines = count_engines(self.settings)
        weights = f"weights {size(served.weight_bytes)}" + (f" in each of {engines} engines" if engines > 1 else "")
        context = f"{served.max_context:,} tokens a request at most" if served.fits else "none: it doesn't fit"
        return [
            ("name", checkpoint.name),
            ("folder", str(checkpoint.folder)),
            ("kind", f"{config.architecture}, {_count(parameters)} parameters"),
            ("on disk", f"{size(checkpoint.disk_bytes)} in {files}, {_kept(config.quantization, config.dtype)}"),
            ("served", f"in {_kept(served.precision, served.rest)}: {weights}"),
            ("cache", cache),
            ("context", f"{context}; a picture takes {config.num_image_tokens}"),
        ]

    def _show_fits(self, console: Console) -> None:
        limit = self.choice.bounds(self.settings).gpu_memory
        within = f", within {size(limit)}" if limit else ""
        title = f"What fits on {self.choice.device}, {size(self.choice.memory.free)} free{within}"
        console.print(Text(title, style="bold"))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=True, header_style="")
        table.add_column("model", overflow="fold")
        table.add_column("kept in")
        for name in ("weights", "needs", "tokens", "at once"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("fits", no_wrap=True)
        for index, fit in enumerate(self.fits):
            first = index == 0 or self.fits[index - 1].model != fit.model
            last = index + 1 == len(self.fits) or self.fits[index + 1].model != fit.model
            table.add_row(
                fit.model if first else "",
                fit.precision,
                size(fit.weight_bytes),
                size(fit.needed_bytes),
                f"{fit.cache_tokens:,}" if fit.fits else "-",
                f"{fit.requests:,}" if fit.fits else "-",
                Text("yes", style="green") if fit.fits else Text("no", style="dim"),
                end_section=last,
            )
        console.print(table)
        what = "weights, one step and " + ("one longest request" if self.choice.memory.is_gpu else "the whole cache")
        note = (
            f"needs: {what}. tokens: of all requests, in the cache. at once: requests of a picture and {TEXT_TOKENS} "
            "tokens of text each. int8 and nf4: with --quantize, where the checkpoint isn't quantized already."
        )
        console.print(Padding(Text(note, style="dim"), (0, 0, 1, 2), expand=False))

    def _show_findings(self, console: Console) -> None:
        for finding in self.findings:
            style = "bold red" if finding.level == "problem" else "bold yellow"
            console.print(Text.assemble((f"{finding.level}: ", style), finding.sentence))
            if finding.fix:
                # Unbroken, so that it can be copied whole.
                console.print(Text.assemble(("  fix: ", "bold"), finding.fix), soft_wrap=True)
            console.print()
        if not self.can_serve or self.served is None or self.checkpoint is None:
            count = sum(finding.level == "problem" for finding in self.findings)
            console.print(Text(f"Not ready: {count} problem{'s' if count != 1 else ''} above.", style="bold red"))
            return
        quantize = "" if self.settings.quantize == "none" else f"--quantize {self.settings.quantize}"
        words = own_command(), "serve", self.settings.model, quantize, limit_flag(self.choice, self.settings)
        command = " ".join(word for word in words if word)
        if self.choice.planned:
            told = ("It would fit. ", "bold green"), f"On {self.choice.device}: {command}"
        else:
            told = ("Ready. ", "bold green"), f"{self.checkpoint.name} can be served: {command}"
        console.print(Text.assemble(*told), soft_wrap=True)


def _facts(console: Console, title: str, facts: list[Fact]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=12, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(Text(title, style="bold"))
    console.print(Padding(table, (0, 0, 1, 2), expand=False))


def _kept(linears: str, rest: str) -> str:
    return rest if linears in ("none", rest) else f"{linears} (all but linear layers {rest})"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
