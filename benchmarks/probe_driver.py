"""The runtime's own use of the CUDA driver, with kernels of NVRTC in TensorRT's place.

The denoising loop and the chunked decode of the runtime run as they are: pinned copies, events, capture, two
alternating graphs, a second stream, and a second thread. A kernel stands where the denoiser or the decoder would be, so
a failure is the runtime's or the driver's and not TensorRT's.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np

from svd_trt.benchmarks.probe_steps import ProbeError, ProbeJob, Report, Sizes, sizes_of
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.driver import list_gpus, load_driver
from svd_trt.engine.spec import COEFFICIENTS, NetworkName, NetworkSpec
from svd_trt.runtime.cuda.buffers import as_cuda
from svd_trt.runtime.cuda.context import Context
from svd_trt.runtime.cuda.cuda_device import CudaDevice, GpuBackend
from svd_trt.runtime.decode import ChunkedDecode
from svd_trt.runtime.denoise import Conditions, Floats, Loop
from svd_trt.runtime.device import Array, Buffer, Session, download, upload

__all__ = ["KernelBackend", "check_device", "expected_frames", "expected_step", "run_driver"]

_SOURCE = r"""
extern "C" __global__ void denoise(const float *latents, const float *previous, const float *partial,
                                   const float *c, float *next, float *denoised, int count)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float x = latents[i];
    float d = c[2] * x + c[3] * tanhf(c[0] * x) + partial[i];
    denoised[i] = d;
    next[i] = c[4] * x + c[5] * d + c[6] * previous[i];
}

extern "C" __global__ void decode(const float *latents, unsigned char *frames, int count, int height, int width,
                                  int channels)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    int colour = i % 3, x = i / 3 % width, y = i / 3 / width % height, frame = i / 3 / width / height;
    long long place = ((long long)frame * channels + colour) * (height / 8) + y / 8;
    float level = 128.0f + 32.0f * latents[place * (width / 8) + x / 8];
    frames[i] = (unsigned char)fminf(fmaxf(rintf(level), 0.0f), 255.0f);
}
"""
_THREADS = 256
_BOUND = 1e-4  # relative; a GPU multiplies and adds in one rounding
_STEPS = 12
_CHANNELS = 4


def run_driver(job: ProbeJob, report: Report) -> None:
    """Compile the kernels and run `check_device` on the first GPU."""
    driver = load_driver()
    gpu = list_gpus(driver)[0]
    report(gpu=f"{gpu.name} {gpu.sm}", driver=gpu.driver_version)
    context = Context(driver, gpu)
    backend = KernelBackend(context, compile_source(_SOURCE, gpu.sm))
    with CudaDevice(context, backend) as device:
        check_device(device, backend.session, sizes_of(job), report)


def check_device(
    device: CudaDevice, session: Callable[[CudaDevice, NetworkName], Session], sizes: Sizes, report: Report
) -> None:
    """Run copies, the loop and the decode on ``device``; ``session`` makes what computes a network.

    Raises:
        ProbeError: a result is wrong, or the steps were not captured.
    """
    report(copies=_check_copies(device, sizes.copy_bytes))
    latents = _draw((1, sizes.frames, _CHANNELS, sizes.height // 8, sizes.width // 8))
    with session(device, "denoiser") as denoiser:
        seconds = {name: _check_loop(device, denoiser, latents, graphs=graphs) for name, graphs in _WAYS.items()}
    report(median_step_us={name: round(1e6 * statistics.median(values[3:]), 2) for name, values in seconds.items()})
    with session(device, "vae_decoder") as decoder:
        _check_decode(device, decoder, latents[0], (sizes.height, sizes.width), sizes.chunk)
    report(decode="frames are right")


_WAYS = {"calls": False, "graphs": True}


def _check_copies(device: CudaDevice, nbytes: int) -> dict[str, float]:
    """Copy ``nbytes`` there, on the device, and back; GB/s of each."""
    content = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    with upload(device, content, "there") as there, device.empty((nbytes,), np.uint8, "here") as here:
        device.copy(there, here)
        if not np.array_equal(download(device, here), content):
            raise ProbeError("bytes changed on their way to the device and back")
        with (
            device.host((nbytes,), np.uint8, "host") as host,
            device.event() as start,
            device.event() as sent,
            device.event() as copied,
            device.event() as fetched,
        ):
            start.record()
            device.send(host, there)
            sent.record()
            device.copy(there, here)
            copied.record()
            device.fetch(here, host, fetched)
            fetched.wait()
            spans = {
                "to_device": sent.seconds_since(start),
                "on_device": copied.seconds_since(sent),
                "to_host": fetched.seconds_since(copied),
            }
    if not all(seconds > 0 for seconds in spans.values()):
        raise ProbeError(f"events are out of order: {spans}")
    return {name: round(nbytes / seconds / 1e9, 2) for name, seconds in spans.items()}


def _check_loop(device: CudaDevice, denoiser: Session, latents: Floats, *, graphs: bool) -> list[float]:
    """Run the loop twice, the second time with latents replaced after a step; the seconds of the first run's steps."""
    frames = latents.shape[1]
    embeds, condition = _draw((1, 1, 8)), _draw(latents.shape[:1] + latents.shape[2:])
    guidance = np.linspace(1, 3, frames, dtype=np.float32)
    guided = (True,) * _STEPS
    kinds = {True: Conditions(embeds, condition, np.ones(3, np.float32), guidance, guided).passes(2, guided=True)}
    table = _draw((_STEPS, len(COEFFICIENTS))) * np.float32(0.5)
    device.use_graphs = graphs
    seconds: list[float] = []

    def hold() -> AbstractContextManager[Session]:
        return nullcontext(denoiser)

    with Loop(device, kinds, latents.shape, _STEPS) as loop:
        first = loop.run(hold, latents, kinds, guided, table, None, seconds.append)
        _compare("the loop", first, _expected_loop(latents, table, {}))
        replaced = _draw(latents.shape, seed=5)

        def replace(step: int, _: float, seen: Array) -> Array | None:
            _compare(f"what the host sees after step {step}", seen, _expected_loop(latents, table[: step + 1], places))
            places.update({step: replaced} if step == 4 else {})
            return replaced if step == 4 else None

        places: dict[int, Floats] = {}
        second = loop.run(hold, latents, kinds, guided, table, replace, seconds.append)
        _compare("the loop with replaced latents", second, _expected_loop(latents, table, places))
    if graphs and device.refusals:
        raise ProbeError(f"the steps were not captured: {device.refusals[0]}")
    return seconds[:_STEPS]


