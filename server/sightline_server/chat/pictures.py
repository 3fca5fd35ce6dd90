"""A request's pictures read together, within its limits. Knows limits and where each picture stands; no
formats and no pixels."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from sightline_models.image_header import ImageError, check_size, read_header
from sightline_models.images import Pixels
from sightline_server.chat.decode_pool import DecodePool, ImageHandle
from sightline_server.chat.fetch import ImageSource, read_image_url
from sightline_server.chat.prompt import ImagePlace
from sightline_server.errors import InvalidRequest
from sightline_server.settings import Settings

MIB = 2**20
MEGA = 1_000_000


class RequestPictures:
    """The pictures of one request, in the order of its text, and the way back from a digest to pixels."""

    def __init__(self, handles: Sequence[ImageHandle], pool: DecodePool) -> None:
        self.handles = tuple(handles)
        self._by_digest = {handle.digest: handle for handle in handles}
        self._pool = pool

    def pixels(self, digest: bytes) -> Awaitable[Pixels]:
        return self._pool.pixels(self._by_digest[digest])


async def read_pictures(
    places: Sequence[ImagePlace],
    pool: DecodePool,
    settings: Settings,
    *,
    salt: bytes,
    charge: Callable[[int], None] = lambda pixels: None,
) -> RequestPictures:
    """Check all of them by their headers, tell ``charge`` their pixels together, then decode all at once.

    Raises InvalidRequest naming the picture that is wrong, and how; nothing is decoded when a header is.
    """
    if len(places) > settings.max_images:
        raise InvalidRequest(
            f"This request holds {len(places)} images; at most {settings.max_images} are allowed.",
            code="too_many_images",
            param="messages",
        )
    # In a thread: undoing the base64 of a large picture takes tens of milliseconds.
    sources, pixels = await asyncio.to_thread(_open_all, places, settings)
    charge(pixels)

    async def read(place: ImagePlace, source: ImageSource) -> ImageHandle:
        try:
            return await pool.read(source.data, salt=salt)
        except ImageError as error:
            raise _refusal(error, place) from None

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read(*pair)) for pair in zip(places, sources, strict=True)]
    except BaseExceptionGroup as failures:
        # Several may have failed before the others were called off: the one that stands first is told.
        errors = [task.exception() for task in tasks if not task.cancelled()]
        raise next((error for error in errors if error is not None), failures) from None
    return RequestPictures([task.result() for task in tasks], pool)


def _open_all(places: Sequence[ImagePlace], settings: Settings) -> tuple[list[ImageSource], int]:
    """The files and their pixels, which their headers promise to be within the limits, each and all together.

    A decoder finds the size that the header told, or refuses the file. Raises InvalidRequest.
    """
    sources, taken = [], 0
    for place in places:
        try:
            source = read_image_url(place.url, max_bytes=int(settings.max_image_mb * MIB))
            header = read_header(source.data)
            check_size(header, int(settings.max_image_megapixels * MEGA))
        except ImageError as error:
            raise _refusal(error, place) from None
        taken += header.pixels
        if taken > settings.max_request_megapixels * MEGA:
            raise InvalidRequest(
                f"The images of this request have at least {taken / MEGA:.1f} megapixels together; "
                f"at most {settings.max_request_megapixels:g} are allowed. Scale them down.",
                code="image_too_large",
                param=place.param,
            )
        sources.append(source)
    return sources, taken


def _refusal(error: ImageError, place: ImagePlace) -> InvalidRequest:
    return InvalidRequest(error.message, code=error.code, param=place.param)
