"""svd-trt's pipeline on any backend, and with OpenVINO instead of ONNX Runtime."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from svd_trt.benchmarks.contenders import Job, Runner, Video
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NETWORKS, NetworkName, NetworkSpec
from svd_trt.runtime.cpu_device import CpuBuffer, CpuDevice, CpuSession
from svd_trt.runtime.device import Buffer, Session
from svd_trt.runtime.pipeline import VideoPipeline

__all__ = ["OpenVinoDevice", "SvdTrtRunner"]


class SvdTrtRunner(Runner):
    """A bundle; ``mode`` is a backend, ``cuda`` for ONNX Runtime's CUDA provider, or ``openvino``."""

    def __init__(self, job: Job, mode: str) -> None:
        assert job.bundle is not None
        self.job, self.mode, self.bundle = job, mode, job.bundle

    def load(self) -> None:
        if self.mode == "openvino":
            self.pipe = VideoPipeline(Bundle.open(self.bundle), OpenVinoDevice(self.job.threads))
        else:
            where: dict[str, Any] = {"provider": "cuda"} if self.mode == "cuda" else {"backend": self.mode}
            self.pipe = VideoPipeline.open(self.bundle, **where)
        for name in NETWORKS:  # otherwise the decoder would be loaded between the first step and the last frame
            self.pipe.executor.load(name)

    def make_video(self, write: Callable[[Any], None]) -> Video:
        workload = self.job.workload
        step_ends: list[float] = []
        run_seconds: list[float] = []  # of the denoiser, before each step and after the last

        def progress(stage: str, done: float, _total: float) -> None:
            if stage == "denoise":
                run_seconds.append(self._denoiser_seconds())
                if done:
                    step_ends.append(time.perf_counter())

        stream = self.pipe.stream(
            self.job.picture,
            progress=progress,
            num_frames=workload.frames,
            height=workload.height,
            width=workload.width,
            num_inference_steps=workload.steps,
            decode_chunk_size=workload.decode_chunk_size,
            seed=workload.seed,
        )
        frames = []
        for frame in stream:
            frames.append(frame)
            write(frame[np.newaxis])
        t = stream.timings
        return Video(
            np.stack(frames),
            {
                "image_encode": t["preprocess"] + t["image_encoder"],
                "vae_encode": t["vae_encoder"],
                "denoise": t["denoise"],
                "decode": t["decode"],
            },
            t["steps"],
            step_ends[0] - t["steps"][0],
            _host_s(t["steps"], run_seconds),
            t.get("load", 0.0),
        )

    def _denoiser_seconds(self) -> float:
        """Seconds that ONNX Runtime has spent in the denoiser; 0 on other backends."""
        with self.pipe.executor.session("denoiser") as session:
            return session.run_seconds if isinstance(session, CpuSession) else 0.0


def _host_s(steps: list[float], run_seconds: list[float]) -> float | None:
    """The part of a step that its network does not account for, median; None if the network was not timed."""
    if not run_seconds[-1]:
        return None
    networks = [after - before for before, after in pairwise(run_seconds)]
    return statistics.median(step - network for step, network in zip(steps, networks, strict=True))


class OpenVinoDevice(CpuDevice):
    """The CPU, with networks run by OpenVINO."""

    name = "OpenVINO (CPU)"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def open(self, bundle: Bundle, network: NetworkName, *, streamed_bytes: int = 0) -> Any:  # noqa: ARG002
        return OpenVinoSession(bundle, network, self.threads)


class OpenVinoSession(Session):
    """One network, compiled for each set of shapes when it is first called with them: fixed shapes are fastest here."""

    def __init__(self, bundle: Bundle, network: NetworkName, threads: int) -> None:
        import openvino

        self.spec: NetworkSpec = bundle.network(network).spec
        self._core = openvino.Core()
        self._path = bundle.onnx_path(network)
        self._threads = threads
        self._compiled: dict[Any, Any] = {}

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Run once and wait."""
        arrays = {name: buffer.array for name, buffer in tensors.items() if isinstance(buffer, CpuBuffer)}
        inputs = {t.name: arrays[t.name] for t in self.spec.inputs}
        outputs = self._request({name: array.shape for name, array in inputs.items()}).infer(inputs)
        for tensor in self.spec.outputs:
            arrays[tensor.name][...] = outputs[tensor.name]

    def cancel(self) -> None:
        """Calls are short enough to wait for."""

    def close(self) -> None:
        self._compiled.clear()

    def _request(self, shapes: dict[str, tuple[int, ...]]) -> Any:
        key = tuple(shapes.items())
        if key not in self._compiled:
            model = self._core.read_model(self._path)
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            options = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",
                "INFERENCE_NUM_THREADS": self._threads,
            }
            self._compiled[key] = self._core.compile_model(model, "CPU", options).create_infer_request()
        return self._compiled[key]
