"""One decode process: reads encoded images from standard input, writes prepared pixels to standard output.

Started by ``decode_pool.py`` as ``python -m`` with one JSON argument; knows nothing of requests. It is the place where
hostile files are parsed, so it limits its own memory and time, and ends with its parent.

Wire: a job is ``JOB`` followed by the encoded image. An answer is ``ANSWER`` followed by raw uint8 pixels
[height, width, 3], or, for a refused image, by its code and its sentence in UTF-8 with the lengths in the two size
fields. The first answer, before any job, says that the worker is ready.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import BinaryIO

from sightline_models.images import ImageError, PreprocessConfig, decode_image, prepare

JOB = struct.Struct("<Q")
"""Length of the encoded image."""
ANSWER = struct.Struct("<BIIIQ32s")
"""Status, two sizes, tokens, pixels of the original, digest."""
READY, DECODED, REFUSED = range(3)

_PR_SET_PDEATHSIG = 1


def main() -> None:
    # uvloop lets a new process inherit the pipes of its siblings, whose end would then go unnoticed.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    options = json.loads(sys.argv[1])
    _end_with_parent(options["parent"])
    limit = options["memory_mb"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    config = PreprocessConfig.from_json(options["preprocess"])
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    # Decoder libraries print their complaints about a file; errors of our own start have been shown by now.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    answers.write(ANSWER.pack(READY, 0, 0, 0, 0, b""))
    answers.flush()
    while header := jobs.read(JOB.size):
        _limit_cpu(options["timeout_s"])
        _answer(jobs.read(JOB.unpack(header)[0]), config, options["max_pixels"], answers)
        answers.flush()


def _answer(data: bytes, config: PreprocessConfig, max_pixels: int, answers: BinaryIO) -> None:
    try:
        image = decode_image(data, max_pixels=max_pixels)
        prepared = prepare(image, config)
    except ImageError as error:
        code, message = error.code.encode(), error.message.encode()
        answers.write(ANSWER.pack(REFUSED, len(code), len(message), 0, 0, b"") + code + message)
        return
    height, width = prepared.pixels.shape[:2]
    pixels_count = image.width * image.height
    answers.write(ANSWER.pack(DECODED, height, width, prepared.num_tokens, pixels_count, prepared.digest))
    answers.write(prepared.pixels.data)


def _limit_cpu(seconds: float) -> None:
    """At most ``seconds`` of processor time from now on; beyond, the kernel ends this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _end_with_parent(parent: int) -> None:
    # Both reach every process of a terminal or a service; the server decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It ended before the line above took effect.
        sys.exit(1)


if __name__ == "__main__":
    main()
