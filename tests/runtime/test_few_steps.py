"""``sampler="lcm"`` against AnimateLCM-SVD's scheduler, written here from its formulas, in diffusers' pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from svd_trt import VideoPipeline
from svd_trt.errors import ArgumentError
from svd_trt.export.fidelity import psnr
from svd_trt.runtime import preparation
from svd_trt.runtime.samplers import lcm, noisy_steps
from svd_trt.runtime.schedules import lcm_sigmas

FAST: dict[str, Any] = {"num_frames": 3, "num_inference_steps": 4, "height": 72, "width": 96, "max_guidance_scale": 1.5}


class Consistency:
    """AnimateLCM-SVD's scheduler. Without ``generator``, it draws from torch's own, which the pipeline's may be."""

    order = 1
    init_noise_sigma = math.sqrt(700.0**2 + 1)
    config = SimpleNamespace()
    generator: Any = None

    def set_timesteps(self, count: int, device: Any = None, sigmas: Any = None) -> None:
        first, last = 700 ** (1 / 7), 0.002 ** (1 / 7)
        self.sigmas = [(first + i * (40 // count) / 39 * (last - first)) ** 7 for i in range(count)] + [0.0]
        self.timesteps = torch.tensor([0.25 * math.log(s) for s in self.sigmas[:-1]])
        self.index = 0

    def scale_model_input(self, sample: Any, timestep: Any) -> Any:
        return sample / math.sqrt(self.sigmas[self.index] ** 2 + 1)

    def step(self, output: Any, timestep: Any, sample: Any) -> Any:
        sigma, following = self.sigmas[self.index], self.sigmas[self.index + 1]
        self.index += 1
        denoised = sample / (sigma**2 + 1) - output * sigma / math.sqrt(sigma**2 + 1)
        if following > 0:
            denoised = denoised + following * randn_tensor(denoised.shape, generator=self.generator)
        return SimpleNamespace(prev_sample=denoised)


@pytest.fixture(scope="module")
def by_diffusers(reference: Any) -> Iterator[Any]:
    euler = reference.scheduler
    reference.scheduler = Consistency()
    yield reference
    reference.scheduler = euler


@pytest.mark.parametrize(
    ("steps", "levels"),
    [(1, [700]), (2, [700, 13.678]), (4, [700, 128.56, 13.678, 0.49688]), (3, [700, 70.541, 2.2691])],
)
def test_levels_are_those_of_animatelcm(steps: int, levels: list[float]) -> None:
    """Those of 4 steps are known; 40 // 3 is 13."""
    np.testing.assert_allclose(lcm_sigmas(steps), [*levels, 0], rtol=1e-4)


def test_every_step_is_the_schedulers() -> None:
    theirs = Consistency()
    theirs.set_timesteps(8)
    sigmas = lcm_sigmas(8)
    np.testing.assert_allclose(sigmas, theirs.sigmas, rtol=1e-6)
    assert noisy_steps("lcm", sigmas.tolist()) == 7
    assert noisy_steps("euler", sigmas.tolist()) == 0
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn((2, 3, 4, 6, 8), generator=draw) * theirs.init_noise_sigma
    for (c_in, c_noise, c_skip, c_out, a, b, c), timestep in zip(lcm(sigmas), theirs.timesteps, strict=True):
        prediction = torch.randn(latents.shape, generator=draw)
        torch.testing.assert_close(latents * c_in, theirs.scale_model_input(latents, timestep), rtol=2e-6, atol=1e-6)
        assert c_noise == pytest.approx(float(timestep), rel=1e-5)
        torch.manual_seed(7)
        following = theirs.step(prediction, timestep, latents).prev_sample
        torch.manual_seed(7)
        noise = torch.randn(latents.shape)
        denoised = c_skip * latents + c_out * prediction
        torch.testing.assert_close(a * latents + b * denoised + c * noise, following, rtol=1e-5, atol=1e-4)
        latents = following


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"num_inference_steps": 1},
        {"num_inference_steps": 2, "max_guidance_scale": 1.0},
        {"num_inference_steps": 8, "num_frames": 2},
        {"num_videos_per_prompt": 3, "decode_chunk_size": 3},
    ],
    ids=["4-steps", "1-step", "2-steps-unguided", "8-steps", "3-videos-in-2-groups"],
)
def test_videos_are_those_of_the_scheduler(
    case: dict[str, Any], dynamic_pipe: VideoPipeline, by_diffusers: Any, picture: PIL.Image.Image, record_property: Any
) -> None:
    """Noise of the pictures, of the latents, and of each step for all videos: one stream, in this order."""
    options = FAST | case
    ours = dynamic_pipe(picture, seed=5, sampler="lcm", output_type="np", **options).frames
    theirs = by_diffusers(picture, generator=torch.manual_seed(5), output_type="np", **options).frames
    value = psnr(ours, (theirs * 255).round().astype(np.uint8))
    record_property("psnr_db", value)
    assert theirs.std() > 0.02
    assert value >= 75


