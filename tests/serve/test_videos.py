"""The way of a video through the API: accepted, made, watched, fetched, removed."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle
from svd_trt.runtime.video import open_stream
from tests.serve.conftest import FAST, Served, Start, error_of, events_of, figures, frames_of

Alone = Callable[..., Any]


def test_a_video_has_the_frames_of_the_pipeline(served: Served, png: bytes, alone: Alone) -> None:
    """The file that is kept is lossless, so its frames are compared to the bit."""
    job = served.accepted(png, seed=5, num_frames=4, num_inference_steps=2)
    assert job["status"] in ("queued", "in_progress")
    done = served.wait(job["id"])
    assert done["status"] == "completed"
    assert done["progress"] == 100
    assert done["error"] is None
    assert done["created_at"] <= done["started_at"] <= done["completed_at"]
    assert {name: done["arguments"][name] for name in ("seed", "num_frames", "height", "width", "fps")} == {
        "seed": 5,
        "num_frames": 4,
        "height": 32,
        "width": 32,
        "fps": 7,
    }
    expected = alone(seed=5, num_frames=4, num_inference_steps=2)
    np.testing.assert_array_equal(frames_of(served.content(job["id"], "mkv")), expected)


def test_a_seed_that_nobody_gave_is_told_and_makes_the_video_again(served: Served, png: bytes) -> None:
    first = served.wait(served.accepted(png, **FAST)["id"])
    again = served.wait(served.accepted(png, **FAST, seed=first["arguments"]["seed"])["id"])
    frames = [frames_of(served.content(job["id"], "mkv")) for job in (first, again)]
    np.testing.assert_array_equal(*frames)
    other = served.wait(served.accepted(png, **FAST)["id"])
    assert other["arguments"]["seed"] != first["arguments"]["seed"]


def test_events_tell_steps_and_frames_and_the_end(served: Served, png: bytes, alone: Alone) -> None:
    job = served.accepted(png, seed=6, num_frames=3, num_inference_steps=2)
    with served.client.stream("GET", f"/v1/videos/{job['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(answer.iter_lines()))
    assert events[0][0] == "status"
    assert events[-1][0] == "end"
    assert events[-1][1] == served.job(job["id"])
    steps = [data for name, data in events if name == "step"]
    shares = [step["progress"] for step in steps]
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 100
    frames = [data for name, data in events if name == "frame"]
    assert [(frame["index"], frame["total"]) for frame in frames] == [(0, 3), (1, 3), (2, 3)]
    head, _, data = frames[-1]["image"].partition(",")
    assert head == "data:image/webp;base64"
    shown = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), float)
    expected = alone(seed=6, num_frames=3, num_inference_steps=2)[-1]
    assert np.abs(shown - expected).mean() < 12  # WebP at quality 80


def test_events_of_a_video_that_has_ended_are_its_end(served: Served, png: bytes) -> None:
    job = served.wait(served.accepted(png, **FAST)["id"])
    with served.client.stream("GET", f"/v1/videos/{job['id']}/events") as answer:
        assert [name for name, _ in events_of(answer.iter_lines())] == ["status", "end"]


def test_content_comes_in_the_format_that_was_asked_for(served: Served, png: bytes) -> None:
    job = served.wait(served.accepted(png, **FAST)["id"])
    place = f"/v1/videos/{job['id']}/content"
    for accept, kind in {"*/*": "video/mp4", "video/webm": "video/webm", "image/webp,*/*;q=0.5": "image/webp"}.items():
        answer = served.client.get(place, headers={"Accept": accept})
        assert answer.headers["content-type"] == kind
        assert answer.headers["content-disposition"].startswith("inline")
    assert len(frames_of(served.content(job["id"], "mp4"))) == 2
    assert len(frames_of(served.content(job["id"], "webm"))) == 2
    assert getattr(PIL.Image.open(io.BytesIO(served.content(job["id"], "webp"))), "n_frames", 1) == 2
    whole = served.content(job["id"], "mp4")
    part = served.client.get(place, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole[10:20])
    only_headers = served.client.head(place)
    assert (only_headers.status_code, only_headers.content) == (200, b"")
    assert only_headers.headers["content-length"] == str(len(whole))
    assert served.client.get(place, headers={"Range": "bytes=99999999-"}).status_code == 416
    error_of(served.client.get(place, params={"format": "avi"}), 400, "invalid_request")


@pytest.mark.parametrize("kind", ["y4m", "mkv", "mp4"])
def test_a_stream_is_what_infer_writes_to_standard_output(
    served: Served, png: bytes, alone: Alone, tiny_bundle: Bundle, kind: str
) -> None:
    answer = served.post(png, stream="true", format=kind, seed=7, num_frames=3, num_inference_steps=2)
    assert answer.status_code == 200
    expected = alone(seed=7, num_frames=3, num_inference_steps=2)
    if kind == "y4m":
        sink = io.BytesIO()
        with open_stream(sink, "y4m", height=32, width=32, fps=7, metadata={}) as writer:
            writer.write(expected)
        assert answer.content == sink.getvalue()
    elif kind == "mkv":
        np.testing.assert_array_equal(frames_of(answer.content), expected)
    else:
        assert frames_of(answer.content).shape == expected.shape
    job = served.job(answer.headers["location"].rpartition("/")[2])
    assert job["arguments"]["seed"] == 7


def test_finished_videos_are_removed_when_asked(served: Served, png: bytes) -> None:
    job = served.wait(served.accepted(png, **FAST)["id"])
    assert served.client.delete(f"/v1/videos/{job['id']}").json()["status"] == "completed"
    for place in ("", "/content", "/events"):
        error_of(served.client.get(f"/v1/videos/{job['id']}{place}"), 404, "not_found")
    assert not list(served.data.glob(f"*/{job['id']}*"))


def test_the_list_has_the_newest_first_in_pages(served: Served, png: bytes) -> None:
    made = [served.wait(served.accepted(png, **FAST)["id"])["id"] for _ in range(3)]
    first = served.client.get("/v1/videos", params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == made[:0:-1]
    assert first["has_more"]
    rest = served.client.get("/v1/videos", params={"limit": 100, "after": made[1]}).json()
    assert rest["data"][0]["id"] == made[0]
    assert not rest["has_more"]


def test_models_tell_the_limits_of_the_bundle_and_of_the_server(served: Served, tiny_bundle: Bundle) -> None:
    models = served.client.get("/v1/models").json()["data"]
    assert [(model["id"], model["default_model"]) for model in models] == [(tiny_bundle.path.name, True)]
    limits = models[0]["limits"]
    assert (limits["num_frames"]["min"], limits["num_frames"]["max"]) == (2, 8)
    assert limits["num_inference_steps"]["max"] == 100
    assert limits["num_inference_steps"]["default"] == 25
    assert limits["height"]["multiple"] == tiny_bundle.manifest.host.symbols["height"].multiple
    assert limits["resize_mode"]["choices"] == ["stretch", "crop", "pad"]
    presets = models[0]["presets"]
    assert list(presets) == limits["quality"]["choices"]
    assert presets["draft"] == {"schedule": "ays", "num_inference_steps": 5, "sampler": "euler"}


def test_metrics_count_what_happened(served: Served, png: bytes, tiny_bundle: Bundle) -> None:
    before = figures(served)
    served.wait(served.accepted(png, **FAST)["id"])
    served.post(b"no picture")
    after, name = figures(served), tiny_bundle.path.name
    for counter, more in {
        f'svd_trt_videos_total{{model="{name}",status="completed"}}': 1,
        f'svd_trt_frames_total{{model="{name}"}}': 2,
        f'svd_trt_stage_seconds_count{{model="{name}",stage="denoise"}}': 1,
        f'svd_trt_batch_size_sum{{model="{name}"}}': 1,
        'svd_trt_refused_requests_total{type="invalid_request"}': 1,
    }.items():
        assert after[counter] - before.get(counter, 0) == more, counter
    assert after[f'svd_trt_waiting_jobs{{model="{name}"}}'] == 0


def test_the_client_of_the_documents_makes_a_video(start: Start, png: bytes, tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert "http://localhost:8000" in example
    (tmp_path / "picture.png").write_bytes(png)
    code = example.replace("http://localhost:8000", str(start().client.base_url))
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "decode 8 of 8" in done.stdout
    assert len(frames_of((tmp_path / "video.mp4").read_bytes())) == 8
