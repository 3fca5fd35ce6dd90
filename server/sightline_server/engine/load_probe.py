"""`python -m sightline_server.engine.load_probe`: loads a model as the server would, and says what came of it.

Takes a ``Start`` and tells ``Progress``, then ``Ready`` or ``StartFailed``, each a line of JSON. A process of its own
for commands that import no torch, so that an engine that crashes is something to report instead of an end.
"""

import sys
from pathlib import Path

import msgspec

from sightline_models.config import CheckpointError
from sightline_server import logs
from sightline_server.engine import wire
from sightline_server.settings import SettingsError


def main() -> int:
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=wire.Start)
    logs.configure(start.settings)

    def tell(report: wire.Progress | wire.Ready | wire.StartFailed) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
        sys.stdout.buffer.flush()

    tell(wire.Progress("starting the engine", 0.0))
    # Torch comes with it: that takes seconds, and may fail.
    from sightline_server.engine.load import load_engine

    try:
        _, info = load_engine(Path(start.folder), start.settings, lambda stage, done: tell(wire.Progress(stage, done)))
    except (CheckpointError, SettingsError) as error:
        tell(wire.StartFailed(str(error)))
        return 1
    tell(wire.Ready(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
