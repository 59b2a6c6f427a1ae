"""Models that ``svd-trt triton`` writes, in Triton's real server."""

from __future__ import annotations

import io
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest
from tritonclient.utils import InferenceServerException

from svd_trt import SvdTrtError, VideoPipeline
from svd_trt.serve.words import api_words
from tests.cli.conftest import invoke
from tests.serve.triton_server import LONG, Answer, Server, Stream, environment, serving

pytestmark = pytest.mark.slow

MODELS = ("tiny", "small")
ARGUMENTS: list[dict[str, Any]] = [
    {"seed": 42, "num_inference_steps": 3},
    {"seed": 2**64 - 1, "num_frames": 3, "num_inference_steps": 2, "decode_chunk_size": 1, "resize_mode": "crop"},
    {"seed": 7, "sigmas": [300.0, 20.0, 1.0, 0.0], "sampler": "unic", "noise_aug_strength": 0.1, "fps": 12},
    {"seed": 7, "quality": "draft", "guidance_interval": [0.0, 50.0], "extend": 4, "motion_bucket_id": 200},
]


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config) -> Path:
    return environment(pytestconfig.cache.mkdir("triton"))


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Any, small_bundle: Path) -> dict[str, Path]:
    return {"tiny": tiny_bundle.path, "small": small_bundle}