def test_a_callback_may_replace_the_latents(
    dynamic_pipe: VideoPipeline, by_diffusers: Any, picture: PIL.Image.Image
) -> None:
    """The next step starts from them, and its noise stays that of the step."""

    def halve(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * 0.5} if step < 2 else {}

    ours = dynamic_pipe(picture, seed=5, sampler="lcm", output_type="np", callback_on_step_end=halve, **FAST).frames
    theirs = by_diffusers(
        picture, generator=torch.manual_seed(5), output_type="np", callback_on_step_end=halve, **FAST
    ).frames
    plain = dynamic_pipe(picture, seed=5, sampler="lcm", output_type="np", **FAST).frames
    assert psnr(ours, (theirs * 255).round().astype(np.uint8)) >= 75
    assert psnr(ours, plain) < 50


def test_each_video_may_have_a_seed(
    dynamic_pipe: VideoPipeline, by_diffusers: Any, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = FAST | {"num_videos_per_prompt": 2, "output_type": "np"}
    ours = dynamic_pipe(picture, seed=[3, 4], sampler="lcm", **options).frames
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    monkeypatch.setattr(by_diffusers.scheduler, "generator", generators)
    theirs = by_diffusers(picture, generator=generators, **options).frames
    assert psnr(ours, (theirs * 255).round().astype(np.uint8)) >= 75


def test_a_generator_is_left_after_the_last_noise(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    generator = torch.Generator().manual_seed(4)
    dynamic_pipe(picture, generator=generator, sampler="lcm", output_type="latent", **FAST)
    expected = torch.Generator().manual_seed(4)
    torch.randn((1, 3, 72, 96), generator=expected)
    for _ in range(4):  # the start, and the three steps that do not end at 0
        torch.randn((1, 3, 4, 9, 12), generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_given_latents_take_no_draw(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    source = torch.Generator().manual_seed(4)
    torch.randn((1, 3, 72, 96), generator=source)
    start = np.ones((1, 3, 4, 9, 12), np.float32)
    generator = torch.Generator().manual_seed(4)
    options: dict[str, Any] = FAST | {"num_inference_steps": 2, "sampler": "lcm", "latents": start}
    dynamic_pipe(picture, generator=generator, **options)
    torch.randn(start.shape, generator=source)
    assert torch.equal(generator.get_state(), source.get_state())


def test_a_later_video_of_another_sampler_is_not_touched(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    """The noise is in the memory that a multistep sampler reads in its first step."""
    options: dict[str, Any] = FAST | {"output_type": "latent", "seed": 1}
    before = dynamic_pipe(picture, sampler="dpmpp-2m", **options).frames
    dynamic_pipe(picture, sampler="lcm", **options)
    np.testing.assert_array_equal(dynamic_pipe(picture, sampler="dpmpp-2m", **options).frames, before)


@pytest.mark.parametrize("arguments", [{"num_inference_steps": 41}, {"sigmas": range(41, -1, -1)}], ids=str)
def test_too_many_steps_are_refused(
    arguments: dict[str, Any], dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    with pytest.raises(ArgumentError, match="at most 40 with the sampler lcm, not 41; a few-step UNet needs 1 to 8"):
        dynamic_pipe.stream(picture, sampler="lcm", **arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_inference_steps": 4, "max_guidance_scale": 1.5}, None),
        ({"num_inference_steps": 4}, "this video has 4 steps and guidance up to 3"),
        ({"max_guidance_scale": 1.0}, "this video has 25 steps and guidance up to 1"),
    ],
)
def test_arguments_that_few_step_models_were_not_made_for_are_said(
    arguments: dict[str, Any],
    said: str | None,
    dynamic_pipe: VideoPipeline,
    picture: PIL.Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(preparation._log, "warning", messages.append)
    dynamic_pipe.stream(picture, sampler="lcm", resize_mode="stretch", num_frames=4, **arguments)
    assert [said is not None and said in message for message in messages] == ([True] if said else [])
