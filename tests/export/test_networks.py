"""Each exported network in ONNX Runtime against diffusers' own modules, at the ends and middle of every range."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from svd_trt import Bundle
from svd_trt.engine.spec import COEFFICIENTS, NETWORKS, NetworkName, NetworkSpec
from svd_trt.runtime.samplers import euler

# Largest difference allowed, by network and precision; frames are in levels of 255.
TOLERANCE: dict[str, dict[NetworkName, float]] = {
    "fp32": {"image_encoder": 5e-6, "vae_encoder": 5e-6, "denoiser": 5e-5, "vae_decoder": 1},
    "fp16": {"image_encoder": 1e-2, "vae_encoder": 5e-6, "denoiser": 2e-2, "vae_decoder": 3},
}
SIGMAS = np.array([700.0, 30.0, 1.0, 0.05, 0.0], np.float32)
END = ("min", "opt", "max")


def sizes_at(spec: NetworkSpec, end: str) -> dict[str, int]:
    return {symbol: getattr(r, end) for symbol, r in spec.ranges.items()}


def draw_inputs(spec: NetworkSpec, sizes: dict[str, int]) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(sum(sizes.values()))
    inputs = {t.name: rng.standard_normal(t.resolve(sizes)).astype(np.float32) for t in spec.inputs}
    if spec.name == "denoiser":
        sigma = SIGMAS[1]
        inputs["latents"] *= sigma
        inputs["previous_denoised"][:] = 0
        inputs["added_time_ids"] = np.tile(np.float32([6, 127, 0.02]), (sizes.get("batch", 1), 1))
        inputs["coefficients"] = euler(SIGMAS)[1]
        scale = np.linspace(1, 3, inputs["guidance"].shape[1], dtype=np.float32)
        inputs["guidance"] = np.stack([1 - scale, scale]) if len(inputs["guidance"]) == 2 else np.ones_like(scale)[None]
    return inputs


@torch.no_grad()
def diffusers_output(pipe: Any, name: NetworkName, x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    if name == "image_encoder":
        return [pipe.image_encoder(x["pixels"]).image_embeds[:, None]]
    if name == "vae_encoder":
        return [pipe.vae.encode(x["image"]).latent_dist.mode()]
    if name == "vae_decoder":
        decoded = pipe.vae.decode(x["latents"] / pipe.vae.config.scaling_factor, num_frames=len(x["latents"])).sample
        return [((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)]
    return _diffusers_step(pipe, x)


def _diffusers_step(pipe: Any, x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The body of diffusers' loop, with its scheduler, on step 1 of SIGMAS."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(sigmas=SIGMAS.tolist())
    timestep = scheduler.timesteps[1]
    predictions = []
    for latents_of, embeds in zip(x["image_latents"], x["image_embeds"], strict=True):
        noisy = scheduler.scale_model_input(x["latents"], timestep)
        condition = latents_of[:, None].repeat(1, noisy.shape[1], 1, 1, 1)
        sample = torch.cat([noisy, condition], dim=2)
        predictions.append(pipe.unet(sample, timestep, embeds, x["added_time_ids"], return_dict=False)[0])
    guided = predictions[0]
    if len(predictions) == 2:
        scale = x["guidance"][1][None, :, None, None, None]
        guided = predictions[0] + scale * (predictions[1] - predictions[0])
    step = scheduler.step(guided, timestep, x["latents"])
    # What another pass gave is part of the denoised latents, and with their weight of the next ones.
    partial, weight = x["partial_denoised"], x["coefficients"][COEFFICIENTS.index("denoised_weight")]
    return [step.prev_sample + weight * partial, step.pred_original_sample + partial]


def largest_difference(bundle: Bundle, name: NetworkName, sizes: dict[str, int], reference: Any) -> float:
    spec = bundle.network(name).spec
    inputs = draw_inputs(spec, sizes)
    session = onnxruntime.InferenceSession(bundle.onnx_path(name), providers=["CPUExecutionProvider"])
    ours = session.run(None, inputs)
    theirs = diffusers_output(reference, name, {k: torch.from_numpy(v) for k, v in inputs.items()})
    assert [o.shape for o in ours] == [t.resolve(sizes) for t in spec.outputs]
    assert all(float(t.std()) > 0.01 for t in theirs), "a flat reference would agree with anything"
    return max(float(np.abs(o.astype(np.float64) - t.numpy()).max()) for o, t in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("end", END)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.xdist_group("dynamic")
def test_fp32_network(
    name: NetworkName, end: str, dynamic_bundle: Bundle, reference: Any, record_property: Any
) -> None:
    sizes = sizes_at(dynamic_bundle.network(name).spec, end)
    difference = largest_difference(dynamic_bundle, name, sizes, reference)
    record_property("largest_difference", difference)
    assert difference <= TOLERANCE["fp32"][name]


@pytest.mark.parametrize("end", END)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.xdist_group("fixed")
def test_fp16_network(name: NetworkName, end: str, fixed_bundle: Bundle, reference: Any, record_property: Any) -> None:
    sizes = sizes_at(fixed_bundle.network(name).spec, end)
    difference = largest_difference(fixed_bundle, name, sizes, reference)
    record_property("largest_difference", difference)
    assert difference <= TOLERANCE["fp16"][name]


@pytest.mark.xdist_group("fixed")
def test_half_precision_keeps_fp32_where_it_matters(fixed_bundle: Bundle) -> None:
    """Softmax and statistics of normalisation, in the rewritten networks of an fp16 bundle."""
    import onnx

    for name in ("denoiser", "vae_decoder"):
        graph = onnx.load(fixed_bundle.onnx_path(name), load_external_data=False).graph  # type: ignore[arg-type]
        made_by = {output: node for node in graph.node for output in node.output}
        kinds = [node.op_type for node in graph.node]
        assert "InstanceNormalization" not in kinds
        assert "GroupNormalization" in kinds
        for node in graph.node:
            if node.op_type == "Softmax":
                scale = made_by[node.input[0]]
                cast = made_by[scale.input[0]]
                assert (scale.op_type, cast.op_type) == ("Mul", "Cast")
                assert cast.attribute[0].i == onnx.TensorProto.FLOAT
            if node.op_type in ("GroupNormalization", "LayerNormalization"):
                stash = {a.name: a.i for a in node.attribute}.get("stash_type", 1)  # 1, fp32, is the default
                assert stash == onnx.TensorProto.FLOAT


@pytest.mark.xdist_group("fixed")
def test_precision_is_in_the_graph(fixed_bundle: Bundle) -> None:
    """Strongly typed: half weights in the fp16 networks, none in the VAE encoder."""
    import onnx

    for name in NETWORKS:
        graph = onnx.load(fixed_bundle.onnx_path(name), load_external_data=False).graph
        halves = sum(t.data_type == onnx.TensorProto.FLOAT16 for t in graph.initializer)
        assert (halves == 0) == (name == "vae_encoder"), name
        assert not any(node.doc_string or node.metadata_props for node in graph.node), "stack traces left in the file"
