"""Command lines of all commands, run in this process until the work would start."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import click
import PIL.Image
from click.testing import CliRunner
from hypothesis import strategies as st

from svd_trt.cli.main import cli, main
from tests.fuzz.kinds import _start_work
from tests.fuzz.mutations import TEXT

# Where the work of each command begins; everything before it is real.
_WORK = (
    "svd_trt.runtime.pipeline.generate",
    "svd_trt.export.build._build",
    "svd_trt.export.random_checkpoint.random_pipeline",
    "svd_trt.benchmarks.workload.count_flops",
    "svd_trt.export.verify.verify_networks",
    "svd_trt.export.verify.verify_videos",
    "huggingface_hub.snapshot_download",
)

_VALUES = st.sampled_from(
    ("0", "1", "2", "3", "7", "8", "32", "64", "-1", "1e9", "nan", "inf", "-inf", "2:3:6", "1:1:1", "3:2:1", "::",
     "1:2", "9" * 30, "8GB", "1TB", "0GB", "-8GB", "GB", "cpu", "cuda", "cuda:1", "cuda:99", "cuda:x", "gpu", "auto",
     "onnxruntime", "tensorrt", "tensorrt-rtx", "denoiser", "fp16", "sm89", "sm89,sm120", "smx", "700,100,0", "1,2,3",
     ",", "576x1024", "32x32", "x", "out.mp4", "out.gif", "out", "out/", "missing/out.mp4", "out.avi", "layers.json",
     "http://a/b.png", "random:tiny", "random:none", "random:tiny@1", "random:tiny@x", "owner/name", "a.safetensors",
     "\udcff.png")  # a name that is not UTF-8
)  # fmt: skip


def _safe(text: str) -> bool:
    """Whether a text can be an argument, and as a path stays in the current folder."""
    return not text.startswith(("/", "~", "@")) and ".." not in text and "\0" not in text


def command_line_strategy(bundle: Path, checkpoint: Path) -> st.SearchStrategy[list[str]]:
    """Words: a command, its arguments and some of its options, in any order."""
    shutil.copytree(bundle, "bundle")
    shutil.copytree(checkpoint, "checkpoint")
    PIL.Image.new("RGB", (40, 24)).save("picture.png")
    Path("text").write_text("text")
    places = st.sampled_from(("bundle", "checkpoint", "picture.png", "text", "missing", ".", "bundle/onnx"))
    values = places | _VALUES | TEXT.filter(_safe)
    context = click.Context(cli)
    options: dict[str, list[tuple[str, int]]] = {}
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        found = [p for p in command.params if isinstance(p, click.Option)]
        options[name] = [(flag, 0 if p.is_flag else p.nargs) for p in found for flag in (*p.opts, *p.secondary_opts)]

    @st.composite
    def words(draw: st.DrawFn) -> list[str]:
        name = draw(st.sampled_from(sorted(options)))
        made: list[str] = []
        for _ in range(draw(st.integers(0, 4))):
            flag, count = draw(st.sampled_from(options[name]))
            made += [flag, *(draw(values) for _ in range(count))]
        made[:0] = draw(st.lists(values, max_size=3) | st.just(["bundle", "picture.png", "-o", "out.gif"]))
        if draw(st.integers(0, 9)) == 0:
            made.insert(0, draw(values))
        return [name, *made]

    for first in (["verify", "bundle", "--model", "checkpoint"], ["build", "checkpoint", "-o", "new"], ["bench"]):
        attempt_command(first)  # imports torch and diffusers, which takes a while on a busy machine
    return words()


class _Main(click.Command):
    """The entry point with its exit codes."""

    def main(self, args: Any = None, **_: Any) -> Any:
        main(args)


def attempt_command(words: list[str]) -> None:
    """Run the command; its exit code is one of the documented, and an error is one line or click's own."""
    with contextlib.ExitStack() as patched:
        for place in _WORK:
            patched.enter_context(mock.patch(place, _start_work))
        result = CliRunner(env={"HF_HUB_OFFLINE": "1"}).invoke(_Main("svd-trt"), words, catch_exceptions=False)
    assert result.exit_code in (0, 1, 2), (result.exit_code, result.stderr)
    assert "Traceback" not in result.stderr
    assert result.exit_code == 0 or result.stderr.strip(), "a refusal without a word"
    if result.exit_code == 1:
        assert len(result.stderr.strip().splitlines()) <= 3, result.stderr
