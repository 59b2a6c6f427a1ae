"""Code for one GPU in the libraries of a pack: of ONNX Runtime's CUDA provider, two thirds are for others.

The format of ``.nv_fatbin`` is as cuobjdump shows it, and that a library works without the code of other GPUs is from
Zhang and Ali-Eldin 2025, "The Hidden Bloat in Machine Learning Systems" (arXiv:2503.14226).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = ["entries", "keep_gpu"]

_MAGIC = struct.pack("<I", 0xBA55ED50)
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries
_ENTRY = struct.Struct("<HHIQ")  # kind, version, bytes of this header, bytes of the code
_CAPABILITY = 28  # offset in the header of an entry
_MACHINE_CODE = 2


def keep_gpu(library: Path, capability: int) -> int:
    """Overwrite with zeros the machine code that a GPU does not run, which compresses to nothing; returns its bytes.

    Args:
        library: changed in place; a file without code for GPUs stays as it is.
        capability: of the GPU, ten times its number, such as 90. Code of the same major number up to it stays, and so
            does PTX.
    """
    removed = 0
    if library.stat().st_size == 0:  # cannot be mapped
        return removed
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        for kind, made_for, start, stop in list(entries(content)):
            runs = made_for // 10 == capability // 10 and made_for <= capability
            if kind == _MACHINE_CODE and not runs:
                content[start:stop] = bytes(stop - start)
                removed += stop - start
    return removed


def entries(content: mmap.mmap) -> Iterator[tuple[int, int, int, int]]:
    """Kind, compute capability, and first and last byte of all pieces of code in a library."""
    place = content.find(_MAGIC)
    while place >= 0:
        _, version, size, length = _CONTAINER.unpack_from(content, place)
        if (version, size) != (1, _CONTAINER.size) or place + size + length > len(content):
            # These bytes are there by chance, as in code that looks for them.
            place = content.find(_MAGIC, place + len(_MAGIC))
            continue
        entry, end = place + size, place + size + length
        while entry < end:
            kind, _, size, code = _ENTRY.unpack_from(content, entry)
            (capability,) = struct.unpack_from("<I", content, entry + _CAPABILITY)
            yield kind, capability, entry + size, entry + size + code
            entry += size + code
        place = content.find(_MAGIC, end)
