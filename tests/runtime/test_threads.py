"""One pipeline in several threads: calls wait for one another, and any thread may cancel, close and release."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import VideoPipeline
from svd_trt.errors import ArgumentError, BackendError, CancelledError
from svd_trt.runtime import cpu_device
from svd_trt.runtime.device import upload

TIMEOUT_S = 60.0
FAST: dict[str, Any] = {"num_frames": 2, "num_inference_steps": 1}
ENDLESS: dict[str, Any] = {"num_frames": 2, "num_inference_steps": 1000, "seed": 1}


@pytest.fixture
def pipe(small_bundle: Path) -> Iterator[VideoPipeline]:
    with VideoPipeline.open(small_bundle) as pipe:
        yield pipe


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


class Started:
    """A progress callback that says when the first step is done."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, stage: str, done: float, total: float) -> None:
        if stage == "denoise" and done:
            self.event.set()

    def wait(self) -> None:
        assert self.event.wait(TIMEOUT_S)


def test_calls_of_two_threads_wait_for_one_another(
    pipe: VideoPipeline, threads: ThreadPoolExecutor, picture: PIL.Image.Image
) -> None:
    expected = [pipe(picture, seed=seed, output_type="np", **FAST).frames for seed in range(3)]

    def make(first: int) -> None:
        for number in range(10):
            seed = (first + number) % 3
            frames = pipe(picture, seed=seed, output_type="np", **FAST).frames
            np.testing.assert_array_equal(frames, expected[seed])

    for made in [threads.submit(make, first) for first in range(2)]:
        made.result(TIMEOUT_S)


def test_a_thread_that_waits_is_not_overtaken_for_ever(pipe: VideoPipeline, threads: ThreadPoolExecutor) -> None:
    """The thread that has the turn asks for it again at once, which most locks give it."""
    turns, order = pipe.executor.turns, list[str]()
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        with turns.taken():
            order.append("other")

    with turns.taken():
        other = threads.submit(wait)
        assert waiting.wait(TIMEOUT_S)
        time.sleep(0.1)  # it is in the queue
    for _ in range(3):
        with turns.taken():
            order.append("mine")
    other.result(TIMEOUT_S)
    assert order.index("other") <= 1


