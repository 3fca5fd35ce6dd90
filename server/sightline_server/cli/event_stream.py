"""Reads server-sent events out of a response's bytes. Knows nothing of what the events say."""

from collections.abc import Iterable, Iterator


def read_events(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of each event, in order; comments and other fields are passed over.

    Lines are split by hand: ``httpx``'s ``iter_lines`` also splits at U+2028 and its like, which are ordinary
    characters inside JSON. An event that ends with the stream, without its blank line, still counts.
    """
    data: list[str] = []
    for line in _lines(chunks):
        if not line:
            if data:
                yield "\n".join(data)
            data = []
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" ").decode("utf-8", errors="replace"))
    if data:
        yield "\n".join(data)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in lines)
    if rest:
        yield rest.removesuffix(b"\r")
