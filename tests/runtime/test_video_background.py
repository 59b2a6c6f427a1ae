"""Writing in a thread: the same videos, a bounded queue, and no lost errors or interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from svd_trt.errors import ArgumentError, OutputError
from svd_trt.runtime.video import BackgroundWriter, VideoWriter, _background
from tests.runtime.test_video import SMOOTH_ERROR, error, load, moving
from tests.runtime.test_video_failures import NAMES, STDOUT_SCRIPT, largest_file, noise, tree, writer_of

Frames = NDArray[np.uint8]
HEIGHT, WIDTH = 24, 40


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def hooked(path: Path, before: Callable[[int], object]) -> tuple[VideoWriter, list[Frames]]:
    """A writer that calls ``before(index)`` before every frame, and the frames that it received."""
    writer = writer_of(path)
    append = writer._append
    begun: list[Frames] = []

    def hook(frame: Frames) -> None:
        begun.append(frame)
        before(len(begun) - 1)
        append(frame)

    writer._append = hook  # type: ignore[method-assign]
    return writer, begun


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("maxsize", [1, 2, 20])
def test_the_same_video(tmp_path: Path, name: str, maxsize: int) -> None:
    frames = moving(9, HEIGHT, WIDTH)
    chunks = np.split(frames, (1, 4, 4, 5))  # 1, 3, 0, 1 and 4 frames
    paths = [tmp_path / "direct" / name, tmp_path / "background" / name]
    for path in paths:
        path.parent.mkdir()
    with writer_of(paths[0]) as direct:
        for chunk in chunks:
            direct.write(chunk)
    with BackgroundWriter(writer_of(paths[1]), maxsize) as background:
        for chunk in chunks:
            background.write(chunk)
    assert background.seconds > 0
    assert [entry.name for entry in paths[1].parent.iterdir()] == [name]
    if name == "out.mp4":  # x264's threads make different bytes each time, also without the background thread
        back = load(paths[1])
        assert back.shape == frames.shape
        assert error(back, frames) <= SMOOTH_ERROR[name]
        assert [int(np.argmin([error(one, other) for other in frames])) for one in back] == list(range(9))
    else:
        assert tree(paths[0].parent) == tree(paths[1].parent)


def test_standard_output() -> None:
    script = STDOUT_SCRIPT.replace("open_writer(", "BackgroundWriter(open_writer(").replace("{}) as", "{})) as")
    script = script.replace("import check_output", "import BackgroundWriter, check_output")
    assert "BackgroundWriter(open_writer(" in script
    command = [sys.executable, "-W", "error", "-c", script]
    whole = subprocess.run([*command, "9"], capture_output=True, check=True)
    assert whole.stdout == b"".join(bytes([value]) * (2 * 64 * 96 * 3) for value in range(9))
    assert whole.stderr == b""
    with subprocess.Popen([*command, "200"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1000)
        process.stdout.close()
        message = process.stderr.read().decode().strip()
    assert (process.returncode, message) == (1, "cannot write standard output: the reader closed the pipe")


def test_the_caller_may_reuse_its_array(tmp_path: Path) -> None:
    gate = threading.Event()
    writer, _ = hooked(tmp_path / "out.npy", lambda index: gate.wait(60))
    wanted = noise(3)
    buffer = np.empty((1, HEIGHT, WIDTH, 3), np.uint8)
    with BackgroundWriter(writer) as background:
        for frame in wanted:
            buffer[0] = frame
            background.write(buffer)
        buffer[:] = 0
        gate.set()
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), wanted)


def test_read_only_frames_are_not_copied(tmp_path: Path) -> None:
    frames = noise(2)
    frames.flags.writeable = False
    writer, begun = hooked(tmp_path / "out.npy", lambda index: None)
    with BackgroundWriter(writer) as background:
        background.write(frames)
    assert all(np.shares_memory(frame, frames) for frame in begun)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), frames)


@pytest.mark.parametrize("maxsize", [1, 2, 5])
def test_the_queue_holds_no_more_than_its_bound(tmp_path: Path, maxsize: int) -> None:
    returned = 0  # calls of write() that returned
    queued: list[int] = []

    def slow(index: int) -> None:
        wait_until(lambda: returned >= min(index + 1 + maxsize, 12))
        time.sleep(0.01)  # time in which one frame too many could be queued
        queued.append(returned - index - 1)

    writer, begun = hooked(tmp_path / "out.npy", slow)
    with BackgroundWriter(writer, maxsize) as background:
        for frame in noise(12):
            background.write(frame[None])
            returned += 1
    assert len(begun) == 12
    assert queued[0] == maxsize
    assert max(queued) == maxsize


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "existing"])
def test_disk_full(tmp_path: Path, name: str, part: float, existing: bool) -> None:
    frames = noise(12)
    whole = tmp_path.parent / f"{tmp_path.name}-whole"
    whole.mkdir()
    with writer_of(whole / name) as direct:
        direct.write(frames)
    limit = int(part * max(map(len, tree(whole).values())))
    if existing:
        with writer_of(tmp_path / name) as direct:
            direct.write(noise(3, seed=9))
    before = tree(tmp_path)

    def save() -> None:
        with largest_file(limit), BackgroundWriter(writer_of(tmp_path / name)) as background:
            for frame in frames:
                background.write(frame[None])

    with pytest.raises(OutputError, match=rf"cannot write .*{name}.*; free some space"):
        save()
    assert tree(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == min(len(before), 1)


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), RuntimeError("the encoder broke")])
@pytest.mark.parametrize("failing", [0, 4])
def test_an_error_in_the_middle(tmp_path: Path, problem: Exception, failing: int) -> None:
    expected, words = (OutputError, "free some space") if isinstance(problem, OSError) else (RuntimeError, "broke")

    def fail(index: int) -> None:
        if index == failing:
            raise problem

    writer, begun = hooked(tmp_path / "out.npy", fail)

    def save() -> None:
        with BackgroundWriter(writer) as background:
            for frame in noise(failing + 1):
                background.write(frame[None])
            wait_until(lambda: background._error is not None)
            for _ in range(5):  # more than the queue holds; every call raises
                with pytest.raises(expected, match=words):
                    background.write(noise(1))

    with pytest.raises(expected, match=words):  # the end of the block raises it again
        save()
    assert len(begun) == failing + 1
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_last_frame_comes_at_the_end(tmp_path: Path) -> None:
    def fail(index: int) -> None:
        wait_until(lambda: not background._open)
        raise RuntimeError("the encoder broke")

    writer, _ = hooked(tmp_path / "out.npy", fail)
    background = BackgroundWriter(writer)
    with pytest.raises(RuntimeError, match="the encoder broke"), background:
        background.write(noise(1))
    assert not list(tmp_path.iterdir())


def test_a_caller_with_an_error_of_its_own_hears_of_both(tmp_path: Path) -> None:
    def fail(index: int) -> None:
        raise OSError(28, "No space left on device")

    writer, _ = hooked(tmp_path / "out.npy", fail)

    def save() -> None:
        with BackgroundWriter(writer) as background:
            background.write(noise(1))
            wait_until(lambda: background._error is not None)
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        save()
    assert "free some space" in caught.value.__notes__[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_abandoned(tmp_path: Path, name: str, failure: type[BaseException]) -> None:
    """Neither queued frames nor the rest of the call in progress are written."""
    with writer_of(tmp_path / name) as direct:
        direct.write(noise(3, seed=9))
    before = tree(tmp_path)
    writer, begun = hooked(tmp_path / name, lambda index: wait_until(lambda: background._abandoned))
    background = BackgroundWriter(writer)

    def save() -> None:
        with background:
            for _ in range(3):
                background.write(noise(5))
            raise failure

    with pytest.raises(failure):
        save()
    assert len(begun) == 1
    assert tree(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ArgumentError, match="failed"):
        writer.write(noise(1))
    background._thread.join(60)
    assert not background._thread.is_alive()


@pytest.mark.parametrize("name", NAMES)
def test_abandoned_generator(tmp_path: Path, name: str) -> None:
    def stream() -> Generator[None, None, None]:
        with BackgroundWriter(writer_of(tmp_path / name)) as background:
            while True:
                background.write(noise(1))
                yield

    frames = stream()
    for _ in range(4):
        next(frames)
    frames.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["write", "exit"])
def test_ctrl_c_while_waiting(tmp_path: Path, where: str) -> None:
    def interrupt(index: int) -> None:
        wait_until(background._queue.full if where == "write" else lambda: not background._open)
        time.sleep(0.02)  # until the caller waits; an interrupt before that has the same result
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: background._abandoned)

    writer, begun = hooked(tmp_path / "out.npy", interrupt)
    background = BackgroundWriter(writer, maxsize=2)

    def save() -> None:
        with background:
            for frame in noise(20 if where == "write" else 2):
                background.write(frame[None])

    with pytest.raises(KeyboardInterrupt):
        save()
    assert len(begun) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_ctrl_c_is_not_held_up_by_a_write_that_hangs(
    tmp_path: Path, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For instance when the reader of standard output stalls: only the clean-up waits for the write."""
    gate = threading.Event()

    def hang(index: int) -> None:
        if again:
            wait_until(lambda: background._abandoned)
            time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)
        assert gate.wait(60)

    monkeypatch.setattr(_background, "_TIMEOUT_S", 60.0 if again else 0.05)
    writer, begun = hooked(tmp_path / "out.npy", hang)
    background = BackgroundWriter(writer)

    def save() -> None:
        with background:
            for _ in range(3):  # one is being written, and the queue is full
                background.write(noise(2))
            wait_until(background._queue.full)
            raise RuntimeError if again else KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save()
    assert list(tmp_path.iterdir())
    gate.set()
    wait_until(lambda: not list(tmp_path.iterdir()))
    assert len(begun) == 1


