"""Videos that one call makes together: the same frames as alone, and each ends for itself."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from tests.serve.conftest import Served, events_of, figures, frames_of, start_server

SIZE = {"height": 40, "width": 48, "num_frames": 4}
LONG = {"num_frames": 2, "height": 40, "width": 48, "num_inference_steps": 90}


@pytest.fixture(scope="module")
def pair(dynamic_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that makes two videos together, of a bundle that was built for that."""
    server = start_server(dynamic_bundle.path, tmp_path_factory.mktemp("batch") / "data", "--batch", "2")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def pictures(picture: PIL.Image.Image) -> list[bytes]:
    files = []
    for turned in (picture, picture.rotate(180)):
        file = io.BytesIO()
        turned.save(file, "PNG")
        files.append(file.getvalue())
    return files


@pytest.fixture
def together(pair: Served, pictures: list[bytes]) -> Callable[..., list[str]]:
    """``together([{...}, {...}])``: ids of jobs that wait at the same time, and are begun at the same moment."""

    def send(each: list[dict[str, Any]]) -> list[str]:
        first = pair.accepted(pictures[0], **LONG)["id"]
        pair.wait(first, "in_progress")
        jobs = [pair.accepted(pictures[number % 2], **arguments)["id"] for number, arguments in enumerate(each)]
        pair.client.delete(f"/v1/videos/{first}")
        return jobs

    return send


def calls(server: Served) -> tuple[int, int]:
    """How many calls of the pipeline came to their end, and how many videos were completed."""
    told = figures(server)
    names = ('stage_seconds_count{model="dynamic",stage="denoise"}', 'videos_total{model="dynamic",status="completed"}')
    denoised, completed = (int(told.get(f"svd_trt_{name}", 0)) for name in names)
    return denoised, completed


def more(server: Served, before: tuple[int, int], videos: int) -> int:
    """How many calls came to their end since ``before``, in which ``videos`` were completed."""
    until = time.monotonic() + 10
    while (now := calls(server))[1] < before[1] + videos:  # they are counted just after their jobs have ended
        assert time.monotonic() < until
        time.sleep(0.05)
    assert now[1] == before[1] + videos
    return now[0] - before[0]


def test_two_videos_of_one_call_have_the_frames_of_two_calls(
    pair: Served, pictures: list[bytes], together: Callable[..., list[str]], dynamic_pipe: VideoPipeline
) -> None:
    arguments = SIZE | {"num_inference_steps": 3}
    before = calls(pair)
    jobs = together([arguments | {"seed": seed} for seed in (5, 2**40 + 6)])
    with pair.client.stream("GET", f"/v1/videos/{jobs[1]}/events") as answer:
        events = list(events_of(answer.iter_lines()))
    done = [pair.wait(job) for job in jobs]
    assert [job["status"] for job in done] == ["completed", "completed"]
    assert more(pair, before, videos=2) == 1
    for job, picture, seed in zip(done, pictures, (5, 2**40 + 6), strict=True):
        assert job["arguments"]["seed"] == seed
        expected = np.stack(list(dynamic_pipe.stream(picture, seed=seed, **arguments)))
        found = frames_of(pair.content(job["id"], "mkv"))
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 1
    # The events are of the second video alone.
    frames = [(data["index"], data["total"]) for name, data in events if name == "frame"]
    assert frames == [(0, 4), (1, 4), (2, 4), (3, 4)]
    decoded = [(data["done"], data["total"]) for name, data in events if name == "step" and data["stage"] == "decode"]
    assert decoded[-1] == (4, 4)


def test_cancelling_one_video_of_a_call_leaves_the_other(
    pair: Served, pictures: list[bytes], together: Callable[..., list[str]], dynamic_pipe: VideoPipeline
) -> None:
    arguments = SIZE | {"num_frames": 2, "num_inference_steps": 20, "seed": 3}
    for number in (0, 1):
        before = calls(pair)
        jobs = together([arguments, arguments])
        pair.wait(jobs[0], "in_progress")
        assert pair.job(jobs[1])["status"] == "in_progress"
        assert pair.client.delete(f"/v1/videos/{jobs[number]}").json()["status"] == "cancelled"
        other = jobs[1 - number]
        assert pair.wait(other)["status"] == "completed"
        expected = np.stack(list(dynamic_pipe.stream(pictures[1 - number], **arguments)))
        assert np.abs(frames_of(pair.content(other, "mkv")).astype(int) - expected).max() <= 1
        assert more(pair, before, videos=1) == 1
        assert pair.job(jobs[number])["status"] == "cancelled"
        assert not list(pair.data.glob(f"*/*{jobs[number]}*"))


