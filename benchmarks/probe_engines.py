"""A bundle on the GPU: its tests, a build of full size, its engines against torch, and a whole video."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from svd_trt.benchmarks.probe_steps import ProbeError, ProbeJob, Report, SkippedError, bundle_of, sizes_of
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.driver import gpu_count, list_gpus, load_driver
from svd_trt.engine.tensorrt_import import find_tensorrt, served_capabilities
from svd_trt.runtime.layer_times import LayerTimes, layers_by_time
from svd_trt.runtime.pipeline import VideoPipeline

__all__ = ["build", "compare_chunk", "compare_denoiser", "make_video", "run_gpu_tests"]

_SLOWEST = 20  # layers to report


def run_gpu_tests(job: ProbeJob, report: Report) -> None:
    """Run ``make gpu-test`` without its linters, and report what it records."""
    record = Path(job.work, f"gpu-tests-{os.getpid()}.json")  # another probe may use the same folder
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "--record", str(record)]
    environment = os.environ | {"SVD_TRT_TEST_BACKEND": job.backend}
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)  # noqa: S603  (our own tests)
    if not record.exists():
        raise ProbeError(f"pytest ended with code {done.returncode} and recorded nothing")
    found = json.loads(record.read_bytes())
    report(outcomes=found["outcomes"], failed=found["failed"], measured=found["measured"])
    if not found["outcomes"]["passed"] and not found["failed"]:
        raise SkippedError(f"all {found['outcomes']['skipped']} tests were skipped")
    if done.returncode:
        raise ProbeError(f"{len(found['failed'])} tests failed")


def build(job: ProbeJob, report: Report) -> None:
    """Build the bundle of the next steps, with decode chunks up to the number of frames."""
    if job.bundle is not None:
        raise SkippedError("--bundle was given")
    if not job.dry_run and (reason := _unserved(job)) is not None:
        raise SkippedError(reason)
    from svd_trt.export.build import build_bundle
    from svd_trt.export.options import BuildOptions

    sizes = sizes_of(job)
    most = max(sizes.frames, *sizes.chunks.values())
    options = BuildOptions(
        height=sizes.height,
        width=sizes.width,
        frames=f"2:{sizes.frames}:{most}",
        decode_chunk=f"1:{sizes.chunk}:{most}",
        backend=job.backend,
    )
    started = time.perf_counter()
    result = build_bundle(sizes.model, bundle_of(job), options)
    report(
        seconds=round(time.perf_counter() - started, 1),
        stages={f"{stage.network} {stage.kind}": round(stage.seconds, 1) for stage in result.stages},
    )


def _unserved(job: ProbeJob) -> str | None:
    """Why no engine of this bundle would run on this GPU, which a build of ten minutes would only show afterwards."""
    if job.backend == "tensorrt" or job.rtx_runs or gpu_count() == 0:
        return None
    gpu, served = list_gpus(load_driver())[0], served_capabilities(find_tensorrt(job.backend).trt)
    if gpu.sm in served:
        return None
    return f"TensorRT for RTX serves {', '.join(served)}, and this GPU is {gpu.sm}; try --backend tensorrt"


def compare_denoiser(job: ProbeJob, report: Report) -> None:
    """Run one step by the engine and by diffusers, and compare both with diffusers in fp32."""
    import torch

    from svd_trt.benchmarks.probe_torch import (
        check_errors,
        device_of,
        diffusers_step,
        draw_tensors,
        exact_step,
        fixed_spec,
        load_component,
        relative_error,
    )

    sizes, device = sizes_of(job), device_of(job)
    spec = fixed_spec("denoiser", sizes)
    inputs = draw_tensors(spec, device)
    n = {"batch": 1, "branches": 2, "frames": sizes.frames, "height": sizes.height, "width": sizes.width}
    with _open(job) as pipe:
        report(backend=pipe.device.name)
        arrays = {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
        engine = torch.from_numpy(pipe.executor.run("denoiser", arrays, n)["denoised"]).cpu()
    unet = load_component("denoiser", sizes, device)
    with torch.no_grad():
        plain = diffusers_step(unet, inputs).cpu()
    exact = exact_step(unet, inputs)
    check_errors({"diffusers": relative_error(plain, exact), "engine": relative_error(engine, exact)}, report)


def compare_chunk(job: ProbeJob, report: Report, *, chunk: int) -> None:
    """Decode ``chunk`` frames by the engine and by diffusers."""
    import torch

    from svd_trt.benchmarks.probe_torch import (
        check_frames,
        device_of,
        diffusers_decode,
        draw_tensors,
        fixed_spec,
        load_component,
    )

    sizes, device = sizes_of(job), device_of(job)
    count = sizes.chunks[chunk]
    latents = draw_tensors(fixed_spec("vae_decoder", sizes, count), device)["latents"]
    with _open(job) as pipe:
        most = pipe.bundle.manifest.ranges.chunk.max
        if count > most:
            raise SkippedError(f"the bundle decodes at most {most} frames together")
        n = {"chunk": count, "height": sizes.height, "width": sizes.width}
        started = time.perf_counter()
        frames = pipe.executor.run("vae_decoder", {"latents": latents.cpu().numpy()}, n)["frames"]
        report(frames=count, backend=pipe.device.name, first_run_seconds=round(time.perf_counter() - started, 2))
    with torch.no_grad():
        expected = diffusers_decode(load_component("vae_decoder", sizes, device), latents).cpu()
    check_frames("engine", torch.from_numpy(frames).cpu(), expected, report)


def make_video(job: ProbeJob, report: Report) -> None:
    """Make one video twice, and once more with the times of layers."""
    from svd_trt.export.fidelity import draw_picture

    sizes = sizes_of(job)
    picture = draw_picture(sizes.height, sizes.width)
    arguments: dict[str, Any] = {"seed": 1, "num_inference_steps": sizes.steps, "output_type": "np"}
    with _open(job) as pipe:
        report(backend=pipe.device.name)
        for name in ("first", "second"):
            started = time.perf_counter()
            video = pipe(picture, **arguments)
            seconds = {key: round(value, 4) for key, value in video.timings.items() if isinstance(value, float)}
            steps = video.timings["steps"]
            report(
                **{
                    f"{name}_seconds": seconds | {"total": round(time.perf_counter() - started, 3)},
                    f"{name}_median_step": round(statistics.median(steps), 5),
                }
            )
        deviation = float(np.std(video.frames))
        report(memory=video.memory.as_dict(), notes=list(pipe.device.notes), deviation=round(deviation, 2))
        if deviation < 1:
            raise ProbeError("all pixels of the frames are equal")
    times: LayerTimes = {}
    with _open(job) as pipe:
        pipe.device.measure_layers(times)
        pipe(picture, **arguments)
    report(slowest_layers=[layer._asdict() for layer in layers_by_time(times)[:_SLOWEST]])


def _open(job: ProbeJob) -> VideoPipeline:
    bundle = Bundle.open(bundle_of(job), verify=False)
    return VideoPipeline.open(bundle, device="cpu" if job.dry_run else "cuda", backend="auto")
