"""What users of diffusers type, against diffusers' own pipeline, and what is refused with what to use instead."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from svd_trt import VideoPipeline
from svd_trt.errors import ArgumentError, MissingDependencyError
from svd_trt.runtime import diffusers_call, output
from svd_trt.runtime.parameters import Parameters
from svd_trt.runtime.video import read_metadata

FAST: dict[str, Any] = {"num_frames": 3, "num_inference_steps": 2, "height": 48, "width": 64}


def generators(*seeds: int) -> list[Any]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def turned(picture: PIL.Image.Image) -> PIL.Image.Image:
    return picture.transpose(PIL.Image.Transpose.ROTATE_180)


@pytest.mark.parametrize(("pictures", "each"), [(1, 3), (2, 1)], ids=["three-of-one", "one-of-each-of-two"])
def test_a_list_of_generators_gives_what_diffusers_gives(
    pictures: int, each: int, dynamic_pipe: VideoPipeline, reference: Any, picture: PIL.Image.Image
) -> None:
    """Each generator draws its video's noise, and the first ones that of the pictures."""
    images, seeds = [picture, turned(picture)][:pictures], [*range(1, pictures * each + 1)]
    options: dict[str, Any] = FAST | {"num_videos_per_prompt": each, "num_inference_steps": 1, "output_type": "latent"}
    ours, theirs = generators(*seeds), generators(*seeds)
    latents = dynamic_pipe(images, generator=ours, **options).frames
    expected = reference(images, generator=theirs, **options).frames.numpy()
    np.testing.assert_allclose(latents, expected, atol=2e-4)
    assert len({video.tobytes() for video in latents}) == len(seeds)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.get_state(), other.get_state())
    seeded = dynamic_pipe(images, seed=seeds, **options)
    np.testing.assert_array_equal(seeded.frames, latents)
    assert seeded.parameters.seed == tuple(seeds)


def test_one_generator_for_two_pictures_ends_as_in_diffusers(
    dynamic_pipe: VideoPipeline, reference: Any, picture: PIL.Image.Image
) -> None:
    images, options = [picture, turned(picture)], FAST | {"num_inference_steps": 1, "output_type": "latent"}
    (ours,), (theirs,) = generators(9), generators(9)
    for _ in range(2):  # the second time from a state that no seed gives
        mine = dynamic_pipe(images, generator=ours, **options)
        other = reference(images, generator=theirs, **options)
        np.testing.assert_allclose(mine.frames, other.frames.numpy(), atol=2e-4)
        assert torch.equal(ours.get_state(), theirs.get_state())
    assert mine.parameters.seed is None
    assert mine.metadata["seed"] is None


