"""Entry point: the command group, and the exit code of every outcome.

0: done. 1: the request cannot be met; one line says what happened, then what to do. 2: the command line is wrong.
130: interrupted. 129 and 143: the process received SIGHUP or SIGTERM. 141: what reads standard output went away, as
``head`` does; nothing is said then.
"""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
from importlib import import_module
from typing import NoReturn

import click

from svd_trt.cli.closed_streams import open_streams
from svd_trt.cli.signals import end_by_exceptions, received
from svd_trt.errors import SvdTrtError, is_lack_of_memory
from svd_trt.units import shorten
from svd_trt.version import __version__

__all__ = ["cli", "main"]

_COMMANDS = {
    "build": "svd_trt.cli.build_command",
    "bench": "svd_trt.cli.bench_command",
    "infer": "svd_trt.cli.infer_command",
    "inspect": "svd_trt.cli.inspect_command",
    "random-checkpoint": "svd_trt.cli.random_checkpoint_command",
    "serve": "svd_trt.cli.serve_command",
    "triton": "svd_trt.cli.triton_command",
    "verify": "svd_trt.cli.verify_command",
}
_INTERRUPTED = 130
_NO_READER = 128 + signal.SIGPIPE


class _LazyGroup(click.Group):
    """Imports the module of a command on first use, so that ``infer`` never imports what ``build`` needs."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = import_module(_COMMANDS[cmd_name]).command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="svd-trt")
def cli() -> None:
    """Stable Video Diffusion as TensorRT engines: build a bundle once, then make videos with it.

    \b
        svd-trt build stabilityai/stable-video-diffusion-img2vid-xt -o svd-xt
        svd-trt infer svd-xt picture.png -o video.mp4
    """


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    open_streams()
    end_by_exceptions()
    try:
        code = cli.main(arguments, prog_name="svd-trt", standalone_mode=False)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        click.echo(_readable(shown.getvalue()), nl=False, err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        # click raises Abort for KeyboardInterrupt, which has the notes.
        click.echo(": ".join(["interrupted", *_notes(error.__cause__ or error)]), err=True)
        sys.exit(_INTERRUPTED)
    except SystemExit as error:
        if error.code == 1:  # of click and rich, for a reader that went away; signals have other codes
            _end_without_reader()
        for note in _notes(error):
            click.echo(f"ended by a signal: {note}", err=True)
        raise
    except SvdTrtError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            _end_without_reader()
        _end_if_interrupted()
        click.echo(f"svd-trt: {_readable('; '.join([str(error), *_notes(error)]))}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        _end_without_reader()
    except (OSError, MemoryError, ImportError, RuntimeError) as error:
        _end_if_interrupted()
        click.echo(f"svd-trt: {_explain(error)}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _end_if_interrupted() -> None:
    """Exit as a signal asks if there was one: the failure is only what it led to."""
    number = received()
    if number == signal.SIGINT:
        click.echo("interrupted", err=True)
    if number is not None:
        sys.exit(128 + number)


def _explain(error: Exception) -> str:
    """What happened that is no defect and that no module knows of: the system refused something.

    Raises:
        Exception: ``error`` itself, if it is anything else.
    """
    if is_lack_of_memory(error):
        return "memory ran out; close other programs, or raise the limit (ulimit -v)"
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.EMFILE, errno.ENFILE):
        return "too many open files; close other programs, or raise the limit (ulimit -n)"
    if code in (errno.ENOSPC, errno.EBADF):
        from svd_trt.cli.console import discard_stdout

        discard_stdout()
        return f"cannot write to standard output: {os.strerror(code)}"
    raise error


def _readable(message: object) -> str:
    """``message`` with what the user typed shortened if it is very long, and without control characters."""
    shown = re.sub(r"\S+", lambda word: shorten(word[0]), str(message))
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in shown)


def _notes(error: BaseException) -> list[str]:
    """What was added to ``error`` on its way here."""
    return list(getattr(error, "__notes__", ()))


def _end_without_reader() -> NoReturn:
    """Exit as a program that SIGPIPE ends, without a word: who closed the pipe has read enough."""
    from svd_trt.cli.console import discard_stdout

    discard_stdout()
    sys.exit(_NO_READER)