def test_cancelling_all_videos_of_a_call_ends_it(pair: Served, together: Callable[..., list[str]]) -> None:
    before = calls(pair)
    jobs = together([LONG, LONG])
    pair.wait(jobs[0], "in_progress")
    for job in jobs:
        pair.client.delete(f"/v1/videos/{job}")
    last = together([SIZE | {"num_inference_steps": 1}])
    assert pair.wait(last[0])["status"] == "completed"
    assert more(pair, before, videos=1) == 1


@pytest.mark.parametrize(
    "others",
    [
        [{}, {"num_inference_steps": 3}],
        [{}, {"resize_mode": "crop"}],
        [{"extend": 2}, {"extend": 2}],
        [{"decode_chunk_size": 3}, {"decode_chunk_size": 3}],  # a chunk would have frames of both
    ],
    ids=str,
)
def test_other_arguments_are_not_joined(
    pair: Served, together: Callable[..., list[str]], others: list[dict[str, Any]]
) -> None:
    before = calls(pair)
    jobs = together([SIZE | {"num_inference_steps": 2} | other for other in others])
    assert [pair.wait(job)["status"] for job in jobs] == ["completed", "completed"]
    assert more(pair, before, videos=2) == 2


def test_a_picture_that_cannot_be_read_any_more_fails_its_own_video_alone(
    pair: Served, pictures: list[bytes], dynamic_pipe: VideoPipeline
) -> None:
    arguments = SIZE | {"num_inference_steps": 2, "seed": 1}
    before = calls(pair)
    first = pair.accepted(pictures[0], **LONG)["id"]
    pair.wait(first, "in_progress")
    bad, good = (pair.accepted(picture, **arguments)["id"] for picture in pictures)
    (pair.data / "pictures" / bad).write_bytes(b"no picture")
    pair.client.delete(f"/v1/videos/{first}")
    assert pair.wait(good)["status"] == "completed"
    expected = np.stack(list(dynamic_pipe.stream(pictures[1], **arguments)))
    assert np.abs(frames_of(pair.content(good, "mkv")).astype(int) - expected).max() <= 1
    failed = pair.wait(bad)
    assert (failed["status"], failed["error"]["field"]) == ("failed", "image")
    assert more(pair, before, videos=1) == 1


def test_streams_are_not_joined(pair: Served, pictures: list[bytes], together: Callable[..., list[str]]) -> None:
    arguments = SIZE | {"num_inference_steps": 2}
    before = calls(pair)
    first = pair.accepted(pictures[0], **LONG)["id"]
    pair.wait(first, "in_progress")
    waiting = pair.accepted(pictures[0], **arguments)["id"]
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(pair.post, pictures[1], **arguments, stream="true", format="mkv")
        until = time.monotonic() + 60
        while figures(pair)['svd_trt_waiting_jobs{model="dynamic"}'] < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        pair.client.delete(f"/v1/videos/{first}")
        assert len(frames_of(stream.result().content)) == 4
    assert pair.wait(waiting)["status"] == "completed"
    assert more(pair, before, videos=2) == 2


@pytest.mark.slow
def test_after_a_crash_videos_of_one_call_are_made_again_each_alone(
    dynamic_bundle: Bundle, tmp_path: Path, pictures: list[bytes]
) -> None:
    arguments = SIZE | {"num_inference_steps": 20}
    server = start_server(dynamic_bundle.path, tmp_path / "data", "--batch", "2")
    first = server.accepted(pictures[0], **LONG)["id"]
    server.wait(first, "in_progress")
    jobs = [server.accepted(picture, **arguments)["id"] for picture in pictures]
    server.client.delete(f"/v1/videos/{first}")
    server.wait(jobs[0], "in_progress")
    assert server.job(jobs[1])["status"] == "in_progress"
    server.stop(signal.SIGKILL)
    again = start_server(dynamic_bundle.path, tmp_path / "data", "--batch", "2")
    assert [again.wait(job)["status"] for job in jobs] == ["completed", "completed"]
    assert more(again, (0, 0), videos=2) == 2
    again.stop()
