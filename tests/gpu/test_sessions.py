"""Each network on the GPU against ONNX Runtime on the CPU, at the ends of its ranges."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.spec import NETWORKS, NetworkName, NetworkSpec
from svd_trt.errors import ArgumentError, BackendError
from svd_trt.runtime.cpu_device import CpuDevice
from svd_trt.runtime.cuda.provider import OPTIONS
from svd_trt.runtime.device import Array, Device, download, upload
from tests.gpu.conftest import Rig
from tests.standin.network import Run


def sizes_of(spec: NetworkSpec, end: str) -> dict[str, int]:
    return {symbol: getattr(r, end) for symbol, r in spec.ranges.items()}


def random_inputs(spec: NetworkSpec, sizes: dict[str, int]) -> dict[str, Array]:
    """Values as in a run: small ones, and the coefficients of a step in the middle of a schedule."""
    rng = np.random.default_rng(0)
    inputs = {t.name: (0.5 * rng.standard_normal(t.resolve(sizes))).astype(np.float32) for t in spec.inputs}
    if spec.name == "denoiser":
        inputs["coefficients"] = np.array([0.2, 0.4, 0.04, -0.98, 0.6, 0.4, 0.0], np.float32)
        inputs["added_time_ids"][...] = [6, 127, 0.02]
        inputs["guidance"][...] = 1.0 / len(inputs["guidance"])
    return inputs


def run(device: Device, bundle: Bundle, network: NetworkName, inputs: dict[str, Array], sizes: Any) -> dict[str, Array]:
    with ExitStack() as stack:
        session = stack.enter_context(device.open(bundle, network))
        spec = session.spec
        tensors: dict[str, Any] = {n: stack.enter_context(upload(device, a, n)) for n, a in inputs.items()}
        for tensor in spec.outputs:
            shape = tensor.resolve(sizes)
            tensors[tensor.name] = stack.enter_context(device.empty(shape, tensor.dtype, tensor.name))
        for _ in range(2):
            session.enqueue(tensors)
        return {t.name: download(device, tensors[t.name]) for t in spec.outputs}


@pytest.mark.parametrize("end", ["min", "opt", "max"])
@pytest.mark.parametrize("network", NETWORKS)
def test_outputs_match_the_cpu(
    network: NetworkName, end: str, rig: Rig, dynamic_bundle: Bundle, record_property: Any
) -> None:
    spec = dynamic_bundle.network(network).spec
    sizes = sizes_of(spec, end)
    inputs = random_inputs(spec, sizes)
    with rig.open(dynamic_bundle) as pipe:
        ours = run(pipe.device, dynamic_bundle, network, inputs, sizes)
    theirs = run(CpuDevice(), dynamic_bundle, network, inputs, sizes)
    for name, expected in theirs.items():
        difference = float(np.abs(ours[name].astype(np.float64) - expected).max() / max(expected.std(), 1e-6))
        record_property(f"{name}_relative_difference", difference)
        # A GPU multiplies fp32 as TF32, with ten bits of mantissa. The stand-in computes on the CPU.
        assert difference <= (1e-6 if rig.cuda else 2e-2)


def test_wrong_shapes_are_refused(rig: Rig, dynamic_bundle: Bundle) -> None:
    spec = dynamic_bundle.network("vae_decoder").spec
    with rig.open(dynamic_bundle) as pipe, pipe.device.open(dynamic_bundle, "vae_decoder") as session:
        device = pipe.device
        with (
            device.empty((99, 4, 9, 12), np.float32, "latents") as many,
            device.empty((1, 4, 9, 12), np.float32, "latents") as one,
            device.empty((1, 80, 96, 3), np.uint8, "frames") as wrong,
            device.empty(
                spec.tensor("frames").resolve({"chunk": 1, "height": 72, "width": 96}), np.uint8, "f"
            ) as right,
        ):
            with pytest.raises(BackendError, match=r"vae_decoder does not take latents of shape \[99, 4, 9, 12\]"):
                session.enqueue({"latents": many, "frames": right})
            with pytest.raises(BackendError, match=r"vae_decoder gives frames of shape \(1, 72, 96, 3\), not \(1, 80"):
                session.enqueue({"latents": one, "frames": wrong})
            session.enqueue({"latents": one, "frames": right})
            device.synchronize()
            session.close()
            with pytest.raises(BackendError, match="was released"):
                session.enqueue({"latents": one, "frames": right})


class _OnStream:
    """ONNX Runtime's GPU provider on the stand-in. It binds device addresses and runs on the stream of its options."""

    def __init__(self, rig: Rig, bundle: Bundle, network: NetworkName, options: dict[str, str]) -> None:
        self._rig = rig
        self._path = bundle.onnx_path(network)
        self._spec = bundle.network(network).spec
        self._stream = int(options["user_compute_stream"])
        self.device_id = options["device_id"]
        self.providers: list[str] = []
        self.bound: dict[str, tuple[int, tuple[int, ...]]] = {}

    def get_providers(self) -> list[str]:
        return self.providers

    def io_binding(self) -> _OnStream:
        self.bound = {}
        return self

    def bind_input(self, name: str, kind: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        assert (kind, str(index)) == ("cuda", self.device_id)
        assert np.dtype(dtype) == np.dtype(self._spec.tensor(name).dtype)
        self.bound[name] = (address, tuple(shape))

    bind_output = bind_input

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        assert binding is self
        assert self._rig.cuda is not None
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        reads = {t: self.bound[t.name] for t in self._spec.inputs}
        writes = {t: self.bound[t.name] for t in self._spec.outputs}

        def ranges(tensors: Any) -> list[tuple[int, int]]:
            return [(where, int(np.prod(shape)) * np.dtype(t.dtype).itemsize) for t, (where, shape) in tensors.items()]

        self._rig.cuda.enqueue(
            self._stream, self._spec.name, Run(self._path, reads, writes, (0, 0)), ranges(reads), ranges(writes)
        )


@pytest.fixture
def with_provider(standin: Rig, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make onnxruntime seem to have the GPU providers. The list collects network and providers of each load."""
    loads: list[Any] = []

    def load(bundle: Bundle, network: NetworkName, providers: Any, provider_options: Any) -> Any:
        for name, options in zip(providers, provider_options, strict=True):
            assert options.get("use_tf32") == ("0" if name == "CUDAExecutionProvider" else None), "fp32 means fp32"
            own = {key: value for key, value in options.items() if key not in ("device_id", "user_compute_stream")}
            assert own == OPTIONS[name]
        loads.append((network, list(providers)))
        session = _OnStream(standin, bundle, network, provider_options[0])
        session.providers = [*providers, "CPUExecutionProvider"]
        return session

    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: names)
    monkeypatch.setattr("svd_trt.runtime.cuda.provider.load_onnx", load)
    return loads


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_onnxruntime_runs_on_the_stream_and_memory_of_the_device(
    provider: Any,
    standin: Rig,
    with_provider: list[Any],
    dynamic_bundle: Bundle,
    dynamic_pipe: VideoPipeline,
    picture: Any,
) -> None:
    arguments: dict[str, Any] = {
        "num_frames": 5,
        "num_inference_steps": 4,
        "height": 72,
        "width": 96,
        "seed": 1,
        "decode_chunk_size": 2,
        "output_type": "np",
    }
    with VideoPipeline.open(dynamic_bundle, provider=provider) as pipe:
        frames = pipe(picture, **arguments).frames
        assert "onnxruntime" in pipe.device.name
        assert "allocates while it runs" in pipe.device.refusals[0]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(frames, dynamic_pipe(picture, **arguments).frames)
    assert {name for name, _ in with_provider} == set(NETWORKS)
    first = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[provider]
    assert all(providers[0] == first for _, providers in with_provider)


def test_a_provider_refuses_a_budget(standin: Rig, with_provider: list[Any], dynamic_bundle: Bundle) -> None:
    with pytest.raises(ArgumentError, match="keeps no budget"):
        VideoPipeline.open(dynamic_bundle, provider="cuda", vram_budget=10**9)


def test_a_provider_that_falls_back_to_the_cpu_is_an_error(
    standin: Rig, with_provider: list[Any], dynamic_bundle: Bundle, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself only logs that a library is missing."""
    monkeypatch.setattr(_OnStream, "get_providers", lambda self: ["CPUExecutionProvider"])
    with (
        VideoPipeline.open(dynamic_bundle, provider="cuda") as pipe,
        pytest.raises(BackendError, match=r"and takes CPUExecutionProvider: .*libonnxruntime_providers_cuda\.so"),
    ):
        pipe(picture, height=72, width=96)


def test_a_provider_that_is_not_installed_is_an_error(standin: Rig, dynamic_bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="no CUDAExecutionProvider; replace it: pip uninstall onnxruntime"):
        VideoPipeline.open(dynamic_bundle, provider="cuda")
