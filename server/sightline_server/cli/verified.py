"""`--verify`'s result: how the doctor comes by it without importing torch, and how it is written for people.

Knows the engine's answer and a process that gives it. Judges nothing.
"""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from sightline_server import settings as settings_table
from sightline_server.cli.terminal import one_line, size
from sightline_server.engine import wire
from sightline_server.engine.types import Pace, Verification
from sightline_server.settings import Settings

_PROGRAM = "sightline_server.engine.load_probe"
_Report = wire.Progress | wire.Ready | wire.StartFailed


def ask_engine(folder: Path, settings: Settings, tell: Callable[[str, float], None]) -> Verification:
    """Load the model as `sightline serve` would, in a process of its own, and return what its check found.

    ``tell`` hears what is being done and how far it is. A process that fails or crashes is an answer too.
    """
    start = wire.Start(str(folder), settings_table.replace(settings, verify=True))
    message = "it said nothing"
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(
            [sys.executable, "-m", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(msgspec.json.encode(start) + b"\n")
            process.stdin.close()
            for line in process.stdout:
                match msgspec.json.decode(line, type=_Report):
                    case wire.Progress(stage, fraction):
                        tell(stage, fraction)
                    case wire.Ready(info):
                        assert info.verification is not None, "the settings ask for a check"
                        return info.verification
                    case wire.StartFailed(sentence):
                        return _failed(sentence, settings)
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        message = f"its process was killed by {name}" + (", often for want of memory" if name == "SIGKILL" else "")
    elif last:
        message = one_line(last[0])
    return _failed(f"The check failed: {message.rstrip('.')}. Free some memory, or leave --verify out.", settings)


def _failed(message: str, settings: Settings) -> Verification:
    return Verification(outcome="failed", message=one_line(message), quantization=settings.quantize)


def lines_of(found: Verification) -> list[str]:
    """A few short lines; a check that came to nothing says why in the first."""
    if found.outcome != "compared":
        shown = [found.message]
    else:
        assert found.mean_kl is not None, "a comparison has figures"
        assert found.worst_kl is not None, "a comparison has figures"
        assert found.top1_agreement is not None, "a comparison has figures"
        same = round(found.top1_agreement * found.num_positions)
        shown = [
            f"{found.quantization} against unquantized weights, {found.num_answers} questions about drawn pictures",
            f"KL divergence {found.mean_kl:.2g} nats a token, {found.worst_kl:.2g} at worst",
            f"the same likeliest token at {same} of {found.num_positions}",
        ]
    if found.served is not None:
        shown.append(f"{found.quantization}: {_pace(found.served)}" if found.unquantized else _pace(found.served))
    if found.unquantized is not None:
        shown.append(f"unquantized: {_pace(found.unquantized)}")
    return shown


def _pace(pace: Pace) -> str:
    """One request at a time, without a server round it, so not the speed of a busy one."""
    return (
        f"{size(pace.weight_bytes)}, {pace.prompt_tokens_per_s:,.0f} prompt and {pace.decode_tokens_per_s:,.0f} answer "
        "tokens/s alone in the engine"
    )