@pytest.mark.parametrize("wrong", [noise(2)[:, :-8], noise(2)[0], noise(2).astype(np.float32), noise(2).tolist(), None])
def test_wrong_frames_are_refused_and_harmless(tmp_path: Path, wrong: Any) -> None:
    with BackgroundWriter(writer_of(tmp_path / "out.npy")) as background:
        background.write(noise(1))
        with pytest.raises(ArgumentError, match=r"\[N, 24, 40, 3\]"):
            background.write(wrong)
        background.write(noise(1))
    assert np.load(tmp_path / "out.npy").shape == (2, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("name", NAMES)
def test_no_frames(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="no frames"), BackgroundWriter(writer_of(tmp_path / name)) as background:
        background.write(noise(0))
    assert not list(tmp_path.iterdir())


def test_only_inside_the_block(tmp_path: Path) -> None:
    background = BackgroundWriter(writer_of(tmp_path / "out.npy"))
    with pytest.raises(ArgumentError, match="not open"):
        background.write(noise(1))
    assert not list(tmp_path.iterdir())
    with background:
        background.write(noise(1))
    with pytest.raises(ArgumentError, match="not open"):
        background.write(noise(1))
    with pytest.raises(ArgumentError, match="closed"), background:
        pass
    assert len(np.load(tmp_path / "out.npy")) == 1


def test_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="start new thread"), BackgroundWriter(writer_of(tmp_path / "out.npy")):
        pass
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    background = BackgroundWriter(writer_of(tmp_path / "folder" / "out.npy"))
    (tmp_path / "folder").rmdir()
    with pytest.raises(OutputError, match="cannot write"), background:
        pass
    assert not background._thread.is_alive()
    with pytest.raises(ArgumentError, match="at least 1"):
        BackgroundWriter(writer_of(tmp_path / "out.npy"), maxsize=0)
