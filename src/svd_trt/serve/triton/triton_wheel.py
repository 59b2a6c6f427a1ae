"""Run Triton from the wheel ``nvidia-pytriton``.

The wheel has the server and, for each version of Python, the program that runs a model. This puts the program of this
interpreter into its place, tells the loader of libraries where the interpreter's own library is, and becomes the
server. Everything on the command line is the server's. The wheel needs numpy older than 2.
"""

from __future__ import annotations

import filecmp
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from svd_trt.errors import SvdTrtError

__all__ = ["run_server"]

_STUB = "triton_python_backend_stub"


def run_server(arguments: list[str]) -> NoReturn:
    """Become the server, with ``arguments``.

    Raises:
        SvdTrtError: nvidia-pytriton is not installed, or numpy is too new for it.
    """
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        raise SvdTrtError("nvidia-pytriton is not installed: pip install 'nvidia-pytriton==0.7.0' 'numpy<2'")
    import numpy as np

    if int(np.__version__.partition(".")[0]) > 1:
        raise SvdTrtError(
            f"nvidia-pytriton needs numpy older than 2, and this is {np.__version__}: pip install 'numpy<2'"
        )
    triton = Path(found.origin).parent / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    backends = triton / "backends"
    program, place = triton / "python_backend_stubs" / version / _STUB, backends / "python" / _STUB
    if not place.exists() or not filecmp.cmp(program, place, shallow=False):  # it may be running
        shutil.copy(program, place)
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    libraries = [sysconfig.get_config_var("LIBDIR") or "", environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    server = triton / "bin" / "tritonserver"
    os.execve(server, [str(server), f"--backend-directory={backends}", *arguments], environment)  # noqa: S606


if __name__ == "__main__":
    try:
        run_server(sys.argv[1:])
    except SvdTrtError as error:
        sys.exit(f"svd-trt: {error}")