def test_latents_leave_the_generator_to_the_picture(
    dynamic_pipe: VideoPipeline, reference: Any, picture: PIL.Image.Image
) -> None:
    start = torch.randn((1, 3, 4, 6, 8), generator=generators(1)[0])
    (ours,), (theirs,) = generators(9), generators(9)
    options = FAST | {"num_inference_steps": 1, "output_type": "latent"}
    mine = dynamic_pipe(picture, generator=ours, latents=start, **options).frames
    other = reference(picture, generator=theirs, latents=start, **options).frames
    np.testing.assert_allclose(mine, other.numpy(), atol=2e-4)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_each_seed_of_a_list_gives_its_video(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    images = [picture, turned(picture), picture]
    together = dynamic_pipe(images, seed=np.array([5, 6, 2**32 + 5]), output_type="np", **FAST)
    assert (
        together.parameters.as_dict()["seed"] == json.loads(json.dumps(together.metadata))["seed"] == [5, 6, 2**32 + 5]
    )
    for image, seed, video in zip(images, (5, 6, 5), together.frames, strict=True):
        alone = dynamic_pipe(image, seed=seed, output_type="np", **FAST).frames[0]
        np.testing.assert_allclose(video.astype(int), alone, atol=1)


def test_a_stream_advances_the_generator_when_it_is_made(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    (generator,), (other,) = generators(4), generators(4)
    streams = [dynamic_pipe.stream(picture, generator=generator, **FAST) for _ in range(2)]
    calls = [dynamic_pipe(picture, generator=other, output_type="np", **FAST).frames[0] for _ in range(2)]
    for stream, call in reversed(list(zip(streams, calls, strict=True))):
        np.testing.assert_array_equal(np.stack(list(stream)), call)
    assert streams[0].parameters.seed == 4
    assert streams[1].parameters.seed is None


def test_a_refused_call_leaves_the_generator(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    (generator,) = generators(4)
    before = generator.get_state()
    for wrong in ({"num_frames": 99}, {"decode_chunk_size": 0}, {"seed": 4}, {"latents": [1]}):
        with pytest.raises(ArgumentError):
            dynamic_pipe(picture, generator=generator, **(FAST | wrong))
    assert torch.equal(generator.get_state(), before)


def test_arguments_by_position_are_in_diffusers_order(
    dynamic_pipe: VideoPipeline, reference: Any, picture: PIL.Image.Image
) -> None:
    theirs = list(inspect.signature(type(reference).__call__).parameters)
    assert ["self", "image", *diffusers_call._ORDER] == theirs
    named = dynamic_pipe(picture, output_type="np", seed=3, sigmas=[700.0, 5.0, 0.0], fps=9, **FAST)
    size = (FAST["height"], FAST["width"], FAST["num_frames"], FAST["num_inference_steps"])
    placed = dynamic_pipe(picture, *size, [700.0, 5.0, 0.0], 1.0, 3.0, 9, output_type="np", seed=3)
    np.testing.assert_array_equal(placed.frames, named.frames)
    assert placed.parameters == named.parameters
    (generator,) = generators(3)
    rest = ([700.0, 5.0, 0.0], 1.0, 3.0, 9, 127, 0.02, None, 1, generator, None, "np", None, ["latents"], False)
    np.testing.assert_array_equal(dynamic_pipe(picture, *size, *rest), named.frames)
    with pytest.raises(TypeError, match="height was given by position and by name"):
        dynamic_pipe(picture, 48, height=48)
    with pytest.raises(TypeError, match="generator was given by position and by name"):
        dynamic_pipe(picture, *size, *rest, generator=generator)
    with pytest.raises(TypeError, match="at most 19 arguments are given by position, not 20"):
        dynamic_pipe(picture, *size, *rest, 1)


def test_the_output_is_read_as_that_of_diffusers(
    dynamic_pipe: VideoPipeline, reference: Any, picture: PIL.Image.Image, tmp_path: Path
) -> None:
    options = FAST | {"output_type": "pt"}
    (ours,), (theirs,) = generators(1), generators(1)
    tensor = dynamic_pipe(picture, generator=ours, **options)
    other = reference(picture, generator=theirs, **options)
    assert tensor.frames.dtype == other.frames.dtype == torch.float32
    assert tensor.frames.shape == other.frames.shape == (1, 3, 3, 48, 64)
    assert float((tensor.frames - other.frames).abs().mean()) < 0.005
    assert tensor[0] is tensor["frames"] is tensor.frames
    assert tensor.to_tuple() == (tensor.frames,)
    with pytest.raises(KeyError):
        tensor["nsfw_content_detected"]
    array = dynamic_pipe(picture, seed=1, output_type="np", **FAST)
    np.testing.assert_array_equal(tensor.frames.numpy(), array.frames.transpose(0, 1, 4, 2, 3).astype(np.float32) / 255)
    tensor.save(tmp_path / "pt.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "pt.npy"), array.frames[0])
    plain, theirs_plain = (
        pipe(picture, generator=generators(1)[0], return_dict=False, **FAST) for pipe in (dynamic_pipe, reference)
    )
    assert isinstance(plain, list)
    assert isinstance(theirs_plain, list)
    assert [np.asarray(frame).tolist() for frame in plain[0]] == array.frames[0].tolist()


def test_pt_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(output.importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"output_type 'pt' needs .*pip install 'svd-trt\[export\]'"):
        output.converter("pt")


def test_callbacks_get_the_tensors_that_they_ask_for(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    seen: list[Any] = []

    def look(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(list(values))
        return values

    for names in (["latents"], ("latents",), []):
        dynamic_pipe(picture, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names, **FAST)
    assert seen == [["latents"]] * 4 + [[]] * 2
    for wrong in (["noise_pred"], ["latents", "image_latents"], "latents"):
        with pytest.raises(ArgumentError, match=r"callback_on_step_end_tensor_inputs is \['latents'\] or empty, not"):
            dynamic_pipe(picture, callback_on_step_end_tensor_inputs=wrong, **FAST)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("guidance_scale", "use min_guidance_scale= and max_guidance_scale="),
        ("num_inference_step", "use num_inference_steps="),
        ("output_typ", "use output_type="),
        ("generators", "use generator="),
        ("timesteps", "use schedule= or sigmas="),
        ("manual_seed", "use seed="),
        ("prompt", "SVD takes a picture and no text"),
        ("xyz", "known are background, .*height"),
    ],
)
def test_unknown_arguments_say_what_to_use_instead(name: str, advice: str, dynamic_pipe: VideoPipeline) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; {advice}"):
        dynamic_pipe("p.png", **{name: 1})
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; {advice}"):
        dynamic_pipe.stream("p.png", **{name: 1})


def test_a_stream_says_that_some_arguments_are_for_a_call(dynamic_pipe: VideoPipeline) -> None:
    with pytest.raises(TypeError, match=r"return_dict is for a call; a stream yields frames, uint8 \[H, W, 3\] each"):
        dynamic_pipe.stream("p.png", return_dict=False)  # type: ignore[call-arg]
    for make in (dynamic_pipe.stream, dynamic_pipe.astream):
        with pytest.raises(ArgumentError, match="output_type of a stream must be np or dlpack, not 'pil'"):
            make("p.png", output_type="pil")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"output_type": "float"},
            "pil, np, pt, dlpack or latent, not 'float'; np is uint8 from 0 to 255, pt is float",
        ),
        ({"seed": generators(1)[0]}, "pass a generator of torch as generator="),
        ({"seed": [1, 2]}, "2 seeds were given for 1 video; give one for each video, or one for all"),
        ({"seed": [1, 2], "num_videos_per_prompt": 3}, "2 seeds were given for 3 videos"),
        ({"seed": []}, "seed is an empty list"),
        ({"seed": [1, 2.5], "num_videos_per_prompt": 2}, "each seed must be a whole number, not 2.5"),
        ({"seed": [1, -1], "num_videos_per_prompt": 2}, "each seed must be 0 to 18446744073709551615, not -1"),
        ({"seed": 1, "generator": generators(1)[0]}, "seed and generator were both given"),
        ({"generator": 1}, "pass a number as seed="),
    ],
)
def test_wrong_values_say_what_to_pass(
    wrong: dict[str, Any], message: str, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    with pytest.raises(ArgumentError, match=message):
        dynamic_pipe(picture, **(FAST | wrong))


def test_attributes_of_diffusers_pipeline_say_what_to_use_instead(dynamic_pipe: VideoPipeline, reference: Any) -> None:
    for name in diffusers_call._ATTRIBUTES:
        assert hasattr(reference, name), f"diffusers has no {name}"
        with pytest.raises(AttributeError, match=f"'VideoPipeline' object has no attribute '{name}'; "):
            getattr(dynamic_pipe, name)
    with pytest.raises(AttributeError, match=r"no attribute 'abc'$"):
        dynamic_pipe.abc  # noqa: B018


def test_names_to_use_instead_exist() -> None:
    known = {*Parameters.fields(), *diffusers_call._ORDER}
    assert not known & set(diffusers_call._INSTEAD)
    for advice in diffusers_call._INSTEAD.values():
        for word in advice.split():
            if word.endswith("=") and "(" not in advice:
                assert word.rstrip("=") in known, advice


def test_a_file_says_the_seeds(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image, tmp_path: Path) -> None:
    video = dynamic_pipe(picture, seed=[7, 8], num_videos_per_prompt=2, **FAST)
    for path in video.save(tmp_path / "v.webp"):
        assert read_metadata(path)["seed"] == [7, 8]
    assert dataclasses.asdict(video.parameters)["seed"] == (7, 8)
