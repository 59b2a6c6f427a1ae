"""Several videos in one generation: each group is finished before the next begins, with the frames of one run."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.errors import ArgumentError
from svd_trt.runtime.decode import ChunkedDecode
from svd_trt.runtime.noise import TorchGenerator

FAST: dict[str, Any] = {"num_frames": 3, "num_inference_steps": 2, "height": 48, "width": 64, "seed": 1}


def test_a_group_is_decoded_before_the_next_is_denoised(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    """The bundle takes two videos together, so five are three groups."""
    calls: list[tuple[str, float, float]] = []
    stream = dynamic_pipe.stream(
        picture, num_videos_per_prompt=5, progress=lambda *call: calls.append(call), decode_chunk_size=3, **FAST
    )
    next(stream)
    assert [call for call in calls if call[0] == "denoise"] == [("denoise", done, 6) for done in range(3)]
    taken = 1 + sum(1 for _ in stream)
    assert taken == 15
    stages = [stage for stage, _ in groupby(calls, lambda call: call[0])]
    assert stages == ["encode", *["denoise", "decode"] * 3]
    for stage, total in (("denoise", 6), ("decode", 15)):
        done = [(call[1], call[2]) for call in calls if call[0] == stage]
        step = 1 if stage == "denoise" else 3
        assert done == [(n, total) for n in range(0, total + 1, step)], "each stage counts over all videos"
    assert len(stream.timings["steps"]) == 6


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 9], ids=lambda chunk: f"chunks-of-{chunk}")
def test_chunks_continue_over_groups_as_if_all_videos_were_decoded_at_once(
    chunk: int, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    """As in diffusers. Here five videos of three frames are groups of 6, 6 and 3 frames."""
    arguments = FAST | {"num_videos_per_prompt": 5, "decode_chunk_size": chunk}
    latents = dynamic_pipe(picture, output_type="latent", **arguments).frames
    assert latents.shape == (5, 3, 4, 6, 8)
    frames = dynamic_pipe(picture, output_type="np", **arguments).frames
    executor = dynamic_pipe.executor
    sizes = [min(chunk, 15 - start) for start in range(0, 15, chunk)]
    flat = latents.reshape(15, 4, 6, 8)
    decoder = partial(executor.session, "vae_decoder")
    with ChunkedDecode(executor.device, decoder, flat, sizes, (48, 64), lambda _: None) as decode:
        whole = np.concatenate(list(decode))
    np.testing.assert_array_equal(frames.reshape(whole.shape), whole)


def test_pictures_are_encoded_with_the_noise_of_one_draw() -> None:
    """torch draws all pictures' noise at once, and the runtime draws it for each group of pictures."""
    whole = TorchGenerator(3).randn((5, 3, 40, 56))
    source = TorchGenerator(3)
    parts = [source.randn((n, 3, 40, 56)) for n in (2, 2, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    other = TorchGenerator(3)
    other.randn((5, 3, 40, 56))
    np.testing.assert_array_equal(source.randn((7,)), other.randn((7,)))


def test_another_video_may_be_made_between_two_groups(dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    """It has other sizes and another plan, so the stream makes the loop's memory again."""
    with VideoPipeline.open(dynamic_bundle) as pipe:
        several: Any = FAST | {"num_videos_per_prompt": 3, "decode_chunk_size": 3}
        expected = list(pipe.stream(picture, **several))
        stream = pipe.stream(picture, **several)
        frames = [next(stream) for _ in range(6)]
        pipe(picture, **(FAST | {"height": 72, "width": 96, "decode_chunk_size": 1}))
        np.testing.assert_array_equal([*frames, *stream], expected)


def test_a_callback_sees_every_group(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    seen = []

    def look(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> None:
        seen.append((step, len(values["latents"])))

    dynamic_pipe(picture, num_videos_per_prompt=3, callback_on_step_end=look, **FAST)
    assert seen == [(0, 2), (1, 2), (0, 1), (1, 1)]


def test_latents_of_torch_are_taken_with_a_gradient_and_in_any_float_type(
    dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    import torch

    start = torch.randn((2, 3, 4, 6, 8), generator=torch.Generator().manual_seed(0)).bfloat16()
    arguments: Any = FAST | {"output_type": "latent", "num_videos_per_prompt": 2}
    expected = dynamic_pipe(picture, latents=start.float().numpy(), **arguments).frames
    for given in (start, start.float().requires_grad_(), list(start.requires_grad_())):
        np.testing.assert_array_equal(dynamic_pipe(picture, latents=given, **arguments).frames, expected)

    def as_tensor(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.from_numpy(values["latents"]).requires_grad_()}

    changed = dynamic_pipe(picture, latents=start, callback_on_step_end=as_tensor, **arguments)
    np.testing.assert_array_equal(changed.frames, expected)
    with pytest.raises(ArgumentError, match="latents must be an array of numbers"):
        dynamic_pipe(picture, latents=[start[0], "x"], **arguments)  # type: ignore[arg-type]
