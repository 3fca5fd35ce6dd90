"""One decode process: reads encoded images from standard input, writes prepared pixels to standard output.

Started by ``decode_pool.py`` as ``python -m`` with one JSON argument; knows nothing of requests. It is the place where
hostile files are parsed, so it limits its own memory and time, and ends with its parent.

Wire: a job is ``JOB`` followed by the encoded image. An answer is ``ANSWER`` followed by raw uint8 pixels
[height, width, 3], or, for a refused image, by its code and its sentence in UTF-8 with the lengths in the two size
fields. The first answer, before any job, says that the worker is ready.
"""

import json
import struct
import sys
from typing import BinaryIO

from sightline_models.images import ImageError, PreprocessConfig, decode_image, prepare
from sightline_server.confined.process import JOB, confine, limit_cpu, silence

ANSWER = struct.Struct("<BIIIQ32s")
"""Status, two sizes, tokens, pixels of the original, digest."""
READY, DECODED, REFUSED = range(3)


def main() -> None:
    options = json.loads(sys.argv[1])
    confine(parent=options["parent"], memory_mb=options["memory_mb"])
    config = PreprocessConfig.from_json(options["preprocess"])
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    silence()
    answers.write(ANSWER.pack(READY, 0, 0, 0, 0, b""))
    answers.flush()
    while header := jobs.read(JOB.size):
        limit_cpu(options["timeout_s"])
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


if __name__ == "__main__":
    main()
