"""Reads a request body as JSON, refusing what parsers disagree about: duplicate keys, NaN, lone surrogates, depth.

Knows JSON and where in it something stands. Knows no field of any request.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

from sightline_server.errors import InvalidRequest

MAX_DEPTH = 64
MAX_ELEMENTS = 200_000
"""Objects, arrays, entries, and commas in texts, in one body. A picture is one long string, so honest bodies stay far
below."""
MAX_DIGITS = 400
"""Of an integer: as many as the largest float has, and some."""
_MAX_NAME = 80


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body`` (UTF-8). Raises InvalidRequest, naming the place where there is one."""
    if not body:
        raise InvalidRequest("The request body is empty: send a JSON object.", code="invalid_json")
    # Counted before parsing, since "[[],[],..." of a permitted size would parse into gigabytes of empty lists.
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_ELEMENTS:
        raise InvalidRequest(f"The request body has more than {MAX_ELEMENTS} JSON elements.", code="invalid_json")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The request body is not valid UTF-8 (at byte {error.start}).", code="invalid_json"
        ) from None
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_float, parse_int=_integer
        )
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The request body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno}).",
            code="invalid_json",
        ) from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_json")
    _check_values(value)
    return value


def render_path(parts: Iterable[str | int]) -> str:
    """``("messages", 0, "content")`` as ``messages[0].content``; long names are cut."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += ("." if path else "") + part[:_MAX_NAME].encode("utf-8", "replace").decode()
    return path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                shown = render_path((name,))
                raise InvalidRequest(f"The key {shown!r} stands twice in one JSON object.", param=shown)
            seen.add(name)
    return made


# What can't be kept as it was written becomes NaN here, where its place isn't known, and is refused where it is.


def _no_number(name: str) -> float:
    return math.nan


def _float(text: str) -> float:
    made = float(text)
    if made == 0 and any("1" <= digit <= "9" for digit in text.lower().partition("e")[0]):
        return math.nan
    return made


def _integer(text: str) -> int | float:
    return int(text) if len(text.lstrip("-")) <= MAX_DIGITS else math.nan


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The request body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")


# A place is a chain of keys, innermost first, so that walking costs one small tuple a container.
_Place = tuple[Any, str | int] | None


def _check_values(root: dict[str, Any]) -> None:
    pending: list[tuple[Any, _Place, int]] = [(root, None, 1)]
    while pending:
        container, place, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise _too_deep()
        entries: Iterable[tuple[str | int, Any]]
        if isinstance(container, dict):
            for name in container:
                if not _is_text(name):
                    raise _bad_text((place, name))
            entries = container.items()
        else:
            entries = enumerate(container)
        for key, value in entries:
            if isinstance(value, str):
                if not _is_text(value):
                    raise _bad_text((place, key))
            elif isinstance(value, float):
                if not math.isfinite(value):
                    param = _render_place((place, key))
                    raise InvalidRequest(
                        f"{param!r} is no number that can be kept: send a finite one of at most {MAX_DIGITS} digits.",
                        param=param,
                    )
            elif isinstance(value, dict | list):
                pending.append((value, (place, key), depth + 1))


def _is_text(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bad_text(place: _Place) -> InvalidRequest:
    param = _render_place(place)
    return InvalidRequest(f"{param!r} holds half of a surrogate pair, which is not text.", param=param)


def _render_place(place: _Place) -> str:
    parts: list[str | int] = []
    while place is not None:
        place, key = place
        parts.append(key)
    return render_path(reversed(parts))
