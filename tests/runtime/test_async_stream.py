"""Streams for asyncio: frames, several tasks, cancelled tasks, errors; the event loop never waits."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import VideoPipeline
from svd_trt.errors import ArgumentError, BackendError, CancelledError, ImageError

TIMEOUT_S = 60.0
FAST: dict[str, Any] = {"num_frames": 3, "num_inference_steps": 1, "decode_chunk_size": 1, "resize_mode": "crop"}
ENDLESS: dict[str, Any] = FAST | {"num_inference_steps": 1000, "seed": 1}


@pytest.fixture
def pipe(small_bundle: Path) -> Iterator[VideoPipeline]:
    with VideoPipeline.open(small_bundle) as pipe:
        yield pipe


def run(work: Coroutine[Any, Any, Any]) -> None:
    asyncio.run(asyncio.wait_for(work, TIMEOUT_S))


class Started:
    """A progress callback, called in the stream's thread, that lets a task wait for the first step."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def __call__(self, stage: str, done: float, total: float) -> None:
        if stage == "denoise" and done:
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()


async def take(stream: Any) -> list[Any]:
    return [frame async for frame in stream]


@contextmanager
def turn_of_another_thread(pipe: VideoPipeline) -> Iterator[None]:
    """Another thread uses the pipeline while the block runs."""
    taken, ended = threading.Event(), threading.Event()

    def use() -> None:
        with pipe.executor.turns.taken():
            taken.set()
            assert ended.wait(TIMEOUT_S)

    thread = threading.Thread(target=use)
    thread.start()
    try:
        assert taken.wait(TIMEOUT_S)
        yield
    finally:
        ended.set()
        thread.join()


