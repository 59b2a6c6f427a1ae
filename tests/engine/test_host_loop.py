"""The loop of docs/bundle.md, run from ``manifest.json`` as a host in another language would: JSON and ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.runtime.noise import TorchGenerator
from svd_trt.runtime.preprocess import clip_pixels, vae_image

Array = npt.NDArray[Any]


class Host:
    """A host that knows nothing of a bundle but its folder. Noise and pictures have tests of their own."""

    def __init__(self, path: Path) -> None:
        self.manifest = json.loads((path / "manifest.json").read_bytes())
        self.networks = {
            name: onnxruntime.InferenceSession(path / entry["onnx"]["graph"]["path"])
            for name, entry in self.manifest["networks"].items()
        }

    def run(self, name: str, **inputs: Array) -> list[Array]:
        names = [tensor["name"] for tensor in self.manifest["networks"][name]["spec"]["inputs"]]
        assert set(names) == set(inputs)
        outputs: list[Array] = self.networks[name].run(None, inputs)
        return outputs

    def sigmas(self, steps: int) -> Array:
        sampler = self.manifest["sampler"]
        assert (sampler["schedule"], sampler["solver"]) == ("karras", "euler")
        rho = sampler["rho"]
        t = np.arange(steps) / max(steps - 1, 1)
        high, low = sampler["sigma_max"] ** (1 / rho), sampler["sigma_min"] ** (1 / rho)
        return np.append((high + t * (low - high)) ** rho, sampler["final_sigma"]).astype(np.float32)

    def coefficients(self, s: float, n: float) -> Array:
        values = {
            "c_in": 1 / np.sqrt(s**2 + 1),
            "c_noise": np.log(s) / 4,
            "c_skip": 1 / (s**2 + 1),
            "c_out": -s / np.sqrt(s**2 + 1),
            "latents_weight": n / s,
            "denoised_weight": 1 - n / s,
            "previous_denoised_weight": 0,
        }
        return np.array([values[name] for name in self.manifest["host"]["coefficients"]], np.float32)

    def video(self, picture: PIL.Image.Image, **given: Any) -> Array:
        host, ranges, model = (self.manifest[name] for name in ("host", "ranges", "model"))
        args = {name: argument["default"] for name, argument in host["arguments"].items()} | given
        sizes = {"batch": 1, "pictures": 1, "frames": args["num_frames"]}
        sizes |= {"height": args["height"], "width": args["width"]}
        assert host["noise"]["generator"] == "torch-cpu-mt19937"
        generator, noise = TorchGenerator(args["seed"]), {}
        for draw in host["noise"]["draws"]:
            shape = [a if isinstance(a, int) else sizes[a["symbol"]] // a["divisor"] for a in draw["shape"]]
            noise[draw["name"]] = generator.randn(shape, draw["dtype"]).astype(np.float32)
        sigmas = self.sigmas(args["num_inference_steps"])
        scales = {"sigma": sigmas[0], "sqrt(sigma^2 + 1)": np.sqrt(sigmas[0] ** 2 + 1)}
        latents = noise["latents"] * np.float32(scales[host["noise"]["initial_scale"]])
        pixels = clip_pixels(picture, mean=model["image_mean"], std=model["image_std"])[None]
        (embeds,) = self.run("image_encoder", pixels=pixels)
        image = vae_image(picture, args["height"], args["width"])[None]
        image += np.float32(args[host["picture"]["image_noise"]]) * noise["image_noise"]
        (image_latents,) = self.run("vae_encoder", image=image)
        times = np.array([[args[c["argument"]] + c["add"] for c in host["conditions"]]], np.float32)
        guidance = host["guidance"]
        ends = args[guidance["first_frame"]], args[guidance["last_frame"]]
        t = np.linspace(0, 1, args["num_frames"])
        place = {"linear": t, "constant": np.ones_like(t), "triangular": 1 - np.abs(2 * t - 1)}[args["guidance_shape"]]
        scale = ends[0] + place * (ends[1] - ends[0])
        largest = ends[1] if args["guidance_shape"] == "constant" else max(ends)
        guided = [(b["conditioned"], b["constant"] + b["factor"] * scale) for b in guidance["branches"]]
        low, high = args["guidance_interval"] or (0, np.inf)
        skip = host["coefficients"].index("c_skip")
        previous, since, before = np.zeros_like(latents), 0, -1
        features: list[list[Array]] = []
        for s, n in zip(sigmas[:-1].astype(float), sigmas[1:].astype(float), strict=True):
            partial = np.zeros_like(latents)
            has_guidance = largest > guidance["off_up_to"] and np.float32(low) < s <= np.float32(high)
            branches = guided if has_guidance else [(True, np.ones_like(scale))]
            since = 0 if len(branches) != before else since + 1
            deep, before = since % args["deep_every"] == 0, len(branches)
            passes = [branches] if ranges["branches"]["max"] > 1 else [[branch] for branch in branches]
            for number, branch in enumerate(passes):
                row = self.coefficients(s, n)
                row[skip] *= number == len(passes) - 1
                following, partial, *kept = self.run(
                    "denoiser" if deep else "shallow_denoiser",
                    latents=latents,
                    previous_denoised=previous,
                    partial_denoised=partial,
                    image_latents=np.stack([image_latents * conditioned for conditioned, _ in branch]),
                    image_embeds=np.stack([embeds * conditioned for conditioned, _ in branch]),
                    added_time_ids=times,
                    guidance=np.stack([weight for _, weight in branch]).astype(np.float32),
                    coefficients=row,
                    **({} if deep else {"deep_features": features[number][0]}),
                )
                if deep:
                    features[number:] = [kept]
            latents, previous = following, partial
        chunk = args["decode_chunk_size"]
        return np.concatenate(
            [self.run("vae_decoder", latents=part)[0] for part in np.split(latents[0], range(chunk, len(scale), chunk))]
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_inference_steps": 3, "seed": 7, "decode_chunk_size": 3},
        {"num_inference_steps": 2, "seed": 2**40 + 1, "fps": 12, "motion_bucket_id": 200, "decode_chunk_size": 2},
        {"num_inference_steps": 2, "seed": 1, "max_guidance_scale": 1.0, "decode_chunk_size": 3},
        {"num_inference_steps": 2, "seed": 3, "noise_aug_strength": 0.5, "min_guidance_scale": 2.0},
        {"num_inference_steps": 3, "seed": 4, "guidance_interval": (0.5, 50), "guidance_shape": "triangular"},
        {"num_inference_steps": 2, "seed": 5, "guidance_interval": (1, 700), "guidance_shape": "constant"},
    ],
    ids=["guided", "conditions", "unguided", "noise", "an interval, triangular", "an interval, constant"],
)
def test_a_host_gets_the_frames_of_this_runtime(
    arguments: dict[str, Any], small_bundle: Path, picture: PIL.Image.Image
) -> None:
    arguments = {"num_frames": 4, "decode_chunk_size": 4} | arguments
    with VideoPipeline.open(small_bundle) as pipe:
        wanted = pipe(picture, output_type="np", resize_mode="stretch", **arguments).frames[0]
    frames = Host(small_bundle).video(picture, **arguments)
    assert np.abs(frames.astype(int) - wanted).max() <= 1


def test_a_host_of_a_bundle_with_symbolic_sizes(dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    arguments = {"num_frames": 3, "decode_chunk_size": 2, "num_inference_steps": 2, "seed": 5}
    arguments |= {"height": 48, "width": 64}
    with VideoPipeline.open(dynamic_bundle) as pipe:
        wanted = pipe(picture, output_type="np", resize_mode="stretch", **arguments).frames[0]  # type: ignore[arg-type]
    assert np.abs(Host(dynamic_bundle.path).video(picture, **arguments).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"deep_every": 2},
        {"deep_every": 3, "max_guidance_scale": 1.0},
        {"deep_every": 9, "num_inference_steps": 3},
        {"deep_every": 2, "num_inference_steps": 8, "guidance_interval": (0.1, 300)},
        {},
    ],
    ids=["every second", "unguided", "the first alone", "an interval", "all"],
)
def test_a_host_of_a_bundle_with_a_shallow_denoiser(
    arguments: dict[str, Any], shallow_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    arguments = {"num_frames": 4, "decode_chunk_size": 4, "num_inference_steps": 5, "seed": 6} | arguments
    with VideoPipeline.open(shallow_bundle) as pipe:
        wanted = pipe(picture, output_type="latent", resize_mode="stretch", **arguments).frames[0]
        frames = pipe(picture, output_type="np", resize_mode="stretch", **arguments).frames[0]
        whole = pipe(picture, output_type="latent", resize_mode="stretch", **(arguments | {"deep_every": 1})).frames[0]
    host = Host(shallow_bundle.path)
    assert np.abs(host.video(picture, **arguments).astype(int) - frames).max() <= 1
    reused = np.abs(wanted - whole).max()
    assert (reused > 1e-3) == (arguments.get("deep_every", 1) > 1)
