"""ICC profiles (ICC.1:2001-04) of known colours, written field by field, because none come with any package here."""

from __future__ import annotations

import struct

# Columns of red, green and blue in XYZ, adapted to D50, and the gamma.
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*values)


def curve(values: list[int]) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(f">I{len(values)}H", len(values), *values)


def srgb_curve() -> bytes:
    def linear(value: float) -> float:
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    return curve([round(65535 * linear(index / 1023)) for index in range(1024)])


def profile(space: bytes, kind: bytes, pcs: bytes, name: str, tags: dict[bytes, bytes]) -> bytes:
    text = name.encode() + b"\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz((0.9642, 1.0, 0.82491)), **tags}
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, body in tags.items():
        body += bytes(-len(body) % 4)
        table += struct.pack(">4sII", tag, start + len(data), len(body))
        data += body
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), bytes(4), 0x02400000, kind, space, pcs)
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(24) + struct.pack(">I", 1)
    return (head + fixed(0.9642, 1.0, 0.82491)).ljust(128, b"\0") + body


def rgb_profile(name: str, columns: tuple[tuple[float, ...], ...], transfer: bytes | None = None) -> bytes:
    """A matrix profile; ``transfer`` is the curve of all channels, and None is that of sRGB."""
    transfer = transfer or srgb_curve()
    tags = {b"rXYZ": xyz(columns[0]), b"gXYZ": xyz(columns[1]), b"bXYZ": xyz(columns[2])}
    return profile(b"RGB ", b"mntr", b"XYZ ", name, tags | {b"rTRC": transfer, b"gTRC": transfer, b"bTRC": transfer})


def grey_profile(name: str, transfer: bytes) -> bytes:
    return profile(b"GRAY", b"mntr", b"XYZ ", name, {b"kTRC": transfer})


def cmyk_profile(name: str) -> bytes:
    """Inks whose mixtures have the lightness of the brightest ink that is missing, without any hue: all is grey."""
    ramp = bytes(range(256))
    corners = b""
    for index in range(16):
        inks = sum(index >> bit & 1 for bit in range(4))
        corners += bytes((round(255 * (1 - inks / 4)), 128, 128))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * ramp + corners + 3 * ramp
    return profile(b"CMYK", b"prtr", b"Lab ", name, {b"A2B0": lut, b"A2B1": lut, b"A2B2": lut})