def stream_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("svd-trt stream")]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_the_frames_are_those_of_a_call(pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    expected = pipe(picture, seed=4, output_type="np", **FAST).frames[0]

    async def work() -> None:
        np.testing.assert_array_equal(await take(pipe.astream(picture, seed=4, **FAST)), expected)
        async with pipe.astream(picture, seed=4, **FAST) as stream:
            assert stream.stream.parameters.seed == 4
            assert stream.stream.num_videos == 1
            np.testing.assert_array_equal(await take(stream), expected)
            assert await take(stream) == []
        await stream.aclose()
        await until(lambda: not stream_threads())

    run(work())


def test_several_tasks_take_turns_and_the_loop_goes_on(pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    expected = [pipe(picture, seed=seed, output_type="np", **FAST).frames[0] for seed in range(4)]

    async def work() -> None:
        ticks, running = 0, True

        async def tick() -> None:
            nonlocal ticks
            while running:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        with turn_of_another_thread(pipe):  # even preparing must wait, in a thread
            tasks = [asyncio.create_task(take(pipe.astream(picture, seed=seed, **FAST))) for seed in range(4)]
            await until(lambda: ticks > 200)
            assert not any(task.done() for task in tasks)
            assert await asyncio.to_thread(lambda: 1) == 1, "the loop's own threads are taken"
        np.testing.assert_array_equal(await asyncio.gather(*tasks), expected)
        running = False
        await ticking

    run(work())


def test_tasks_share_the_frames_of_a_stream(pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    options = FAST | {"num_frames": 6, "seed": 2}
    whole = sorted(frame.tobytes() for frame in pipe.stream(picture, **options))

    async def work() -> None:
        stream = pipe.astream(picture, **options)
        parts = await asyncio.gather(*(take(stream) for _ in range(3)))
        assert sorted(frame.tobytes() for part in parts for frame in part) == whole

    run(work())


def test_a_block_that_a_cancelled_task_leaves_waits_for_the_end(pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    """The pipeline may be closed after the block, so nothing of the stream may run then."""

    async def work() -> None:
        started = Started()

        async def use() -> None:
            async with pipe.astream(picture, progress=started, **ENDLESS) as stream:
                try:
                    await take(stream)
                finally:
                    ended.append(stream)
            closed.append(bool(stream_threads()) and not stream._closing.done())  # type: ignore[union-attr]

        ended: list[Any] = []
        closed: list[bool] = []
        task = asyncio.create_task(use())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended[0]._closing.done()

    run(work())


def test_a_finalizer_in_the_middle_of_a_submission_does_not_wait() -> None:
    """The garbage collector may close a stream while this thread gives another stream's worker a call."""
    script = """
import gc
from svd_trt.runtime.async_stream import AsyncVideoStream
from svd_trt.runtime.cancellation import Cancellation

worker = AsyncVideoStream(lambda: None, Cancellation())._worker
worker.submit(int).result()
gc.disable()
for count in range(1, 60):
    stream = AsyncVideoStream(lambda: None, Cancellation())
    stream._worker.submit(int).result()
    stream.cycle = stream
    del stream
    gc.set_threshold(gc.get_count()[0] + count)
    gc.enable()
    worker.submit(int)
    gc.disable()
    gc.collect()
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert done.stdout == "done\n"


def test_a_program_that_ends_with_an_open_stream_ends(small_bundle: Path) -> None:
    script = f"""
import asyncio
from svd_trt import VideoPipeline

pipe = VideoPipeline.open({str(small_bundle)!r}, verify=False)
seen = asyncio.Event()

async def work():
    loop = asyncio.get_running_loop()
    progress = lambda stage, done, total: stage == "denoise" and done and loop.call_soon_threadsafe(seen.set)
    stream = pipe.astream("examples/tiny/picture.png", num_inference_steps=1000, num_frames=3, progress=progress)
    kept.append(stream)
    kept.append(loop.create_task(stream.__anext__()))
    await seen.wait()

kept = []
asyncio.new_event_loop().run_until_complete(work())
print("left")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


def test_a_cancelled_task_cancels_the_generation(pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    async def work() -> None:
        started = Started()
        task = asyncio.create_task(take(pipe.astream(picture, progress=started, **ENDLESS)))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # A thousand steps would take minutes.
        assert len(await take(pipe.astream(picture, **FAST))) == 3
        await until(lambda: not stream_threads())

    run(work())


def test_a_timeout_cancels_the_generation(pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    async def work() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3), pipe.astream(picture, **ENDLESS) as stream:
                await take(stream)
        assert len(await take(pipe.astream(picture, **FAST))) == 3

    run(work())


def test_a_task_that_waits_for_its_turn_is_cancelled_at_once(pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    prepared = []

    async def work() -> None:
        with turn_of_another_thread(pipe):
            task = asyncio.create_task(
                take(pipe.astream(picture, progress=lambda *call: prepared.append(call), **FAST))
            )
            await until(lambda: bool(stream_threads()))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert len(await take(pipe.astream(picture, **FAST))) == 3
        await until(lambda: not stream_threads())
        assert not prepared

    run(work())


@pytest.mark.parametrize("end", ["stream", "pipe", "thread"])
def test_cancelling_from_elsewhere_is_svd_trts_error(end: str, pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    async def work() -> None:
        started = Started()
        stream = pipe.astream(picture, progress=started, **ENDLESS)
        task = asyncio.create_task(take(stream))
        await started.wait()
        if end == "stream":
            stream.cancel()
        elif end == "pipe":
            pipe.cancel()
        else:
            await asyncio.to_thread(stream.cancel)
        with pytest.raises(CancelledError, match="the video was cancelled"):
            await task
        assert await take(stream) == [], "the stream is over"

    run(work())


def test_leaving_a_block_or_a_loop_ends_the_generation(pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    several = FAST | {"num_videos_per_prompt": 1000, "seed": 1}

    async def work() -> None:
        async with pipe.astream(picture, **several) as stream:
            await anext(stream)
        await until(lambda: not stream_threads())
        async for _ in pipe.astream(picture, **several):
            break
        gc.collect()
        await until(lambda: not stream_threads())
        assert len(await take(pipe.astream(picture, **FAST))) == 3

    run(work())


def test_errors_reach_the_task(pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    async def fails(error: type[BaseException], match: str, **arguments: Any) -> None:
        image = arguments.pop("image", picture)
        stream = pipe.astream(image, **(FAST | arguments))
        with pytest.raises(error, match=match):
            await anext(stream)
        assert await take(stream) == []
        with pytest.raises(error, match=match):
            async with pipe.astream(image, **(FAST | arguments)):
                pytest.fail("the block must not begin")

    async def work() -> None:
        await fails(ArgumentError, "num_frames", num_frames=99)
        await fails(TypeError, "use seed=", manual_seed=3)
        await fails(ImageError, "there is no such file", image="nothing.png")
        with pytest.raises(RuntimeError, match="not prepared yet"):
            pipe.astream(picture).stream  # noqa: B018
        stream = pipe.astream(picture, **FAST)
        await anext(stream)
        await asyncio.to_thread(pipe.close)
        with pytest.raises((BackendError, CancelledError)):
            await take(stream)
        await until(lambda: not stream_threads())

    run(work())
