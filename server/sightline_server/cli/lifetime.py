"""How a server listens, notices that it should end, and lets running requests finish first.

Knows sockets, signals and uvicorn. Knows nothing of models, engines or what a request holds.
"""

import asyncio
import contextlib
import errno
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn, cast

import uvicorn

from sightline_server.http.door import Door
from sightline_server.http.limits import limits_of
from sightline_server.http.protocol import HttpProtocol
from sightline_server.settings import Settings

log = logging.getLogger(__name__)

BACKLOG = 2048
OPEN_FILES = 65536
SEND_BUFFER = 2**17
"""Bytes of an answer that the system keeps for a client that reads slowly."""
UNSENT_ANSWERS_S = 5
"""How long clients get to take what is left of their answers once the engine is closed."""


class ServeError(RuntimeError):
    """The server can't run; the sentence says why and is meant for the operator."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ServeError when ``host`` and ``port`` can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise ServeError(f"--host {host!r} is no address of this machine. Try 127.0.0.1 or 0.0.0.0.") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it. The system's own would grow to megabytes before a reader is seen to be slow.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    try:
        listener.bind(address)
        # Now, not when the server is up: of two servers started at once, one must learn here that it came second.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ServeError(_why_not(host, port, error)) from None
    listener.setblocking(False)
    return listener


def _why_not(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"Port {port} on {host} is in use by another program. Stop that one, or give another --port."
        case errno.EACCES:
            return f"Port {port} needs rights that this user lacks. Give a --port above 1023."
        case errno.EADDRNOTAVAIL:
            return f"--host {host!r} is no address of this machine. Try 127.0.0.1 or 0.0.0.0."
    return f"The server can't listen on {host} port {port}: {error.strerror}."


def allow_many_connections() -> None:
    """Raises this process's limit of open files, often 1024, towards what the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def leave_no_core() -> None:
    """Keeps this process, and those it starts, from writing what users sent into a core dump."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


class StopSignals:
    """SIGINT and SIGTERM: the first asks for an orderly end, the second ends the process at once.

    ``end_at_once`` is called with the exit status that shells give for the signal, and does not return.
    """

    def __init__(self, end_at_once: Callable[[int], NoReturn]) -> None:
        self._end_at_once = end_at_once
        loop = asyncio.get_running_loop()
        self.asked = loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._handle, number)

    def _handle(self, number: signal.Signals) -> None:
        if self.asked.done():
            self._end_at_once(128 + number)
        log.info("%s: ending once running requests are done; a second signal ends at once.", number.name)
        self.asked.set_result(number)


async def first_of(*futures: "asyncio.Future[Any]") -> "asyncio.Future[Any]":
    """The first of ``futures`` to be done. Raises what it raised."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    done = next(future for future in futures if future.done())
    done.result()
    return done


class HttpServer(uvicorn.Server):
    """uvicorn, but for signals: it would stop listening at the first one, while running requests still need us."""

    def __init__(self, app: Any, settings: Settings) -> None:
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        limits = limits_of(settings, open_files=OPEN_FILES if open_files == resource.RLIM_INFINITY else open_files)
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(type[asyncio.Protocol], partial(HttpProtocol, limits=limits, door=Door(limits))),
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="on",
                backlog=BACKLOG,
                timeout_keep_alive=settings.keep_alive_s,
                timeout_graceful_shutdown=UNSENT_ANSWERS_S,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def drained(self, timeout_s: float) -> None:
        """Returns when no request is being answered, at the latest after ``timeout_s``; listens meanwhile."""
        running = len(self.server_state.tasks)
        if running:
            log.info("Waiting up to %g s for requests that are running: %d.", timeout_s, running)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.server_state.tasks:  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(0.05)

    async def end(self, serving: "asyncio.Task[None]") -> None:
        """Stops listening and waits until the task of ``serve`` has sent what is left."""
        self.should_exit = True
        await asyncio.wait([serving])
