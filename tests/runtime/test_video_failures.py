"""After any failure no incomplete video remains, and an earlier video at the path is unchanged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from svd_trt.errors import ArgumentError, OutputError
from svd_trt.runtime.video import VideoWriter, open_writer

NAMES = ["out.mp4", "out.gif", "out.webp", "out.npy", "out"]
HEIGHT, WIDTH = 24, 40


def noise(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)


def writer_of(path: Path | str) -> VideoWriter:
    return open_writer(path, height=HEIGHT, width=WIDTH, fps=7, metadata={"seed": 1})


def save(path: Path, frames: NDArray[np.uint8] | None = None, then: Callable[[], object] = lambda: None) -> None:
    """Write ``frames`` one by one, then do ``then`` while the video is still being written."""
    with writer_of(path) as writer:
        for frame in noise(2) if frames is None else frames:
            writer.write(frame[None])
        assert any(entry.name.startswith(".svd-trt-") for entry in path.parent.iterdir())
        then()


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(params=[False, True], ids=["fresh", "existing"])
def before(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> dict[str, bytes]:
    """The content of the folder at the start: nothing, or an earlier video under the same name."""
    if request.param:
        save(tmp_path / name, noise(3, seed=9))
    return tree(tmp_path)


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """No file may grow past ``limit`` bytes: the kernel refuses writes as it does on a full disk."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))  # Python ignores SIGXFSZ, so this is an OSError
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failing_inside_the_block(
    tmp_path: Path, name: str, before: dict[str, bytes], failure: type[BaseException]
) -> None:
    def fail() -> None:
        raise failure

    with pytest.raises(failure):
        save(tmp_path / name, then=fail)
    assert tree(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == min(len(before), 1)


@pytest.mark.parametrize("name", NAMES)
def test_abandoned_generator(tmp_path: Path, name: str, before: dict[str, bytes]) -> None:
    def stream() -> Generator[None, None, None]:
        with writer_of(tmp_path / name) as writer:
            while True:
                writer.write(noise(1))
                yield

    frames = stream()
    next(frames)
    frames.close()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_no_frames(tmp_path: Path, name: str, before: dict[str, bytes]) -> None:
    with pytest.raises(OutputError, match="no frames"), writer_of(tmp_path / name) as writer:
        writer.write(noise(0))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.97])
def test_disk_full(tmp_path: Path, name: str, before: dict[str, bytes], part: float) -> None:
    frames = noise(12)
    whole = tmp_path.parent / f"{tmp_path.name}-whole"
    whole.mkdir()
    save(whole / name, frames)
    # In the middle, and shortly before the end, when the index of an .mp4 moves to the front. Not one byte before
    # the end: on a busy machine, x264's threads make files whose sizes differ by some bytes.
    limit = int(part * max(map(len, tree(whole).values())))
    with pytest.raises(OutputError, match=rf"cannot write .*{name}.*; free some space"), largest_file(limit):
        save(tmp_path / name, frames)
    assert tree(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == min(len(before), 1)


@pytest.mark.parametrize("name", NAMES)
def test_swallowed_failure_still_counts(tmp_path: Path, name: str) -> None:
    def swallow() -> None:
        with writer_of(tmp_path / name) as writer:
            with pytest.raises(OutputError, match="free some space"), largest_file(10):
                writer.write(noise(1600))
            with pytest.raises(ArgumentError, match="failed"):
                writer.write(noise(1))

    with pytest.raises(OutputError, match="an earlier write"):
        swallow()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_folder_removed_meanwhile(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        save(folder / name, then=lambda: folder.rename(tmp_path / "elsewhere"))
    assert not folder.exists()


@pytest.mark.parametrize("name", NAMES[:-1])
def test_folder_took_the_name_meanwhile(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        save(tmp_path / name, then=(tmp_path / name).mkdir)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_files_put_into_the_png_folder_meanwhile(tmp_path: Path) -> None:
    def interfere() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_bytes(b"mine")

    with pytest.raises(OutputError, match=r"holds notes\.txt"):
        save(tmp_path / "out", then=interfere)
    assert tree(tmp_path) == {"out/notes.txt": b"mine"}


@pytest.mark.parametrize(
    "frames",
    [
        noise(2)[:, :-8],
        noise(2)[0],
        noise(2)[..., :1],
        noise(2).astype(np.float32),
        noise(2).tolist(),
        None,
    ],
    ids=["height", "one frame", "channels", "dtype", "list", "none"],
)
def test_wrong_frames_are_refused_and_harmless(tmp_path: Path, frames: NDArray[np.uint8]) -> None:
    with writer_of(tmp_path / "out.npy") as writer:
        writer.write(noise(1))
        with pytest.raises(ArgumentError, match=r"\[N, 24, 40, 3\]"):
            writer.write(frames)
        writer.write(noise(1))
    assert np.load(tmp_path / "out.npy").shape == (2, HEIGHT, WIDTH, 3)


def test_only_inside_the_block(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "out.npy")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ArgumentError, match="not opened"):
        writer.write(noise(1))
    with writer:
        writer.write(noise(1))
    with pytest.raises(ArgumentError, match="closed"):
        writer.write(noise(1))
    with pytest.raises(ArgumentError, match="closed"), writer:
        pass


STDOUT_SCRIPT = """
import sys
import numpy as np
from svd_trt.errors import OutputError
from svd_trt.runtime.video import check_output, open_writer

check_output("-")
try:
    with open_writer("-", height=64, width=96, fps=7, metadata={}) as writer:
        for value in range(int(sys.argv[1])):
            writer.write(np.full((2, 64, 96, 3), value, np.uint8))
except OutputError as error:
    sys.exit(str(error))
"""


def stdout_command(chunks: int) -> list[str]:
    return [sys.executable, "-W", "error", "-c", STDOUT_SCRIPT, str(chunks)]


def test_stdout_whole() -> None:
    done = subprocess.run(stdout_command(3), capture_output=True, check=True)
    assert done.stderr == b""
    assert done.stdout == b"".join(bytes([value]) * (2 * 64 * 96 * 3) for value in range(3))


def test_stdout_without_frames() -> None:
    done = subprocess.run(stdout_command(0), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.split() == b"standard output was not written: it got no frames".split()


def test_stdout_closed_early() -> None:
    with subprocess.Popen(stdout_command(100), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        head = subprocess.run(["head", "-c", "1000"], stdin=writer.stdout, capture_output=True, check=True)
        writer.stdout.close()
        message = writer.stderr.read().decode()
    assert head.stdout == b"\0" * 1000
    # One line, and nothing more from Python's own flush at exit.
    assert message.strip() == "cannot write standard output: the reader closed the pipe"
    assert writer.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_disk_full() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(stdout_command(2), stdout=full, stderr=subprocess.PIPE, check=False)
    message = "cannot write standard output: No space left on device; free some space, or write elsewhere"
    assert (done.returncode, done.stderr.decode().strip()) == (1, message)
