"""The driver step of the probe on the stand-in, with numpy on its memory in the kernels' place."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from svd_trt.benchmarks.probe_driver import _SOURCE, check_device, compile_source, expected_frames, expected_step
from svd_trt.benchmarks.probe_process import unmet
from svd_trt.benchmarks.probe_steps import DRY, ProbeError, ProbeJob
from svd_trt.engine.driver import list_gpus, load_driver
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.errors import BackendError
from svd_trt.runtime.cuda.buffers import CudaBuffer, as_cuda
from svd_trt.runtime.cuda.context import Context
from svd_trt.runtime.cuda.cuda_device import CudaDevice, GpuBackend
from svd_trt.runtime.device import Array, Buffer, Session
from tests.gpu.conftest import Rig

WRITTEN: dict[str, tuple[str, ...]] = {"denoiser": ("next_latents", "denoised"), "vae_decoder": ("frames",)}
SIZES = replace(DRY, copy_bytes=5000)


def array_at(buffer: CudaBuffer) -> Array:
    content = (ctypes.c_ubyte * buffer.nbytes).from_address(buffer.address)
    return np.frombuffer(memoryview(content), buffer.dtype).reshape(buffer.shape)


class NumpySession(Session):
    """Enqueues on the stand-in what a kernel would compute; with ``wrong`` it is off by a little."""

    def __init__(self, device: CudaDevice, network: NetworkName, cuda: Any, *, wrong: str = "") -> None:
        self.spec = NetworkSpec(network, (), (), {})
        self._device, self._cuda = device, cuda
        self._error = np.float32(0.01) if wrong == network else np.float32(0)

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        buffers = {name: as_cuda(buffer) for name, buffer in tensors.items()}
        outputs = WRITTEN[self.spec.name]
        reads = [(b.address, b.nbytes) for n, b in buffers.items() if n not in outputs]
        writes = [(buffers[n].address, buffers[n].nbytes) for n in outputs]
        with self._device.context.current():
            self._cuda.enqueue(
                self._device.compute.handle, self.spec.name, lambda: self._compute(buffers), reads, writes
            )

    def _compute(self, buffers: Mapping[str, CudaBuffer]) -> None:
        x = {name: array_at(buffer) for name, buffer in buffers.items()}
        if self.spec.name == "vae_decoder":
            x["frames"][...] = expected_frames(x["latents"] + 100 * self._error, x["frames"].shape[1:3])
            return
        inputs = (x["latents"], x["previous_denoised"], x["partial_denoised"], x["coefficients"])
        x["next_latents"][...], x["denoised"][...] = expected_step(*inputs)
        x["next_latents"] += self._error


class NoBackend(GpuBackend):
    name = "numpy"

    def load(self, *_: Any) -> Session:
        raise NotImplementedError


def check(rig: Rig, wrong: str = "") -> dict[str, Any]:
    figures: dict[str, Any] = {}
    driver = load_driver()
    with CudaDevice(Context(driver, list_gpus(driver)[0]), NoBackend()) as device:
        check_device(device, lambda d, network: NumpySession(d, network, rig.cuda, wrong=wrong), SIZES, figures.update)
    return figures


def test_copies_loop_and_decode_are_right_and_steps_are_captured(standin: Rig) -> None:
    figures = check(standin)
    assert set(figures) == {"copies", "median_step_us", "decode"}
    assert set(figures["copies"]) == {"to_device", "on_device", "to_host"}
    assert standin.cuda is not None
    launches = standin.cuda.count("cuGraphLaunch")
    # Of twelve steps of each of two runs with graphs, the first run's first two warm up; one step runs again.
    assert launches == 2 * 12 - 2 + 1


@pytest.mark.parametrize(("wrong", "words"), [("denoiser", "the loop is wrong"), ("vae_decoder", "frames of the")])
def test_a_wrong_result_is_found(wrong: str, words: str, standin: Rig) -> None:
    with pytest.raises(ProbeError, match=words):
        check(standin, wrong)


def test_a_refused_capture_is_found(standin: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue = NumpySession.enqueue

    def refuse(session: NumpySession, tensors: Mapping[str, Buffer]) -> None:
        if session._device.graph is not None and session._device.graph.capturing:
            raise BackendError("kernels cannot be captured")
        enqueue(session, tensors)

    monkeypatch.setattr(NumpySession, "enqueue", refuse)
    with pytest.raises(ProbeError, match="the steps were not captured: kernels cannot be captured"):
        check(standin)


def test_copies_that_change_bytes_are_found(standin: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaDevice, "copy", lambda self, source, target: None)
    with pytest.raises(ProbeError, match="bytes changed"):
        check(standin)


def test_kernels_compile() -> None:
    if unmet("nvrtc", ProbeJob(work="")) is not None:
        pytest.skip("NVRTC is not installed")
    assert len(compile_source(_SOURCE, "sm90")) > 1000
    with pytest.raises(ProbeError, match="NVRTC does not compile the kernels"):
        compile_source("x", "sm90")
