"""A process that has imported the command line and forks for each command: a kill hits the work and not the imports.

Requests and answers are lines of JSON. The forked process runs the real entry point and ends as any Python process.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from svd_trt.cli.main import main

_MODULES = (
    "svd_trt.cli.build_command",
    "svd_trt.cli.infer_command",
    "svd_trt.cli.inspect_command",
    "svd_trt.engine.staging",
    "svd_trt.export.flops",
    "PIL.PngImagePlugin",
    "PIL.WebPImagePlugin",
    "safetensors",
)


def serve() -> dict[str, Any]:
    """Answer requests; in a forked process, return what it has to run."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        say(answer)
    sys.exit()


def say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def become(request: dict[str, Any]) -> None:
    """Take the place of a command that was started from a shell, with its own streams, folder and limits."""
    os.setsid()
    for stream, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
        opened = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        os.dup2(opened, stream)
        os.close(opened)
    os.environ |= request["variables"]
    for name, value in request["limits"].items():
        kind = getattr(resource, name)
        if name == "RLIMIT_AS":  # counted from here, because the imports take gigabytes of address space
            value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    for name in _MODULES:
        importlib.import_module(name)
    say("ready")
    found = serve()
    become(found)
    main(found["arguments"])
