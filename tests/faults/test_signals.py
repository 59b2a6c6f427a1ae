"""SIGTERM, SIGHUP and Ctrl-C at random moments, once or twice; standard output that is closed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from svd_trt import Bundle
from tests.faults.conftest import Start, assert_cache_whole, copy_links, entries_of
from tests.faults.test_kills import BUILD, INFER, content_of

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("name", ["out.mp4", "out.webp", "out.gif", "out.npy", "out"])
def test_interrupted_videos(
    name: str,
    start: Start,
    small_bundle: Path,
    picture_file: Path,
    tmp_path: Path,
    rng: random.Random,
    record_property: Any,
) -> None:
    """Nothing remains, at once, unlike after kill -9."""
    command = ("infer", small_bundle, picture_file, "-o", tmp_path / name, *INFER)
    started = time.monotonic()
    start(*command).wait().assert_done()
    duration = time.monotonic() - started
    finished = content_of(tmp_path)
    hits = 0
    for number in range(100):
        before = content_of(tmp_path)
        sent, times = list(CODES)[number % 3], 1 + number % 2
        process = start(*command)
        time.sleep(rng.uniform(0.1, 1) * duration)
        for _ in range(times):
            process.send(sent)
        result = process.wait()
        assert "Traceback" not in result.stderr, result.stderr
        assert result.returncode in (0, CODES[sent], -sent), (sent, result)
        assert content_of(tmp_path) in (before, finished)
        if result.returncode != CODES[sent]:  # it was done, and at most Python was ending
            assert content_of(tmp_path) == finished
            continue
        if (hits := hits + 1) == 9:
            break
    record_property("interrupts_of_infer", hits)
    assert hits == 9


def test_interrupted_builds(
    start: Start,
    small_checkpoint: Path,
    warm: Path,
    tmp_path: Path,
    rng: random.Random,
    record_property: Any,
) -> None:
    def build(folder: Path) -> Any:
        return start("build", small_checkpoint, "-o", folder / "bundle", *BUILD, "--cache", folder / "cache")

    copy_links(warm, tmp_path / "whole" / "cache")
    started = time.monotonic()
    build(tmp_path / "whole").wait().assert_done()
    duration = time.monotonic() - started
    hits = 0
    for number in range(100):
        folder = tmp_path / str(number)
        copy_links(warm, folder / "cache")
        sent = list(CODES)[number % 3]
        process = build(folder)
        time.sleep(rng.uniform(0.1, 1) * duration)
        process.send(sent)
        result = process.wait()
        assert "Traceback" not in result.stderr, result.stderr
        # The negative code: the command was done, and Python was ending.
        assert result.returncode in (0, CODES[sent], -sent), (sent, result)
        if result.returncode == CODES[sent]:
            hits += 1
            assert "run the same command to resume" in result.stderr or "denoiser" not in result.stderr
        else:
            Bundle.open(folder / "bundle")
        build(folder).wait().assert_done()
        Bundle.open(folder / "bundle")
        assert entries_of(folder) == {"bundle", ".bundle.lock", "cache"}
        assert_cache_whole(folder / "cache", tidy=True)
        if hits == 12:
            break
    record_property("interrupts_of_build", hits)
    assert hits == 12


@pytest.mark.parametrize("closed", [">&-", ">/dev/full"])
@pytest.mark.parametrize(
    "command",
    ["inspect {bundle}", "inspect {bundle} --json", "inspect {bundle} --kernels denoiser", "--help", "--version"],
)
def test_closed_standard_output(command: str, closed: str, small_bundle: Path, tmp_path: Path) -> None:
    """Nothing could be printed, and one line on standard error says so."""
    result = in_shell(f"{command.format(bundle=small_bundle)} {closed}")
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode == 1, result.stderr
    assert "standard output" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-", ">&- 2>&- <&-"])
def test_videos_without_streams(closed: str, small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    """A service or a cron job may have none of them."""
    result = in_shell(f"infer {small_bundle} {picture_file} -o {tmp_path / 'out.mp4'} {' '.join(INFER)} {closed}")
    assert result.returncode == 0, result.stderr
    assert entries_of(tmp_path) == {"out.mp4"}


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_builds_without_streams(
    closed: str, small_checkpoint: Path, small_bundle: Path, cache: Path, tmp_path: Path
) -> None:
    """Its processes talk through pipes, whose numbers must not be those of streams that are closed."""
    out = tmp_path / "bundle"
    result = in_shell(f"build {small_checkpoint} -o {out} {' '.join(BUILD)} --cache {cache} {closed}")
    assert result.returncode == 0, result.stderr
    Bundle.open(out)


def in_shell(words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"{sys.executable} -m svd_trt.cli {words}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)
