"""Small files that claim, or would unpack to, far more pixels than any model sees."""

import io
import struct
import zlib

from PIL import Image


def png(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A true PNG of one colour, made without ever holding its pixels."""
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    line = bytes(1 + (width * samples * depth + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _png_claiming(width: int, height: int) -> bytes:
    true = png(1, 1)
    return true[:16] + struct.pack(">II", width, height) + true[24:]


def _webp_claiming(width: int, height: int) -> bytes:
    bits = (width - 1) | (height - 1) << 14
    body = b"\x2f" + bits.to_bytes(4, "little") + bytes(11)
    return b"RIFF" + struct.pack("<I", 4 + 8 + len(body)) + b"WEBPVP8L" + struct.pack("<I", len(body)) + body


def _jpeg_claiming(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def bombs() -> dict[str, bytes]:
    """Each kind by a short name. Making them takes a second or two."""
    return {
        "PNG of 1 bit, 81 MP": png(9000, 9000, depth=1, colour=0),
        "PNG of RGB, 177 MP": png(13300, 13300),
        "PNG claiming 2^31-1 a side": _png_claiming(2**31 - 1, 2**31 - 1),
        "WebP claiming 268 MP": _webp_claiming(16384, 16384),
        "JPEG claiming 4,295 MP": _jpeg_claiming(65535, 65535),
    }
