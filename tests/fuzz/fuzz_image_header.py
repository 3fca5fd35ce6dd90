"""A coverage-guided search for bytes that the picture headers' reader doesn't take in its stride.

A program, not a test: README.md beside it says how to run it. Its first argument is a folder that keeps what reached
new code and begins with the base pictures of `tests/hostile/pictures.py`. What is found stops it, and belongs into
`tests/models/test_image_header.py`.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sightline_models"]):
    from sightline_models import image_header
    from sightline_models.image_files import _orientation, _what_makes_pixels

from hostile.pictures import base_pictures


def try_one(data: bytes) -> None:
    """Raises for anything but a header that keeps its word, or an ImageError."""
    try:
        header = image_header.read_header(data)
    except image_header.ImageError:
        return
    assert header.width > 0, header
    assert header.height > 0, header
    assert 0 < header.frames <= image_header.MAX_FRAMES, header
    assert 0 < header.parts <= image_header.MAX_PARTS, header
    assert 0 < header.scans <= image_header.MAX_SCANS, header
    assert len(header.exif) <= image_header.MAX_EXIF_BYTES, header
    if header.box is not None:
        left, top, right, bottom = header.box
        assert 0 <= left < right <= header.width, header
        assert 0 <= top < bottom <= header.height, header
    assert 1 <= _orientation(header.exif) <= 8
    kept = _what_makes_pixels(data, header.format)
    assert len(kept) <= len(data)
    again = image_header.read_header(kept)
    assert (again.format, again.width, again.height) == (header.format, header.width, header.height)


def main() -> None:
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        corpus = Path(sys.argv[1])
        corpus.mkdir(parents=True, exist_ok=True)
        for name, data in base_pictures():
            (corpus / name).write_bytes(data)
    atheris.Setup(sys.argv, try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
