"""ONNX Runtime's CUDA provider on the GPU: what runs there if no TensorRT does, as with TensorRT for RTX on Hopper."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime

from svd_trt.benchmarks.probe_steps import ProbeError, ProbeJob, Report, bundle_of, sizes_of
from svd_trt.engine.bundle import Bundle
from svd_trt.export.build import build_bundle
from svd_trt.export.fidelity import draw_picture
from svd_trt.export.options import BuildOptions
from svd_trt.runtime.cuda.provider import OPTIONS
from svd_trt.runtime.pipeline import VideoPipeline

__all__ = ["compare_miniature", "compare_provider_scores", "make_provider_video"]

_MINIATURE = Path("examples", "tiny", "checkpoint")
# By precision and operators. In full size, fp16 needs ONNX Runtime's own: of others it stores every score.
_FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16", "operators": "onnxruntime"},
    "fp16_portable": {"precision": "fp16", "operators": "onnx"},
}
_MOST_LEVELS = {"fp32": 2, "fp16": 16, "fp16_portable": 16}  # of 255, between two devices


def compare_miniature(job: ProbeJob, report: Report) -> None:
    """Make a video of the trained miniature on the GPU and on the CPU in each form, and compare the frames.

    Also with frames that stay on the GPU, which torch reads.
    """
    import torch  # before onnxruntime, which then finds the libraries of CUDA that torch has loaded

    picture = draw_picture(48, 48)
    arguments: dict[str, Any] = {"num_frames": 8, "num_inference_steps": 10, "seed": 1, "resize_mode": "crop"}
    for form, most in _MOST_LEVELS.items():
        options = BuildOptions(height=32, width=32, frames="2:8:8", backend="onnxruntime", **_FORMS[form])
        path = Path(job.work, f"miniature-{form}")
        build_bundle(str(_MINIATURE), path, options)
        bundle = Bundle.open(path)
        with _open(bundle, "cpu") as pipe:
            expected = pipe(picture, output_type="np", **arguments).frames
        with _open(bundle, _provider(job)) as pipe:
            found = pipe(picture, output_type="np", **arguments).frames
            shared = pipe(picture, output_type="dlpack", **arguments).frames
            stacked = torch.stack([torch.from_dlpack(frame) for frame in shared[0]])  # type: ignore[attr-defined]
            report(**{f"{form}_frames_are_on": str(stacked.device), "backend": pipe.device.name})
        levels = np.abs(found.astype(int) - expected)
        report(**{f"{form}_levels": {"mean": round(float(levels.mean()), 4), "most": int(levels.max())}})
        if levels.max() > most:
            raise ProbeError(f"{form} frames differ from the CPU's by {levels.max()} levels")
        if not np.array_equal(stacked.cpu().numpy(), found[0]):
            raise ProbeError(f"{form} frames that torch reads on the GPU are not those that are copied to the host")


def make_provider_video(job: ProbeJob, report: Report, **options: str) -> None:
    """Build a bundle of full size without engines, and make a video of it twice; ``options`` are the provider's."""
    import torch  # see `compare_miniature`

    OPTIONS["CUDAExecutionProvider"].update(options)
    sizes = sizes_of(job)
    path = bundle_of(job).with_name(f"{bundle_of(job).name}-onnx")
    build = BuildOptions(
        height=sizes.height,
        width=sizes.width,
        frames=f"2:{sizes.frames}:{sizes.frames}",
        decode_chunk=f"1:{sizes.chunk}:{sizes.frames}",
        backend="onnxruntime",
        operators="onnxruntime",
    )
    started = time.perf_counter()
    build_bundle(sizes.model, path, build)
    report(build_seconds=round(time.perf_counter() - started, 1))
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": sizes.steps, "decode_chunk_size": sizes.chunk}
    with _open(Bundle.open(path, verify=False), _provider(job)) as pipe:
        report(backend=pipe.device.name)
        for name in ("first", "second"):
            started = time.perf_counter()
            video = pipe(draw_picture(sizes.height, sizes.width), output_type="np", **arguments)
            seconds = {key: round(value, 4) for key, value in video.timings.items() if isinstance(value, float)}
            if not job.dry_run:
                free, whole = torch.cuda.mem_get_info()
                report(used_bytes=whole - free)
            report(
                **{
                    f"{name}_seconds": seconds | {"total": round(time.perf_counter() - started, 3)},
                    f"{name}_median_step": round(statistics.median(video.timings["steps"]), 5),
                }
            )
    deviation = float(np.std(video.frames))
    report(deviation=round(deviation, 2))
    if deviation < 1:
        raise ProbeError("all pixels of the frames are equal")


def compare_provider_scores(job: ProbeJob, report: Report) -> None:
    """Attention with large scores, as a bundle with ONNX Runtime's own operators has it in fp16, against fp32."""
    import torch

    from svd_trt.benchmarks.probe_torch import relative_error, rounded, scored_layers
    from svd_trt.export.rewrites.attention import BoundedAttention
    from svd_trt.export.rewrites.onnxruntime import FusedAttention

    provider = "CPUExecutionProvider" if job.dry_run else "CUDAExecutionProvider"
    if not job.dry_run:
        onnxruntime.preload_dlls()
    figures: dict[str, Any] = {}
    wrong: list[str] = []
    for name, bound, layer, hidden in scored_layers(sizes_of(job).tokens, torch.device("cpu")):
        exact = layer(hidden)
        own = FusedAttention(BoundedAttention(layer.half(), stored_scores=False)).eval()
        path = Path(job.work, "attention.onnx")
        torch.onnx.export(own, (hidden.half(),), path, dynamo=True, optimize=False, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=[provider])
        if session.get_providers()[0] != provider:
            raise ProbeError(f"ONNX Runtime took {session.get_providers()[0]} and not {provider}")
        (found,) = session.run(None, {session.get_inputs()[0].name: hidden.half().numpy()})
        error = relative_error(torch.from_numpy(found), exact)
        figures[name] = rounded(error)
        report(relative_error=figures, provider=provider)
        if not error <= bound:
            wrong.append(name)
    if wrong:
        raise ProbeError(f"the attention is not as close to fp32 as it must be: {', '.join(wrong)}")


def _provider(job: ProbeJob) -> Literal["cpu", "cuda"]:
    return "cpu" if job.dry_run else "cuda"


def _open(bundle: Bundle, provider: Literal["cpu", "cuda"]) -> VideoPipeline:
    return VideoPipeline.open(bundle, provider=provider)
