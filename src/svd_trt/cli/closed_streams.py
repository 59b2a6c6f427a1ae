"""Standard streams that the parent process closed, as services and ``>&-`` do."""

from __future__ import annotations

import os
import sys

__all__ = ["open_streams"]

_READ, _WRITTEN, _SHOWN = 0, 1, 2


def open_streams() -> None:
    """Give closed standard streams a place.

    Otherwise the next file that is opened gets the stream's number, and what a library prints goes into that file.
    Messages go nowhere, as asked. A result that cannot be printed must be noticed, so a closed standard output takes
    nothing: writing to it raises OSError (EBADF), as it does in any program.
    """
    # In the order of their numbers, because the lowest free number is taken.
    for number, mode in ((_READ, os.O_RDONLY), (_WRITTEN, os.O_RDONLY), (_SHOWN, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)
            assert opened == number
            os.set_inheritable(opened, True)
    if sys.stdout is None:
        sys.stdout = open(_WRITTEN, "w", closefd=False)  # noqa: SIM115  (a descriptor, for the whole process)
    if sys.stderr is None:
        sys.stderr = open(_SHOWN, "w", closefd=False)  # noqa: SIM115