def _check_decode(device: CudaDevice, decoder: Session, latents: Floats, size: tuple[int, int], chunk: int) -> None:
    """Decode ``latents`` twice as many times as there are slots, in chunks with a rest."""
    repeated = np.concatenate([latents] * 4)
    whole, rest = divmod(len(repeated), chunk)
    chunks = [chunk] * whole + [rest] * bool(rest)
    hold = lambda _stop: nullcontext(decoder)  # noqa: E731
    with ChunkedDecode(device, hold, repeated, chunks, size, lambda _seconds: None) as decoded:
        frames = np.concatenate(list(decoded))
    if np.abs(frames.astype(int) - expected_frames(repeated, size)).max() > 1:  # where a level is halfway
        raise ProbeError("frames of the chunked decode are wrong")


def expected_step(latents: Array, previous: Array, partial: Array, c: Array) -> tuple[Array, Array]:
    """What the kernel ``denoise`` computes: the next and the denoised latents."""
    denoised = c[2] * latents + c[3] * np.tanh(c[0] * latents) + partial
    return c[4] * latents + c[5] * denoised + c[6] * previous, denoised


def expected_frames(latents: Array, size: tuple[int, int]) -> Array:
    """What the kernel ``decode`` computes: ``[n, 4, h, w]`` to ``[n, H, W, 3]``."""
    height, width = size
    enlarged = latents[:, :3, np.arange(height) // 8][..., np.arange(width) // 8]  # [n, 3, H, W]
    levels = np.rint(np.float32(128) + np.float32(32) * enlarged).clip(0, 255)
    frames: Array = levels.transpose(0, 2, 3, 1).astype(np.uint8)
    return frames


def _expected_loop(latents: Floats, table: Floats, places: Mapping[int, Floats]) -> Array:
    """The latents after all rows of ``table``; those of ``places`` replace the ones after that step."""
    zeros = np.zeros_like(latents)
    x: Array = latents
    previous: Array = zeros
    for step, row in enumerate(table):
        x, previous = expected_step(x, previous, zeros, row.astype(np.float64))  # in fp64 from here on
        x = places.get(step, x)
    return x


def _compare(what: str, found: Array, expected: Array) -> None:
    difference = float(np.abs(found - expected).max() / expected.std())
    if not difference <= _BOUND:
        raise ProbeError(f"{what} is wrong: it differs by {difference:.2g} standard deviations")


def _draw(shape: tuple[int, ...], seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def compile_source(source: str, sm: str) -> bytes:
    """Compile CUDA C with NVRTC for the compute capability ``sm``, such as ``sm90``; the cubin.

    Raises:
        ProbeError: NVRTC refuses it; the message has its log.
    """
    from cuda.bindings import nvrtc

    def call(name: str, *arguments: Any) -> Any:
        status, *results = getattr(nvrtc, name)(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise ProbeError(f"{name}: {status}")
        return results[0] if results else None

    program = call("nvrtcCreateProgram", source.encode(), b"probe.cu", 0, [], [])
    architecture = f"--gpu-architecture={sm[:2]}_{sm[2:]}".encode()
    (status,) = nvrtc.nvrtcCompileProgram(program, 1, [architecture])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * call("nvrtcGetProgramLogSize", program)
        call("nvrtcGetProgramLog", program, log)
        raise ProbeError(f"NVRTC does not compile the kernels: {log.decode(errors='replace').strip()}")
    cubin: bytes = b" " * call("nvrtcGetCUBINSize", program)
    call("nvrtcGetCUBIN", program, cubin)
    return cubin


class KernelBackend(GpuBackend):
    """Kernels in the place of networks."""

    name = "NVRTC kernels"

    def __init__(self, context: Context, cubin: bytes) -> None:
        self._context = context
        self._module = context.call("cuModuleLoadData", cubin)

    def load(self, device: CudaDevice, bundle: Bundle, network: NetworkName, streamed_bytes: int) -> Session:  # noqa: ARG002
        """Make the kernel of ``network``; the bundle is not used."""
        return self.session(device, network)

    def session(self, device: CudaDevice, network: NetworkName) -> Session:
        """The kernel of ``network``, which is the denoiser or the decoder."""
        name = {"denoiser": b"denoise", "vae_decoder": b"decode"}[network]
        function = self._context.call("cuModuleGetFunction", self._module, name)
        return _KernelSession(device, network, partial(self._launch, device, function))

    def _launch(self, device: CudaDevice, function: Any, count: int, values: tuple[int, ...], types: Any) -> None:
        blocks = -(-count // _THREADS)
        device.context.call(
            "cuLaunchKernel", function, blocks, 1, 1, _THREADS, 1, 1, 0, device.compute.handle, (values, types), 0
        )

    def close(self) -> None:
        """Unload the module."""
        if self._module is not None:
            module, self._module = self._module, None
            self._context.call("cuModuleUnload", module)


class _KernelSession(Session):
    """One kernel as a network. It reads coefficients, latents, and what earlier steps and passes left."""

    def __init__(self, device: CudaDevice, network: NetworkName, launch: Callable[..., None]) -> None:
        self.spec = NetworkSpec(network, (), (), {})
        self._device = device
        self._launch = launch

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Launch the kernel on the compute stream."""
        pointer, number = ctypes.c_void_p, ctypes.c_int
        if self.spec.name == "denoiser":
            names = ("latents", "previous_denoised", "partial_denoised", "coefficients", "next_latents", "denoised")
            count = int(np.prod(tensors["latents"].shape))
            self._launch(count, (*_addresses(tensors, names), count), (pointer,) * len(names) + (number,))
            return
        frames, latents = tensors["frames"], tensors["latents"]
        count = int(np.prod(frames.shape))
        sizes = (count, frames.shape[1], frames.shape[2], latents.shape[1])
        self._launch(count, (*_addresses(tensors, ("latents", "frames")), *sizes), (pointer,) * 2 + (number,) * 4)


def _addresses(tensors: Mapping[str, Buffer], names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(as_cuda(tensors[name]).address for name in names)
