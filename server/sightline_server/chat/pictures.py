"""A request's pictures read together, within its limits. Knows limits and where each picture stands; no formats."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from sightline_models.images import ImageError, Pixels
from sightline_server.chat.decode_pool import DecodePool, ImageHandle
from sightline_server.chat.fetch import read_image_url
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
    decoded: Callable[[int], None] = lambda pixels: None,
) -> RequestPictures:
    """Read all of them at once; ``decoded`` hears the pixels of each.

    Raises InvalidRequest naming the picture that is wrong, and how.
    """
    if len(places) > settings.max_images:
        raise InvalidRequest(
            f"This request holds {len(places)} images; at most {settings.max_images} are allowed.",
            code="too_many_images",
            param="messages",
        )
    budget = _PixelBudget(settings.max_request_megapixels)

    async def read(place: ImagePlace) -> ImageHandle:
        try:
            # Off the event loop: undoing the base64 of a large picture takes tens of milliseconds.
            source = await asyncio.to_thread(read_image_url, place.url, max_bytes=int(settings.max_image_mb * MIB))
            handle = await pool.read(source.data, salt=salt)
        except ImageError as error:
            raise InvalidRequest(error.message, code=error.code, param=place.param) from None
        decoded(handle.pixels_count)
        budget.take(handle.pixels_count, place.param)
        return handle

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read(place)) for place in places]
    except BaseExceptionGroup as failures:
        # Several may have failed before the others were called off: the one that stands first is told.
        errors = [task.exception() for task in tasks if not task.cancelled()]
        raise next((error for error in errors if error is not None), failures) from None
    return RequestPictures([task.result() for task in tasks], pool)


class _PixelBudget:
    def __init__(self, megapixels: float) -> None:
        self._megapixels = megapixels
        self._taken = 0

    def take(self, pixels: int, param: str) -> None:
        self._taken += pixels
        if self._taken > self._megapixels * MEGA:
            raise InvalidRequest(
                f"The images of this request have {self._taken / MEGA:.1f} megapixels together; "
                f"at most {self._megapixels:g} are allowed. Scale them down.",
                code="image_too_large",
                param=param,
            )