@pytest.fixture(scope="module")
def models(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A link to one bundle, which a queue of two waits for, and a copy of another."""
    folder = tmp_path_factory.mktemp("triton") / "models"
    linked = invoke("triton", bundles["tiny"], "-o", folder, "--name", "tiny", "--max-queue", "2", "--gpus", "none")
    copied = invoke("triton", bundles["small"], "-o", folder, "--name", "small", "--copy", "--gpus", "none")
    assert (linked.returncode, copied.returncode) == (0, 0), linked.stderr + copied.stderr
    return folder


@pytest.fixture(scope="module")
def server(python: Path, models: Path) -> Iterator[Server]:
    with serving(python, models, models.parent / "log") as running:
        yield running


@pytest.fixture
def stream(server: Server) -> Iterator[Stream]:
    with Stream(server) as opened:
        yield opened


@pytest.fixture(scope="module")
def png(picture: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def infer(python: Path, bundle: Path, picture: Path, out: Path, arguments: dict[str, Any]) -> Any:
    """The frames that ``svd-trt infer`` makes in the environment of the server, whose numpy is another than here."""
    words = []
    for name, value in arguments.items():
        words += [f"--{name.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    command = [python, "-m", "svd_trt.cli", "infer", bundle, picture, "-o", out, "-q", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(out)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda given: "-".join(given))
def test_frames_are_those_of_infer(
    arguments: dict[str, Any],
    model: str,
    stream: Stream,
    python: Path,
    bundles: dict[str, Path],
    picture_file: Path,
    png: bytes,
    tmp_path: Path,
) -> None:
    expected = infer(python, bundles[model], picture_file, tmp_path / "frames.npy", arguments)
    assert expected.std() > 5, "flat frames would match any others"
    answer = stream.finish(stream.request(model, image_file=png, **arguments))
    assert answer.error is None
    assert np.array_equal(np.stack(answer.frames), expected)
    assert answer.indexes == list(range(len(expected)))
    assert answer.totals == {len(expected)}
    with VideoPipeline.open(bundles[model]) as pipe:
        here = pipe(png, output_type="np", **arguments).frames[0]
    assert np.abs(here.astype(int) - expected).max() <= 2, "numpy 1 and 2 round some noise differently"
    decided = answer.details["arguments"]
    assert {name: decided[name] for name in arguments} == arguments


def test_pixels_and_files_are_the_same_picture(stream: Stream, picture: PIL.Image.Image, png: bytes) -> None:
    fast = {"seed": 1, "num_inference_steps": 1, "num_frames": 2, "resize_mode": "pad"}
    of_file = stream.finish(stream.request("tiny", image_file=png, **fast))
    of_pixels = stream.finish(stream.request("tiny", image=np.asarray(picture), **fast))
    assert len(of_file.frames) == 2
    assert np.array_equal(of_file.frames, of_pixels.frames)
    assert of_file.details["warnings"] == []


def test_what_the_user_should_know_comes_with_the_frames(stream: Stream, png: bytes) -> None:
    """Of this video alone: the same request again has the same warning once."""
    for _ in range(2):
        answer = stream.finish(stream.request("tiny", image_file=png, num_inference_steps=1, num_frames=2))
        (warning,) = answer.details["warnings"]
        assert "stretched" in warning
    assert type(answer.details["arguments"]["seed"]) is int, "the seed that chance gave"


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_frames": 99},
        {"num_inference_steps": 0},
        {"height": 33},
        {"fps": -1},
        {"noise_aug_strength": float("nan")},
        {"sigmas": [1.0, 2.0]},
        {"schedule": "fast"},
        {"background": "no colour"},
        {"deep_every": 2},
    ],
    ids=lambda given: "-".join(given),
)
def test_wrong_arguments_are_refused_in_the_words_of_the_pipeline(
    arguments: dict[str, Any], stream: Stream, bundles: dict[str, Path], png: bytes
) -> None:
    with VideoPipeline.open(bundles["tiny"]) as pipe, pytest.raises(SvdTrtError) as expected:
        pipe.stream(png, **arguments)
    answer = stream.finish(stream.request("tiny", image_file=png, **arguments))
    assert answer.frames == []
    assert api_words(str(expected.value)) in str(answer.error)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"seed": 1}, "no picture was given"),
        ({"image_file": b"no picture"}, "cannot read the picture: it is not a picture in a format that Pillow knows"),
        ({"image_file": b"/etc/hostname"}, "cannot read the picture: it is not a picture in a format"),
        ({"image": np.zeros((5, 5, 5), np.uint8)}, "cannot read an array of shape [5, 5, 5]"),
        ({"image": np.zeros((4, 4, 3), np.uint8), "image_file": b""}, "two pictures were given"),
        ({"image": np.zeros((4, 4), np.uint8)}, "unexpected shape for input 'image'"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, "'image'"),
        ({"image": np.zeros((4, 4, 3), np.uint8), "frames": 3}, "'frames'"),
        ({"image": np.zeros((4, 4, 3), np.uint8), "fps": np.array([1, 2])}, "'fps'"),
    ],
)
def test_requests_that_cannot_be_read_are_refused(
    tensors: dict[str, Any], words: str, stream: Stream, png: bytes
) -> None:
    answer = stream.finish(stream.request("tiny", **tensors))
    assert words in str(answer.error)
    assert stream.finish(stream.request("tiny", image_file=png, **FAST)).error is None, "the instance is still there"


FAST = {"num_inference_steps": 1, "num_frames": 2}


def begun(stream: Stream, png: bytes) -> Answer:
    """A request of hours whose first frame arrived."""
    answer = stream.request("tiny", image_file=png, **FAST, **LONG)
    while not answer.frames:
        stream.take()
    assert answer.error is None
    return answer


def test_a_cancelled_request_makes_room(server: Server, png: bytes) -> None:
    with Stream(server) as cancelled:
        begun(cancelled, png)
    with Stream(server) as stream:
        answer = stream.finish(stream.request("tiny", image_file=png, **FAST))
    assert (answer.error, len(answer.frames)) == (None, 2)


def test_a_client_that_is_killed_makes_room(
    server: Server, models: Path, python: Path, png: bytes, picture_file: Path
) -> None:
    arguments = [f"{name}={value}" for name, value in (FAST | LONG).items()]
    command = [python, models / "tiny/client.py", picture_file, "--server", server.grpc, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as client:
        assert client.stderr is not None
        assert client.stderr.readline() == "frame 1 of 10002\n"
        client.send_signal(signal.SIGKILL)
    with Stream(server) as stream:
        assert len(stream.finish(stream.request("tiny", image_file=png, **FAST)).frames) == 2


def test_a_full_queue_refuses_and_the_others_are_answered(server: Server, png: bytes) -> None:
    """One is made and two wait; the other model is not full."""
    with Stream(server) as waiting, Stream(server) as other:
        with Stream(server) as first:
            begun(first, png)
            queued = [waiting.request("tiny", image_file=png, **FAST) for _ in range(2)]
            refused = waiting.finish(waiting.request("tiny", image_file=png, **FAST))
            assert "Exceeds maximum queue size" in str(refused.error)
            assert not any(answer.ended for answer in queued)
            assert len(other.finish(other.request("small", image_file=png, **FAST)).frames) == 2
        for answer in queued:
            assert (waiting.finish(answer).error, len(answer.frames)) == (None, 2)


def test_the_example_makes_a_video(
    server: Server, models: Path, python: Path, bundles: dict[str, Path], picture_file: Path, tmp_path: Path
) -> None:
    arguments = {"seed": 5, "num_inference_steps": 2}
    expected = infer(python, bundles["tiny"], picture_file, tmp_path / "frames.npy", arguments)
    words = [f"{name}={value}" for name, value in arguments.items()]
    command = [python, models / "tiny/client.py", picture_file, "-o", tmp_path / "v.webp", "--server", server.grpc]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'v.webp'}: 8 frames, seed 5" in done.stderr
    with PIL.Image.open(tmp_path / "v.webp") as video:
        frames = [np.asarray(frame.convert("RGB")) for frame in PIL.ImageSequence.Iterator(video)]
    assert np.array_equal(frames, expected)
    refused = subprocess.run([*command, "fps=0"], capture_output=True, text=True, check=False, timeout=120)
    assert (refused.returncode, refused.stderr) == (1, "fps must be 1 to 1000, not 0\n")


def test_a_damaged_bundle_is_not_served(python: Path, small_bundle: Path, tmp_path: Path) -> None:
    assert invoke("triton", small_bundle, "-o", tmp_path / "models", "--name", "m", "--copy").returncode == 0
    weights = tmp_path / "models/m/1/bundle/onnx/denoiser.onnx.data"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    with (
        pytest.raises(AssertionError, match=r"denoiser\.onnx\.data"),
        serving(python, tmp_path / "models", tmp_path / "log"),
    ):
        pass


def test_two_instances_make_two_videos_at_the_same_time(
    python: Path, small_bundle: Path, png: bytes, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    assert invoke("triton", small_bundle, "-o", models, "--name", "tiny", "--instances", "2").returncode == 0
    with serving(python, models, tmp_path / "log") as server, Stream(server) as one, Stream(server) as other:
        begun(one, png)
        begun(other, png)


def test_plain_http_cannot_ask(server: Server, png: bytes) -> None:
    """The documents say so: answers of several parts need a stream."""
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(server.grpc) as client:
        tensor = triton.InferInput("image_file", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([png], np.object_))
        with pytest.raises(InferenceServerException, match="decoupled"):
            client.infer("tiny", [tensor])
