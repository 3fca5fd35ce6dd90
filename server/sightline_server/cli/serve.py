"""`sightline serve`: settings in, a running server out, and an orderly end.

Puts the pieces together (model, decode pool, engine process, app, HTTP server) and owns their lifetimes and the
signals. Knows nothing of what a request holds, and never imports torch: the engine's process does.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sightline_models.config import CheckpointError
from sightline_models.images import ImageError
from sightline_models.presets import PRESETS, demo_checkpoint, write_preset
from sightline_models.tokenizer import TokenizerError
from sightline_server import logs, scratch
from sightline_server import settings as settings_table
from sightline_server.app import create_app
from sightline_server.auth.keyring import Keyring
from sightline_server.chat.decode_pool import DecodePool
from sightline_server.chat.model import ServedModel
from sightline_server.cli.announce import LoadingProgress, ReadyServer
from sightline_server.cli.lifetime import (
    HttpServer,
    ServeError,
    StopSignals,
    allow_many_connections,
    first_of,
    leave_no_core,
    listen,
)
from sightline_server.cli.terminal import complain
from sightline_server.engine.client import EngineStartError
from sightline_server.engine.fleet import make_engines
from sightline_server.errors import ApiError
from sightline_server.settings import Settings, SettingsError

log = logging.getLogger(__name__)

DESCRIPTION = """\
Serve a checkpoint folder over an OpenAI-compatible HTTP API; without MODEL_DIR, the bundled demo model. Each flag can
also be given as an environment variable: --max-queue as SIGHTLINE_MAX_QUEUE, and so on. The flag wins.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """One flag a row of the settings table, grouped by section."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP",
        description=DESCRIPTION,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for row in settings_table.rows():
        group = groups.get(row.section) or groups.setdefault(row.section, parser.add_argument_group(row.section))
        text = row.help.replace("%", "%%")
        if row.name == "model":
            group.add_argument("model", nargs="?", metavar="MODEL_DIR", help="The same as --model.")
        if row.kind is bool:
            negative = "--no-" + row.flag.removeprefix("--")
            text += f" (default: on; {negative} turns it off)" if row.default else " (default: off)"
            group.add_argument(row.flag, dest=row.name, action="store_const", const="true", help=text)
            group.add_argument(negative, dest=row.name, action="store_const", const="false", help=argparse.SUPPRESS)
        else:
            # Values stay text: the settings table checks them, and names the flag when one is wrong.
            metavar = row.metavar or ("{" + ",".join(row.choices) + "}" if row.choices else row.kind.__name__.upper())
            if row.many:
                text += " Several: the flag again, or commas."
            elif row.default != "" and not row.is_size:
                text += f" (default: {row.default})"
            group.add_argument(
                row.flag, dest=row.name, action="append" if row.many else "store", metavar=metavar, help=text
            )


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 after a signal, 1 when the server can't run, 2 for settings that can't be used."""
    names = {row.name for row in settings_table.rows()}
    flags = {name: value for name, value in vars(args).items() if name in names}
    try:
        settings = settings_table.load(flags)
        logs.configure(settings)
        for leftover in scratch.sweep():
            log.info("%s is removed: a server that was killed left it behind.", leftover)
        with contextlib.ExitStack() as kept, asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(settings, _checkpoint_folder(settings, kept), kept))
    except SettingsError as error:
        complain(str(error))
        return 2
    except (ServeError, CheckpointError, TokenizerError, ImageError, EngineStartError, ApiError) as error:
        complain(str(error))
        return 1


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _checkpoint_folder(settings: Settings, kept: contextlib.ExitStack) -> Path:
    """The folder to serve; one made for ``--random`` lives as long as ``kept``."""
    if settings.random:
        if settings.random not in PRESETS:
            raise SettingsError(f"--random must be one of {', '.join(PRESETS)}, not {settings.random!r}.")
        folder = kept.enter_context(scratch.ScratchFolder("random"))
        write_preset(settings.random, folder)
        return folder
    if settings.model:
        folder = Path(settings.model).expanduser().absolute()
        if not folder.is_dir():
            raise SettingsError(f"MODEL_DIR {settings.model!r} is no folder. Give the folder that holds config.json.")
        return folder
    return demo_checkpoint()


async def _serve(settings: Settings, folder: Path, kept: contextlib.ExitStack) -> int:
    leave_no_core()
    keyring = Keyring(settings)
    if settings.keys_file:
        # Elsewhere SIGHUP ends the process, as it does without a handler.
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, keyring.reload)
    model = ServedModel.load(folder, settings)
    listener = listen(settings.host, settings.port)
    allow_many_connections()
    progress = LoadingProgress()
    engine = make_engines(folder, settings, on_progress=progress)
    images = DecodePool(
        model.preprocess,
        workers=settings.decode_workers or max(1, len(os.sched_getaffinity(0)) // 2),
        timeout_s=settings.decode_timeout_s,
        memory_mb=settings.decode_memory_mb,
        max_pixels=int(settings.max_image_megapixels * 1e6),
    )
    app = create_app(engine, model, images, settings, keyring)

    async def load() -> None:
        with progress:
            await engine.start()
            await images.start()
            await engine.wait_ready()
        assert engine.info is not None
        # What stands by now stays: the collector need not walk through it again and again between requests.
        gc.collect()
        gc.freeze()
        ready = ReadyServer(
            name=model.names[0],
            architecture=model.config.architecture,
            checkpoint_dtype=model.config.dtype,
            asked_dtype=settings.dtype,
            tokens_per_image=model.config.num_image_tokens,
            info=engine.info,
            host=settings.host,
            port=listener.getsockname()[1],
            needs_key=keyring.needs_key,
        )
        print(ready.block(), flush=True)

    def end_at_once(status: int) -> NoReturn:
        # The engine and the decoders die with this process.
        kept.close()
        os._exit(status)

    server = HttpServer(app, settings)
    stop = StopSignals(end_at_once)
    http = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    loading = asyncio.create_task(load(), name="loading")
    try:
        if await first_of(loading, http, stop.asked) is loading:
            await first_of(http, stop.asked)
        app.state.draining = True
        await server.drained(settings.drain_timeout_s)
    finally:
        loading.cancel()
        # What still runs gets its error now, and uvicorn a moment to send it.
        await engine.close()
        await server.end(http)
        await images.close()
    return 0
