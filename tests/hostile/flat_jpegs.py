"""JPEG files written bit by bit: every block is flat, so what a right decoder shows is known without one.

Knows the format. Knows neither Pillow nor the code under test.
"""

import struct
from collections.abc import Sequence

Sample = tuple[int, ...]

# Twelve lengths of a difference, each with a code of four bits; and the end of a block, with a code of one.
_DC_TABLE = bytes([0x00, 0, 0, 0, 12, *[0] * 12, *range(12)])
_AC_TABLE = bytes([0x10, 1, *[0] * 15, 0x00])


def flat_jpeg(
    blocks: Sequence[Sequence[Sample]], *, adobe: int | None = None, later_scans: int = 0, progressive: bool = False
) -> bytes:
    """A JPEG of ``blocks``, rows of 8 x 8 pixels of one stored sample each (one, three or four components).

    ``adobe`` is the colour transform of an Adobe segment. ``later_scans`` says nothing new so often.
    """
    count = len(blocks[0][0])
    height, width = 8 * len(blocks), 8 * len(blocks[0])
    components = b"".join(bytes([index + 1, 0x11, 0]) for index in range(count))
    parts = [b"\xff\xd8"]
    if adobe is not None:
        parts.append(segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([adobe])))
    parts += [
        segment(0xDB, b"\0" + b"\1" * 64),
        segment(0xC2 if progressive else 0xC0, struct.pack(">BHHB", 8, height, width, count) + components),
        segment(0xC4, _DC_TABLE + _AC_TABLE),
        _scan_header(range(1, count + 1), 0, 0 if progressive else 63),
        _dc_bits([sample for row in blocks for sample in row], ends=not progressive),
    ]
    for _ in range(later_scans):
        # One end-of-block for each block.
        parts += [_scan_header([1], 1, 63), _stuffed("0" * (width * height // 64))]
    return b"".join([*parts, b"\xff\xd9"])


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def _scan_header(components: Sequence[int], first: int, last: int) -> bytes:
    tables = b"".join(bytes([component, 0x00]) for component in components)
    return segment(0xDA, bytes([len(components)]) + tables + bytes([first, last, 0]))


def _dc_bits(samples: Sequence[Sample], *, ends: bool) -> bytes:
    bits, before = [], [0] * len(samples[0])
    for sample in samples:
        for index, value in enumerate(sample):
            # The mean of a block of 64, times eight, as the transform scales it.
            mean = 8 * (value - 128)
            difference, before[index] = mean - before[index], mean
            length = abs(difference).bit_length()
            coded = difference if difference > 0 else difference + (1 << length) - 1
            bits.append(f"{length:04b}" + (f"{coded:0{length}b}" if length else "") + ("0" if ends else ""))
    return _stuffed("".join(bits))


def _stuffed(bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
