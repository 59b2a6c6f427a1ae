"""`VideoPipeline`, the Python interface: pictures in, videos out."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

import numpy as np
import PIL.Image

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.memory import MemoryPlan, MemoryRequest
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import ArgumentError, CancelledError
from svd_trt.progress import Progress
from svd_trt.runtime.async_stream import AsyncVideoStream
from svd_trt.runtime.backends import Provider, RunBackend, open_device
from svd_trt.runtime.callback import StepCallback
from svd_trt.runtime.cancellation import Cancellation
from svd_trt.runtime.chosen_profiles import ChosenProfile, chosen_profiles
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.decode import Frames
from svd_trt.runtime.device import Device
from svd_trt.runtime.diffusers_call import by_name, missing_attribute
from svd_trt.runtime.executor import Executor
from svd_trt.runtime.generation import Job, generate
from svd_trt.runtime.images import ImageInput
from svd_trt.runtime.longer import generate_longer
from svd_trt.runtime.output import FrameType, OutputType, VideoOutput, VideoStream, converter, stays_on_device
from svd_trt.runtime.parameters import ParameterArguments
from svd_trt.runtime.preparation import Given, prepare
from svd_trt.version import __version__

__all__ = ["VideoPipeline"]

_TENSOR_INPUTS = ("latents",)
_DEFAULTS: Mapping[str, Any] = {
    "output_type": "pil",
    "generator": None,
    "latents": None,
    "callback_on_step_end": None,
    "callback_on_step_end_tensor_inputs": _TENSOR_INPUTS,
    "return_dict": True,
}


class VideoPipeline(Closeable):
    """Runs a bundle: ``with VideoPipeline.open("bundle") as pipe: video = pipe("picture.png", seed=42)``.

    The counterpart of diffusers' ``StableVideoDiffusionPipeline``: the same checkpoint, picture, seed and arguments
    give the same video. Networks are loaded when they are first used. Calls from several threads wait for one another;
    several pipelines of one bundle, on one GPU or on several, may run at the same time. A process that is forked from
    the one that opened the pipeline cannot use it.

    Attributes:
        executor: the device, the loaded engines and the memory of the pipeline; it can run a single network.
    """

    def __init__(self, bundle: Bundle, device: Device, vram_budget: int | None = None) -> None:
        self.executor = Executor(bundle, device, vram_budget)

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        backend: RunBackend = "auto",
        device: str | None = None,
        provider: Provider | None = None,
        vram_budget: int | None = None,
        verify: bool = True,
        stream: Any = None,
    ) -> Self:
        """Open a bundle.

        Args:
            bundle: a directory that `svd_trt.build_bundle` wrote, or an opened bundle.
            backend: what runs the networks; ``auto`` takes the fastest that works on this machine.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            provider: of ONNX Runtime: ``cpu``, ``cuda`` or ``tensorrt``.
            vram_budget: bytes of device memory to stay within; None is 95 % of the free memory of a GPU, and no limit
                on the CPU. The few hundred megabytes of the CUDA context are not counted. On the CPU, a budget selects
                the plan that it would select on a GPU.
            verify: compare all files with their hashes, which reads the whole bundle.
            stream: a CUDA stream of the caller's, on which networks run, in order with the caller's own work: of torch,
                CuPy, cuda.core or any library with ``__cuda_stream__``, or its handle as a number. It must outlive the
                pipeline, and nothing may capture it while a video is made.

        Raises:
            BundleError: the bundle is missing, damaged or too new.
            BackendError: the backend cannot run here, or cannot run the bundle's engines.
            ArgumentError: the device, the budget or the stream is malformed.
        """
        if vram_budget is not None and (type(vram_budget) is not int or vram_budget < 1):
            raise ArgumentError(f"vram_budget must be a whole number of bytes above 0, not {vram_budget!r}")
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        opened_device = open_device(opened, backend, device, provider, stream)
        try:
            return cls(opened, opened_device, vram_budget)
        except BaseException:
            opened_device.close()
            raise

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput],
        *in_order: Any,
        output_type: OutputType = "pil",
        generator: Any = None,
        latents: Any = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = _TENSOR_INPUTS,
        return_dict: bool = True,
        progress: Progress | None = None,
        **parameters: Unpack[ParameterArguments],
    ) -> VideoOutput:
        """Generate a video of each picture.

        Args:
            image: a path, a ``file://`` or ``data:`` URL, the bytes of a file, a stream of bytes, a PIL image, an array
                of numpy, torch or any library with ``__dlpack__`` or ``__array__`` (uint8, or float in [0, 1];
                ``[H, W, 3]``, ``[3, H, W]``, or several with a dimension in front), or a list of those. What differs
                from what a viewer shows, such as a picture that is stretched or a colour profile that is ignored, is a
                warning to the logger ``svd_trt``.
            *in_order: further arguments by position, in the order that they have in diffusers: ``height``, ``width``,
                ``num_frames`` and so on.
            output_type: ``pil``; ``np``, which is uint8 from 0 to 255, ``[B, F, H, W, 3]`` (diffusers has floats from 0
                to 1: divide by 255); ``pt``, a tensor of torch as diffusers gives it, float32 from 0 to 1,
                ``[B, F, 3, H, W]``; ``dlpack``, a list of arrays for each video, uint8 ``[H, W, 3]``, that stay on the
                GPU (see `stream`); or ``latent``. Other libraries read arrays of ``np``, ``dlpack`` and ``latent``
                without a copy, through ``__dlpack__``.
            generator: a ``torch.Generator`` on the CPU instead of a seed, or a list with one for each video. Its state
                is advanced as diffusers advances it.
            latents: noise of unit variance to start from, ``[B, F, 4, h, w]``, of any kind of array.
            callback_on_step_end: called as ``f(pipe, step, timestep, {"latents": array})`` after each step. It may
                return ``{"latents": array}`` to continue with other latents. An exception in it ends the run.
            callback_on_step_end_tensor_inputs: what the callback gets: ``["latents"]``, or nothing.
            return_dict: False returns the frames alone, as diffusers does.
            progress: called as ``progress(stage, done, total)`` with the stages ``encode`` (pictures), ``denoise``
                (steps) and ``decode`` (frames).
            **parameters: see `svd_trt.runtime.parameters.Parameters`: names and defaults of diffusers. ``seed`` may
                be a list with one for each video.

        Raises:
            ArgumentError: an argument is malformed, or outside the range that the bundle was built for; or this is a
                callback of a video that is being made.
            TypeError: an argument is unknown; the message says what to use instead.
            ImageError: a picture cannot be read.
            CancelledError: `cancel` was called.
            BackendError: the device failed, the pipeline was closed, or this is a forked process.
            MissingDependencyError: ``pt`` needs torch, which is not installed.
        """
        options: dict[str, Any] = {
            "output_type": output_type,
            "generator": generator,
            "latents": latents,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            "return_dict": return_dict,
            **parameters,
        }
        if in_order:
            return self(image, progress=progress, **by_name(in_order, options, _DEFAULTS))
        convert = converter(output_type)
        given = Given(
            self,
            image,
            parameters,
            generator=generator,
            latents=latents,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
            progress=progress,
            on_device=output_type == "dlpack",
        )
        with self.executor.turns.taken():
            job, pictures = prepare(self.executor, given)
            if job.settings.extend and output_type == "latent":
                raise ArgumentError("extend makes frames, not latents; choose another output_type")
            generated = list(self._generate(job, pictures, latents_only=output_type == "latent"))
        frames: Any
        if output_type == "dlpack":
            flat, count = [frame for chunk in generated for frame in chunk], job.settings.total_frames
            frames = [flat[start : start + count] for start in range(0, len(flat), count)]
        else:
            frames = np.concatenate(generated)
            if output_type != "latent":
                frames = frames.reshape(-1, job.settings.total_frames, *frames.shape[1:])  # [B, F, H, W, 3]
            frames = convert(frames)
        if not return_dict:
            return frames  # type: ignore[no-any-return]  # as diffusers does
        return VideoOutput(
            frames,
            job.settings,
            self.device.name,
            job.plan,
            job.timings,
            self._metadata(job),
            self._profiles(job, latents_only=output_type == "latent"),
        )

    def stream(
        self,
        image: ImageInput | Sequence[ImageInput],
        *,
        output_type: FrameType = "np",
        generator: Any = None,
        latents: Any = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = _TENSOR_INPUTS,
        progress: Progress | None = None,
        **parameters: Unpack[ParameterArguments],
    ) -> VideoStream:
        """Generate as a call does, but yield frames as soon as their chunk is decoded, to save memory and time.

        Arguments are checked at once, and on a GPU the first call loads the engines, which say how much memory they
        need. The other work starts when the first frame is requested. With several videos, the frames of one group of
        videos, which the bundle makes together, are taken before the next group is begun.

        With ``output_type="dlpack"`` frames stay on the GPU, without a copy: arrays with ``__dlpack__`` and
        ``__cuda_array_interface__``, such as for ``torch.from_dlpack(frame)``. They are finished, so no stream has to
        wait for them. Each keeps the memory of its decode chunk, outside the planned memory, until it is dropped, and
        may be kept after the pipeline is closed. On the CPU they are arrays of numpy.
        """
        return self._stream(
            Given(
                self,
                image,
                parameters,
                generator=generator,
                latents=latents,
                callback=callback_on_step_end,
                callback_inputs=callback_on_step_end_tensor_inputs,
                progress=progress,
                on_device=stays_on_device(output_type),
            )
        )

    def astream(
        self,
        image: ImageInput | Sequence[ImageInput],
        *,
        output_type: FrameType = "np",
        generator: Any = None,
        latents: Any = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = _TENSOR_INPUTS,
        progress: Progress | None = None,
        **parameters: Unpack[ParameterArguments],
    ) -> AsyncVideoStream:
        """Generate as `stream` does, for asyncio: ``async for frame in pipe.astream("picture.png")``.

        A thread does the work, also the checks, so the event loop never waits. Cancelling the task cancels the
        generation, and so does the end of a block ``async with pipe.astream(...) as stream``. Several tasks take turns.
        Callbacks and ``progress`` are called in the thread.
        """
        cancellation = Cancellation()
        given = Given(
            self,
            image,
            parameters,
            generator=generator,
            latents=latents,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
            progress=progress,
            on_device=stays_on_device(output_type),
            cancellation=cancellation,
        )
        return AsyncVideoStream(partial(self._stream, given), cancellation)

    def _stream(self, given: Given) -> VideoStream:
        with self.executor.turns.taken():
            job, pictures = prepare(self.executor, given)
        return VideoStream(
            cast("GeneratorType[Frames, None, None]", self._generate(job, pictures)),
            turns=self.executor.turns,
            cancellation=job.cancellation,
            parameters=job.settings,
            num_videos=job.request.videos,
            backend=self.device.name,
            memory=job.plan,
            timings=job.timings,
            metadata=self._metadata(job),
            profiles=self._profiles(job),
        )

    if not TYPE_CHECKING:  # it would hide misspelt names from type checkers

        def __getattr__(self, name: str) -> Any:
            raise missing_attribute(type(self).__name__, name)

    @property
    def bundle(self) -> Bundle:
        """The bundle that the pipeline runs."""
        return self.executor.bundle

    @property
    def device(self) -> Device:
        """The device that the networks run on."""
        return self.executor.device

    @property
    def vram_budget(self) -> int | None:
        """Bytes of device memory to stay within; None if no budget was given."""
        return self.executor.vram_budget

    def plan(self, request: MemoryRequest) -> MemoryPlan:
        """Show how ``request`` would use device memory now, within the budget.

        Raises:
            BudgetError: no plan needs so little memory.
        """
        self.executor.require_open()
        return self.executor.plan(request)

    def cancel(self) -> None:
        """Make the video that is being made, and every stream that is not finished, end with `CancelledError`.

        Any thread and any signal handler may call it, and it returns at once. On the CPU the step that is being
        computed ends early; a GPU finishes up to two steps. Calls of other threads that wait for their turn then go on.
        """
        self.executor.cancel(CancelledError("the video was cancelled"))

    def release(self) -> None:
        """Free the device's memory and end open streams. Networks and buffers are loaded again when they are needed.

        A video that another thread makes is waited for.

        Raises:
            ArgumentError: called from a callback of a generation that is running.
        """
        with self.executor.turns.taken():
            self.executor.release()

    def close(self) -> None:
        """Free networks and device for good. Closing twice is harmless, and so is closing in a forked process.

        A video that another thread makes is ended first.

        Raises:
            ArgumentError: called from a callback of a generation that is running.
        """
        self.executor.close()

    def _generate(self, job: Job, pictures: list[PIL.Image.Image], *, latents_only: bool = False) -> Generator[Any]:
        if job.settings.extend:
            return generate_longer(self.executor, job, pictures[0])
        return generate(self.executor, job, pictures, latents_only=latents_only)

    def _profiles(self, job: Job, *, latents_only: bool = False) -> dict[NetworkName, list[ChosenProfile]]:
        if not self.device.runs_engines:
            return {}
        return chosen_profiles(self.bundle.manifest, job, latents_only=latents_only)

    def _metadata(self, job: Job) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {
            "svd_trt": __version__,
            "model": manifest.source.model,
            "precision": manifest.precision,
            "backend": self.device.name,
            **job.settings.as_dict(),
        }
