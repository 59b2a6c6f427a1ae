"""The Python interface: outputs, streaming, callbacks, inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.errors import ArgumentError, BackendError, OutputError
from svd_trt.runtime.cpu_device import CpuBuffer, CpuDevice, CpuSession
from svd_trt.runtime.device import Buffer, Device, Session, download, upload
from svd_trt.runtime.parameters import ParameterArguments

FAST: ParameterArguments = {"num_frames": 3, "num_inference_steps": 2, "height": 48, "width": 64, "seed": 1}


def test_output_types_give_the_same_video(
    dynamic_pipe: VideoPipeline, picture: PIL.Image.Image, tmp_path: Path
) -> None:
    array = dynamic_pipe(picture, output_type="np", **FAST)
    pictures = dynamic_pipe(picture, **FAST)
    assert array.frames.shape == (1, 3, 48, 64, 3)
    np.testing.assert_array_equal(np.stack([np.asarray(f) for f in pictures.frames[0]]), array.frames[0])
    assert pictures.save(tmp_path / "v.npy") == [str(tmp_path / "v.npy")]
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), array.frames[0])
    latents = dynamic_pipe(picture, output_type="latent", **FAST)
    assert latents.frames.shape == (1, 3, 4, 6, 8)
    with pytest.raises(OutputError, match="latents"):
        latents.save(tmp_path / "l.mp4")


def test_stream_yields_frames_before_later_chunks_are_decoded(
    dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    whole = dynamic_pipe(picture, output_type="np", decode_chunk_size=1, **FAST).frames[0]
    calls: list[tuple[str, int, int]] = []
    stream = dynamic_pipe.stream(
        picture, decode_chunk_size=1, progress=lambda stage, done, total: calls.append((stage, done, total)), **FAST
    )
    assert calls == [], "something ran before the first frame was requested"
    for index, frame in enumerate(stream):
        np.testing.assert_array_equal(frame, whole[index])
        assert calls[-1] == ("decode", index + 1, 3)
    assert [t for t in calls if t[0] == "denoise"] == [("denoise", 0, 2), ("denoise", 1, 2), ("denoise", 2, 2)]
    assert len(stream.timings["steps"]) == 2


def test_every_kind_of_picture_gives_the_same_video(
    dynamic_pipe: VideoPipeline, picture: PIL.Image.Image, picture_file: Path
) -> None:
    wanted = dynamic_pipe(picture, output_type="np", **FAST).frames
    pixels = np.asarray(picture)
    for same in (str(picture_file), picture_file, pixels, pixels / 255.0, [picture]):
        np.testing.assert_array_equal(dynamic_pipe(same, output_type="np", **FAST).frames, wanted)


def test_seed_is_drawn_and_returned(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    unseeded: Any = FAST | {"seed": None}
    first = dynamic_pipe(picture, output_type="np", **unseeded)
    again: Any = FAST | {"seed": first.parameters.seed}
    np.testing.assert_array_equal(dynamic_pipe(picture, output_type="np", **again).frames, first.frames)
    assert dynamic_pipe(picture, output_type="latent", **unseeded).parameters.seed != first.parameters.seed


def test_an_exception_in_a_callback_stops_the_run(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    class EnoughError(Exception):
        pass

    calls = []

    def stop(pipe: VideoPipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        calls.append(step)
        raise EnoughError

    with pytest.raises(EnoughError):
        dynamic_pipe(picture, callback_on_step_end=stop, **FAST)
    assert calls == [0]
    dynamic_pipe(picture, **FAST)  # the pipeline still works


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_frames": 10},
        {"height": 44},
        {"height": 144},
        {"latents": np.zeros((1, 3, 4, 6, 9))},
        {"latents": np.full((1, 3, 4, 6, 8), np.nan)},
        {"output_type": "float"},
        {"seed": -1},
        {"seed": 1.5},
        {"fps": "7"},
        {"fps": True},
        {"num_inference_steps": 10**9},
        {"sigmas": [1.0, 2.0]},
        {"sigmas": []},
        {"sigmas": 5},
        {"latents": "x"},
        {"latents": [[1.0], [1.0, 2.0]]},
        {"sampler": "magic"},
        {"callback_on_step_end": lambda *_: [1]},
        {"callback_on_step_end": lambda *_: {"latents": "x"}},
        {"callback_on_step_end": lambda *_: {"latents": [[1.0], [1.0, 2.0]]}},
        {"callback_on_step_end": 3},
        {"motion_bucket_id": None},
    ],
)
def test_wrong_arguments_are_refused(
    wrong: dict[str, Any], dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    with pytest.raises(ArgumentError):
        dynamic_pipe(picture, **(FAST | wrong))  # type: ignore[arg-type]


def test_values_that_are_not_finite_are_an_error(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    def spoil(pipe: VideoPipeline, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * np.nan}

    with pytest.raises(BackendError, match="not finite"):
        dynamic_pipe(picture, callback_on_step_end=spoil, **FAST)


def test_sigmas_set_the_number_of_steps(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    made = dynamic_pipe(picture, output_type="latent", **(FAST | {"sigmas": [700.0, 5.0, 1.0, 0.0]}))
    assert made.parameters.num_inference_steps == 3
    assert len(made.timings["steps"]) == 3


def test_videos_of_several_pictures_match_single_videos(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    """Embedding and latents of a video are of the same picture, unlike in diffusers."""
    other = picture.transpose(PIL.Image.Transpose.ROTATE_180)
    start = np.random.default_rng(0).standard_normal((4, 3, 4, 6, 8)).astype(np.float32)
    noiseless: Any = FAST | {"noise_aug_strength": 0.0}
    whole = dynamic_pipe([picture, other], num_videos_per_prompt=2, latents=start, output_type="np", **noiseless).frames
    for index, one in enumerate([picture, picture, other, other]):
        alone = dynamic_pipe(one, latents=start[index : index + 1], output_type="np", **noiseless).frames[0]
        assert np.abs(alone.astype(int) - whole[index]).max() <= 1


def test_a_closed_pipeline_raises(dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    pipe = VideoPipeline.open(dynamic_bundle)
    stream = pipe.stream(picture, decode_chunk_size=1, **FAST)
    next(stream)
    pipe.close()
    with pytest.raises(BackendError, match="open"):
        list(stream)
    with pytest.raises(BackendError, match="closed"):
        pipe(picture, **FAST)


def test_unknown_arguments_and_empty_lists_of_pictures_are_refused(
    dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    with pytest.raises(TypeError, match="num_frame"):
        dynamic_pipe(picture, num_frame=3)  # type: ignore[call-arg]
    with pytest.raises(ArgumentError, match="no picture"):
        dynamic_pipe([])


def test_backends_are_chosen_by_name(dynamic_bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="abacus"):
        VideoPipeline.open(dynamic_bundle, backend="abacus")  # type: ignore[arg-type]
    with VideoPipeline.open(dynamic_bundle, backend="onnxruntime") as pipe:
        assert pipe.device.name == "onnxruntime (CPU)"


def test_a_network_that_cannot_be_loaded_leaves_no_folder(
    dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Times of layers are written to one. An error's traceback keeps the session, so no collector removes it."""

    def refuse(*_: Any, **options: Any) -> None:
        assert Path(options["profile_prefix"]).parent.parent == tmp_path
        raise BackendError("refused")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("svd_trt.runtime.cpu_device.load_onnx", refuse)
    device = CpuDevice()
    device.measure_layers({})
    with pytest.raises(BackendError, match="refused") as caught:
        device.open(dynamic_bundle, "image_encoder")
    assert caught.tb is not None
    assert list(tmp_path.iterdir()) == []


