"""Pictures on disk, as a person at a prompt names them, and as a chat message carries them.

Knows paths, quotes and file signatures. Decodes nothing: whether a file is a sound picture is the server's to say.
"""

import base64
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sightline_server.cli.terminal import one_line

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})

MAX_FILE_BYTES = 64 * 2**20
"""Above any server's limit for a request body; keeps a mistyped path from filling the memory."""

_WORD = re.compile(r"""(?<!\S)(?:'(?P<single>[^'\n]+)'|"(?P<double>[^"\n]+)"|(?P<bare>(?:\\.|[^\s\\])+))""")
_AFTER_A_WORD = ".,;:!?)"


class PictureError(ValueError):
    """A file that can't be attached; the sentence names it and says why."""


@dataclass(frozen=True)
class Picture:
    """One picture file's bytes, unchanged."""

    path: Path
    media_type: str
    data: bytes

    @property
    def label(self) -> str:
        size = len(self.data)
        return (
            f"{one_line(self.path.name)} ({size / 2**20:.1f} MB)"
            if size >= 2**20
            else (f"{one_line(self.path.name)} ({max(1, round(size / 1024))} KB)")
        )

    def part(self) -> dict[str, Any]:
        """The picture as a part of a message's content."""
        url = f"data:{self.media_type};base64,{base64.b64encode(self.data).decode('ascii')}"
        return {"type": "image_url", "image_url": {"url": url}}


@dataclass(frozen=True)
class Line:
    """A typed line, taken apart: the question without the paths, and the files that were named in it."""

    question: str
    paths: tuple[Path, ...]
    missing: tuple[str, ...]
    """Words that look like the path of a picture but name no file."""


def read_picture(path: Path) -> Picture:
    """The file at ``path``. Raises PictureError, naming it, when it can't be read or is no picture."""
    shown = one_line(str(path))
    try:
        if path.is_dir():
            raise PictureError(f"{shown} is a folder, not a picture.")
        if not path.is_file():
            raise PictureError(f"There is no file {shown}.")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise PictureError(f"{shown} has {size / 2**20:.0f} MB; a picture may have {MAX_FILE_BYTES >> 20} MB.")
        data = path.read_bytes()
    except OSError as error:
        raise PictureError(f"{shown} can't be read: {error.strerror}.") from None
    if not data:
        raise PictureError(f"{shown} is empty.")
    media_type = _media_type(data)
    if media_type is None:
        raise PictureError(f"{shown} is no PNG, JPEG, WebP, GIF or BMP picture. Convert it to one of these.")
    return Picture(path, media_type, data)


def _media_type(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data.startswith(b"BM"):
        return "image/bmp"
    return None


def as_path(word: str) -> Path:
    """The path that ``word`` means: ``~`` and ``file://`` as terminals and file managers write them."""
    if word.startswith("file://"):
        word = unquote(urlsplit(word).path)
    return Path(os.path.expanduser(word))


def split_paths(text: str) -> list[Path]:
    """All words of ``text`` as paths, quotes and backslashes undone; the whole text when that names a file."""
    if text.strip() and _is_file(as_path(text.strip())):
        return [as_path(text.strip())]
    return [as_path(_unquoted(match)) for match in _WORD.finditer(text)]


def take_apart(text: str) -> Line:
    """Find the pictures named in ``text``.

    Only existing files with a picture's suffix are taken, so that ordinary words stay words. A path before or after
    whole sentences disappears from the question; inside a sentence the file's name stays, so that it still reads.
    """
    if _is_picture_file(as_path(text.strip())):
        return Line("", (as_path(text.strip()),), ())
    paths: list[Path] = []
    missing: list[str] = []
    question = ""
    position = 0
    for match in _WORD.finditer(text):
        word = _unquoted(match)
        path, tail = as_path(word), ""
        if not _is_picture_file(path) and match["bare"]:
            stem = word.rstrip(_AFTER_A_WORD)
            path, tail = as_path(stem), word[len(stem) :]
        if _is_picture_file(path):
            paths.append(path)
            question += text[position : match.start()]
            inside = bool(tail) or (question.strip() != "" and question.strip()[-1] not in ".!?:")
            question += path.name + tail if inside else tail
            position = match.end()
        elif _looks_like_a_picture(word):
            missing.append(word)
    question = (question + text[position:]).strip()
    return Line(question, tuple(paths), tuple(missing))


def _unquoted(match: re.Match[str]) -> str:
    bare = match["bare"]
    if bare is None:
        return match["single"] or match["double"]
    return re.sub(r"\\(.)", r"\1", bare)


def _looks_like_a_picture(word: str) -> bool:
    rooted = word.startswith(("/", "~/", "./", "../", "file://"))
    return rooted and Path(word.rstrip(_AFTER_A_WORD)).suffix.lower() in SUFFIXES


def _is_picture_file(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and _is_file(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
