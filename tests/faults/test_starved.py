"""Too little memory, too few files, and a clock that jumps."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from svd_trt import Bundle
from tests.cli.conftest import start as start_process
from tests.faults.conftest import Start, assert_cache_whole, copy_links, entries_of, keys_of
from tests.faults.test_kills import BUILD, INFER, content_of

MEGABYTE = 1 << 20
NO_MEMORY = ("memory", "failed to map segment", "does not load")
FEW_FILES = ("Too many open files", "too many open files")


def assert_done_or_refused(result: Any, *words: str) -> bool:
    """Whether the command was done; otherwise its last line said why, after what libraries print themselves.

    A library may also end the process at once, in a thread of its own or in code that cannot report an error.
    """
    if result.returncode == 0:
        return True
    assert "Traceback" not in result.stderr, result.stderr
    if result.returncode == -signal.SIGABRT:
        assert "bad_alloc" in result.stderr, result.stderr
        return False
    assert result.returncode == 1, (result.returncode, result.stderr)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("svd-trt: "), result.stderr
    assert any(word in last for word in words), result.stderr
    return False


@pytest.mark.parametrize("name", ["out.mp4", "out.webp", "out"])
def test_videos_with_little_memory(
    name: str, start: Start, small_bundle: Path, picture_file: Path, tmp_path: Path, record_property: Any
) -> None:
    """The address space that is left after the imports grows until a video fits."""
    refused = 0
    for megabytes in (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 192, 256, 384, 512, 768, 1024, 2048):
        limits = {"RLIMIT_AS": megabytes * MEGABYTE}
        result = start("infer", small_bundle, picture_file, "-o", tmp_path / name, *INFER, limits=limits).wait()
        if assert_done_or_refused(result, *NO_MEMORY):
            break
        assert content_of(tmp_path) == {}
        refused += 1
    record_property("too_little_memory", refused)
    assert 0 < refused < 22


def test_videos_with_few_files(
    start: Start, small_bundle: Path, picture_file: Path, tmp_path: Path, record_property: Any
) -> None:
    refused = 0
    for files in range(3, 64):
        limits = {"RLIMIT_NOFILE": files}
        result = start("infer", small_bundle, picture_file, "-o", tmp_path / "out.mp4", *INFER, limits=limits).wait()
        if assert_done_or_refused(result, *FEW_FILES):
            break
        assert content_of(tmp_path) == {}
        refused += 1
    record_property("too_few_files", refused)
    assert 0 < refused < 61


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_NOFILE"])
def test_builds_with_too_little(
    kind: str,
    start: Start,
    small_checkpoint: Path,
    small_bundle: Path,
    warm: Path,
    tmp_path: Path,
    record_property: Any,
) -> None:
    values = range(3, 64) if kind == "RLIMIT_NOFILE" else [n * MEGABYTE for n in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)]
    cache = copy_links(warm, tmp_path / "cache")
    command = ("build", small_checkpoint, "-o", tmp_path / "bundle", *BUILD, "--cache", cache, "-q")
    refused = 0
    for value in values:
        if assert_done_or_refused(start(*command, limits={kind: value}).wait(), *NO_MEMORY, *FEW_FILES):
            break
        assert not (tmp_path / "bundle").exists()
        assert_cache_whole(cache, tidy=False)
        refused += 1
    record_property(f"builds_with_too_little_{kind}", refused)
    assert refused > 0
    start(*command).wait().assert_done()
    Bundle.open(tmp_path / "bundle")
    assert entries_of(tmp_path) == {"bundle", ".bundle.lock", "cache"}
    assert_cache_whole(cache, tidy=True)


@pytest.mark.parametrize("megabytes", [300, 600, 1000, 1500, 2500])
def test_processes_with_little_memory(megabytes: int, small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    """As a user sets it, before the command starts: even its imports may fail."""
    words = f"ulimit -v {megabytes * 1024}; exec {sys.executable} -m svd_trt.cli infer"
    command = ["bash", "-c", f'{words} "$@"', "infer", small_bundle, picture_file, "-o", tmp_path / "out.mp4", *INFER]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert result.returncode in (0, 1, -signal.SIGABRT), result.stderr
    assert "Traceback" not in result.stderr
    if result.returncode:
        assert "memory" in result.stderr.lower() or "bad_alloc" in result.stderr
        left = content_of(tmp_path)
        if not result.stderr.strip().splitlines()[-1].startswith("svd-trt: "):
            # A library, such as OpenBLAS, ended the process, as a kill does: the next run removes what is hidden.
            left = {name: content for name, content in left.items() if not name.startswith(".svd-trt-")}
        assert left == {}


@pytest.fixture(scope="module")
def jumping_clock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variable that gives a command a clock that jumps between years."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    library = tmp_path_factory.mktemp("clock") / "jumping_clock.so"
    source = Path(__file__).with_name("jumping_clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def test_the_clock_really_jumps(jumping_clock: dict[str, str]) -> None:
    code = "import datetime; print(len({datetime.datetime.now().year for _ in range(300)}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | jumping_clock, capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 4


def test_videos_do_not_depend_on_the_clock(
    jumping_clock: dict[str, str], small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    contents = []
    for name, variables in (("steady", {}), ("jumping", jumping_clock)):
        folder = tmp_path / name
        folder.mkdir()
        for output in ("out.mp4", "out.webp", "out"):
            process = start_process("infer", small_bundle, picture_file, "-o", folder / output, *INFER, env=variables)
            _, error = process.communicate(timeout=240)
            assert (process.returncode, error) == (0, "")
        contents.append(content_of(folder))
    assert contents[0] == contents[1]


def test_builds_do_not_depend_on_the_clock(
    jumping_clock: dict[str, str], small_checkpoint: Path, small_bundle: Path, warm: Path, tmp_path: Path
) -> None:
    """Files are from the past and from the future, and the clock jumps while networks are made and reused."""
    cache = copy_links(warm, tmp_path / "cache")
    shutil.copytree(small_bundle, tmp_path / ".bundle.building")
    for key, form in keys_of(small_bundle).items():
        if form == "image_encoder onnx":
            shutil.rmtree(cache / key)
            for file in (tmp_path / ".bundle.building" / "onnx").glob("image_encoder*"):
                file.unlink()
    for number, path in enumerate(sorted((tmp_path / ".bundle.building").rglob("*"))):
        stamp = (0, 4_000_000_000)[number % 2]
        os.utime(path, (stamp, stamp))
    command = ("build", small_checkpoint, "-o", tmp_path / "bundle", *BUILD, "--cache", cache, "-q")
    process = start_process(*command, env=jumping_clock)
    _, error = process.communicate(timeout=240)
    assert (process.returncode, error) == (0, "")
    Bundle.open(tmp_path / "bundle")
    assert entries_of(tmp_path) == {"bundle", ".bundle.lock", "cache"}
    assert_cache_whole(cache, tidy=True)
