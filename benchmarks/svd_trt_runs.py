"""svd-trt's own pipeline, and OpenVINO in the place of ONNX Runtime under it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from svd_trt.benchmarks.protocol import Job
from svd_trt.benchmarks.runs import Run, Video
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NETWORKS, NetworkName, NetworkSpec
from svd_trt.runtime import ort
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.device import Buffer
from svd_trt.runtime.pipeline import VideoPipeline

__all__ = ["OpenVinoDevice", "SvdTrtRun"]


class SvdTrtRun(Run):
    """A bundle; ``mode`` is a backend, ``cuda`` for ONNX Runtime's provider, or ``openvino``."""

    def __init__(self, job: Job, mode: str) -> None:
        assert job.bundle is not None
        self.subject, self.mode, self.picture = job.subject, mode, job.picture
        self.bundle, self.threads = job.bundle, job.threads
        self.network: list[float] = []

    def load(self) -> None:
        if self.mode == "openvino":
            bundle = Bundle.open(self.bundle)
            self.pipe = VideoPipeline(bundle, OpenVinoDevice(self.threads))
        else:
            where: dict[str, Any] = {"provider": "cuda"} if self.mode == "cuda" else {"backend": self.mode}
            self.pipe = VideoPipeline.open(self.bundle, **where)
        if self.mode == "onnxruntime":
            self._time_networks()
        for name in NETWORKS:  # the decoder's loading would fall between the first step and the end otherwise
            self.pipe.engines.load(name)

    def make(self, write: Callable[[Any], None]) -> Video:
        s = self.subject
        self.network.clear()
        began: list[float] = []

        def progress(stage: str, _done: int, _total: int) -> None:
            if stage == "denoise":
                began.append(time.perf_counter())

        stream = self.pipe.stream(
            self.picture,
            progress=progress,
            num_frames=s.frames,
            height=s.height,
            width=s.width,
            num_inference_steps=s.steps,
            decode_chunk_size=s.decode_chunk_size,
            seed=s.seed,
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
            began[0] - t["steps"][0],
            self._host_s(t["steps"]),
            t.get("load", 0.0),
        )

    def _host_s(self, steps: list[float]) -> float | None:
        passes = len(self.network) // len(steps)  # with split guidance a step is two
        if passes < 1:
            return None
        networks = [sum(self.network[i : i + passes]) for i in range(0, passes * len(steps), passes)]
        return statistics.median(step - network for step, network in zip(steps, networks, strict=True))

    def _time_networks(self) -> None:
        """Keep the seconds that ONNX Runtime takes for each call of the denoiser."""
        inner = ort.run_bound

        def timed(session: Any, binding: Any, options: Any, name: str) -> None:
            started = time.perf_counter()
            inner(session, binding, options, name)
            if name == "denoiser":
                self.network.append(time.perf_counter() - started)

        ort.run_bound = timed


class OpenVinoDevice(ort.CpuDevice):
    """The CPU, through OpenVINO: everything but the networks is ONNX Runtime's leaf."""

    name = "OpenVINO (CPU)"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def open(self, bundle: Bundle, network: NetworkName, *, streamed_bytes: int = 0) -> Any:  # noqa: ARG002
        """Read the network; it is compiled for the shapes of its first call."""
        return OpenVinoSession(bundle, network, self.threads)


class OpenVinoSession(Closeable):
    """One network, compiled anew for each set of shapes: that is how it is fastest here."""

    def __init__(self, bundle: Bundle, network: NetworkName, threads: int) -> None:
        import openvino

        self.spec: NetworkSpec = bundle.network(network).spec
        self._core = openvino.Core()
        self._path = bundle.onnx_path(network)
        self._threads = threads
        self._compiled: dict[Any, Any] = {}

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Run once and wait."""
        arrays = {name: buffer.array for name, buffer in tensors.items() if isinstance(buffer, ort.CpuBuffer)}
        inputs = {t.name: arrays[t.name] for t in self.spec.inputs}
        made = self._request({name: array.shape for name, array in inputs.items()}).infer(inputs)
        for tensor in self.spec.outputs:
            arrays[tensor.name][...] = made[tensor.name]

    def cancel(self) -> None:
        """A call is short enough to wait for."""

    def close(self) -> None:
        """Release the network."""
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