def test_the_cpu_device_uploads_runs_captures_and_copies(dynamic_bundle: Bundle) -> None:
    device: Device = CpuDevice()
    session: Session = device.open(dynamic_bundle, "image_encoder")
    assert isinstance(session, CpuSession)
    host = np.random.default_rng(0).random((2, 3, 224, 224), np.float32)
    source: Buffer = upload(device, host, "pixels")
    host[:] = 0
    assert download(device, source).any(), "the upload is not a copy"
    result = device.empty((2, 1, 32), np.float32, "image_embeds")
    session.enqueue({"pixels": source, "image_embeds": result})
    first = download(device, result)
    graph = device.capture(lambda: session.enqueue({"pixels": source, "image_embeds": result}))
    graph()
    np.testing.assert_array_equal(download(device, result), first)
    table = upload(device, np.arange(6, dtype=np.float32).reshape(3, 2), "table")
    row = device.empty((2,), np.float32, "row")
    device.copy(table.rows(1, 2), row)
    assert list(download(device, row)) == [2, 3]
    before, after = device.event(), device.event()
    for event in (before, after):
        event.record()
        event.wait()
    assert after.seconds_since(before) >= 0
    with pytest.raises(BackendError, match="image_encoder"):
        session.enqueue({"pixels": CpuBuffer(np.zeros((2, 3, 9, 9), np.float32)), "image_embeds": result})
    session.close()
    session.close()