def test_a_callback_is_refused_with_the_reason(pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    def nested(pipe: VideoPipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        for verb, call in {
            "start another video with": lambda: pipe(picture, **FAST),
            "release": pipe.release,
            "close": pipe.close,
        }.items():
            with pytest.raises(ArgumentError, match=f"a callback cannot {verb} the pipeline that calls it"):
                call()
        with pytest.raises(ArgumentError, match="a callback cannot take frames from the stream that calls it"):
            next(stream)

    stream = pipe.stream(picture, callback_on_step_end=nested, **FAST)
    assert len(list(stream)) == 2


def test_a_video_is_made_between_two_frames_of_another_threads_stream(
    pipe: VideoPipeline, threads: ThreadPoolExecutor, picture: PIL.Image.Image
) -> None:
    several: dict[str, Any] = FAST | {"num_videos_per_prompt": 3, "decode_chunk_size": 2}
    whole = list(pipe.stream(picture, seed=1, **several))
    alone = pipe(picture, seed=2, output_type="np", **FAST).frames
    stream = pipe.stream(picture, seed=1, **several)
    for frame in whole:
        np.testing.assert_array_equal(threads.submit(next, stream).result(TIMEOUT_S), frame)
        made = threads.submit(pipe, picture, seed=2, output_type="np", **FAST).result(TIMEOUT_S)
        np.testing.assert_array_equal(made.frames, alone)


def test_threads_share_the_frames_of_a_stream(
    pipe: VideoPipeline, threads: ThreadPoolExecutor, picture: PIL.Image.Image
) -> None:
    several: dict[str, Any] = FAST | {"num_videos_per_prompt": 8, "decode_chunk_size": 1, "seed": 3}
    whole = sorted(frame.tobytes() for frame in pipe.stream(picture, **several))
    stream = pipe.stream(picture, **several)
    taken = [threads.submit(list, stream) for _ in range(3)]
    shared = sorted(frame.tobytes() for part in taken for frame in part.result(TIMEOUT_S))
    assert shared == whole


def close_stream(stream: Any, pipe: VideoPipeline) -> None:
    stream.close()


def cancel_stream(stream: Any, pipe: VideoPipeline) -> None:
    stream.cancel()


def cancel_pipe(stream: Any, pipe: VideoPipeline) -> None:
    pipe.cancel()


ENDS: list[tuple[Callable[..., None], str]] = [
    (close_stream, "the stream was closed"),
    (cancel_stream, "the video was cancelled"),
    (cancel_pipe, "the video was cancelled"),
]


@pytest.mark.parametrize(("end", "reason"), ENDS)
def test_a_stream_is_ended_from_another_thread(
    end: Callable[..., None],
    reason: str,
    pipe: VideoPipeline,
    threads: ThreadPoolExecutor,
    picture: PIL.Image.Image,
) -> None:
    started = Started()
    stream = pipe.stream(picture, progress=started, **ENDLESS)
    waiting = threads.submit(next, stream)
    started.wait()
    end(stream, pipe)
    with pytest.raises(CancelledError, match=reason):
        waiting.result(TIMEOUT_S)
    assert list(stream) == []
    assert pipe(picture, output_type="np", **FAST).frames.any()


@pytest.mark.parametrize(("end", "reason"), ENDS[1:])
def test_a_stream_that_nobody_waits_for_is_cancelled(
    end: Callable[..., None], reason: str, pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    """Before its first frame, and between two frames of one chunk."""
    for taken in (0, 1):
        stream = pipe.stream(picture, decode_chunk_size=2, **FAST)
        for _ in range(taken):
            next(stream)
        end(stream, pipe)
        with pytest.raises(CancelledError, match=reason):
            next(stream)
        assert list(stream) == []
        stream.close()


def test_a_finished_stream_may_be_cancelled_and_closed(pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    stream = pipe.stream(picture, **FAST)
    assert len(list(stream)) == 2
    stream.cancel()
    assert list(stream) == []
    stream.close()


def test_a_call_is_cancelled_and_the_ones_that_wait_go_on(
    pipe: VideoPipeline, threads: ThreadPoolExecutor, picture: PIL.Image.Image
) -> None:
    started = Started()
    running = threads.submit(pipe, picture, progress=started, **ENDLESS)
    started.wait()
    waiting = threads.submit(pipe, picture, **FAST)
    pipe.cancel()
    with pytest.raises(CancelledError):
        running.result(TIMEOUT_S)
    assert len(waiting.result(TIMEOUT_S).frames[0]) == 2


def test_a_callback_and_a_signal_handler_may_cancel(pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    steps = []

    def enough(pipe: VideoPipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        steps.append(step)
        pipe.cancel()

    with pytest.raises(CancelledError):
        pipe(picture, callback_on_step_end=enough, **ENDLESS)
    assert len(steps) <= 2

    started = Started()

    def alarm() -> None:
        started.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: pipe.cancel())
    thread = threading.Thread(target=alarm)
    thread.start()
    try:
        with pytest.raises(CancelledError):
            pipe(picture, progress=started, **ENDLESS)
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Runs of networks that end only if they are told to, as at full size; the names of those that began."""
    begun: list[str] = []
    give_up = threading.Event()

    def run(session: Any, binding: Any, options: Any, name: str) -> None:
        begun.append(name)
        while not options.terminate:
            assert not give_up.wait(0.01)
        raise BackendError(f"onnxruntime failed in {name}: it was told to end")

    monkeypatch.setattr(cpu_device, "run_bound", run)
    yield begun
    give_up.set()


@pytest.mark.parametrize("network", ["image_encoder", "vae_encoder", "denoiser", "vae_decoder"])
def test_a_run_that_is_being_computed_ends_early(
    network: str,
    stuck: list[str],
    pipe: VideoPipeline,
    threads: ThreadPoolExecutor,
    picture: PIL.Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = cpu_device.run_bound

    def run(session: Any, binding: Any, options: Any, name: str) -> None:
        (stop if name == network else RUN)(session, binding, options, name)

    monkeypatch.setattr(cpu_device, "run_bound", run)
    running: Future[Any] = threads.submit(pipe, picture, **FAST)
    deadline = time.monotonic() + TIMEOUT_S
    while network not in stuck:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pipe.cancel()
    with pytest.raises(CancelledError):
        running.result(TIMEOUT_S)


RUN = cpu_device.run_bound


def test_a_run_that_begins_after_the_cancel_ends_too(pipe: VideoPipeline) -> None:
    """The cancel came when the network was held and no run had begun."""
    stop = threading.Event()
    latents = np.zeros((1, 4, 16, 16), np.float32)
    with (
        upload(pipe.device, latents, "latents") as given,
        pipe.device.empty((1, 32, 32, 3), np.uint8, "frames") as frames,
        pipe.executor.session("vae_decoder", stop) as session,
    ):
        stop.set()
        pipe.executor._engines.cancel(stop)
        with pytest.raises(BackendError, match="vae_decoder"):
            session.enqueue({"latents": given, "frames": frames})


def test_closing_ends_the_video_of_another_thread(
    pipe: VideoPipeline, threads: ThreadPoolExecutor, picture: PIL.Image.Image
) -> None:
    started = Started()
    running = threads.submit(pipe, picture, progress=started, **ENDLESS)
    started.wait()
    waiting = threads.submit(pipe, picture, **FAST)
    pipe.close()
    for made in (running, waiting):
        with pytest.raises(BackendError, match="the pipeline is closed"):
            made.result(TIMEOUT_S)
    pipe.close()


def test_releasing_waits_for_the_video_of_another_thread(
    pipe: VideoPipeline, threads: ThreadPoolExecutor, picture: PIL.Image.Image
) -> None:
    started = Started()
    running = threads.submit(pipe, picture, progress=started, num_frames=2, num_inference_steps=15)
    started.wait()
    pipe.release()
    assert len(running.result(0).frames[0]) == 2
    assert not pipe.executor._engines._loaded


def test_ctrl_c_while_a_call_waits_leaves_the_turn_to_others(
    pipe: VideoPipeline, threads: ThreadPoolExecutor, picture: PIL.Image.Image
) -> None:
    started = Started()
    running = threads.submit(pipe, picture, progress=started, **ENDLESS)
    started.wait()

    def interrupt() -> None:
        time.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threads.submit(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pipe(picture, **FAST)
    assert not running.done()
    pipe.cancel()
    with pytest.raises(CancelledError):
        running.result(TIMEOUT_S)
    assert len(pipe(picture, **FAST).frames[0]) == 2
