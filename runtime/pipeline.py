"""`VideoPipeline`, the Python interface: pictures in, videos out."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from types import GeneratorType
from typing import Any, Literal, Self, TypeAlias, Unpack, cast

import numpy as np
import numpy.typing as npt
import PIL.Image

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.decode_chunks import chunk_sizes
from svd_trt.engine.memory import MemoryPlan, MemoryRequest
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import ArgumentError, CancelledError
from svd_trt.progress import Progress, ignore_progress
from svd_trt.runtime.backends import Provider, RunBackend, open_device
from svd_trt.runtime.callback import StepCallback, bind_callback
from svd_trt.runtime.chosen_profiles import ChosenProfile, chosen_profiles
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.decode import Frames
from svd_trt.runtime.device import Device
from svd_trt.runtime.executor import Executor
from svd_trt.runtime.framing import framed
from svd_trt.runtime.generation import Job, generate, groups_of
from svd_trt.runtime.images import ImageInput, load_image, name_of
from svd_trt.runtime.latents import checked_latents
from svd_trt.runtime.output import VideoOutput, VideoStream
from svd_trt.runtime.parameters import ParameterArguments, Parameters, colour_of, memory_request, resolve
from svd_trt.runtime.timings import Timings, timed
from svd_trt.version import __version__

__all__ = ["OutputType", "VideoPipeline"]

OutputType: TypeAlias = Literal["pil", "np", "latent"]

_log = logging.getLogger("svd_trt")


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

        Raises:
            BundleError: the bundle is missing, damaged or too new.
            BackendError: the backend cannot run here, or cannot run the bundle's engines.
            ArgumentError: the device or the budget is malformed.
        """
        if vram_budget is not None and (type(vram_budget) is not int or vram_budget < 1):
            raise ArgumentError(f"vram_budget must be a whole number of bytes above 0, not {vram_budget!r}")
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        opened_device = open_device(opened, backend, device, provider)
        try:
            return cls(opened, opened_device, vram_budget)
        except BaseException:
            opened_device.close()
            raise

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput],
        *,
        output_type: OutputType = "pil",
        latents: npt.ArrayLike | None = None,
        callback_on_step_end: StepCallback | None = None,
        progress: Progress | None = None,
        **parameters: Unpack[ParameterArguments],
    ) -> VideoOutput:
        """Generate a video of each picture.

        Args:
            image: a path, a ``file://`` or ``data:`` URL, a stream of bytes, a PIL image, an array (uint8, or float in
                [0, 1]; ``[H, W, 3]``), or a list of those. What differs from what a viewer shows, such as a picture
                that is stretched or a colour profile that is ignored, is a warning to the logger ``svd_trt``.
            output_type: ``pil``, ``np`` (uint8) or ``latent``.
            latents: noise of unit variance to start from, ``[B, F, 4, h, w]``, instead of the seed's.
            callback_on_step_end: called as ``f(pipe, step, timestep, {"latents": array})`` after each step. It may
                return ``{"latents": array}`` to continue with other latents. An exception in it ends the run.
            progress: called as ``progress(stage, done, total)`` with the stages ``encode`` (pictures), ``denoise``
                (steps) and ``decode`` (frames).
            **parameters: see `svd_trt.runtime.parameters.Parameters`: names and defaults of diffusers.

        Raises:
            ArgumentError: an argument is malformed, or outside the range that the bundle was built for; or this is a
                callback of a video that is being made.
            ImageError: a picture cannot be read.
            CancelledError: `cancel` was called.
            BackendError: the device failed, the pipeline was closed, or this is a forked process.
        """
        if output_type not in ("pil", "np", "latent"):
            raise ArgumentError(f"output_type must be pil, np or latent, not {output_type!r}")
        with self.executor.turns.taken():
            job, pictures = self._prepare(_as_list(image), parameters, latents, callback_on_step_end, progress)
            generated = list(generate(self.executor, job, pictures, latents_only=output_type == "latent"))
        frames: Any = np.concatenate(generated)
        if output_type != "latent":
            frames = frames.reshape(*job.latent_shape[:2], *frames.shape[1:])  # [B, F, H, W, 3]
        if output_type == "pil":
            frames = [[PIL.Image.fromarray(frame) for frame in video] for video in frames]
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
        latents: npt.ArrayLike | None = None,
        callback_on_step_end: StepCallback | None = None,
        progress: Progress | None = None,
        **parameters: Unpack[ParameterArguments],
    ) -> VideoStream:
        """Generate as a call does, but yield frames as soon as their chunk is decoded, to save memory and time.

        Arguments are checked at once, and on a GPU the first call loads the engines, which say how much memory they
        need. The other work starts when the first frame is requested. With several videos, the frames of one group of
        videos, which the bundle makes together, are taken before the next group is begun.
        """
        with self.executor.turns.taken():
            job, pictures = self._prepare(_as_list(image), parameters, latents, callback_on_step_end, progress)
        return VideoStream(
            cast("GeneratorType[Frames, None, None]", generate(self.executor, job, pictures)),
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

    def _prepare(
        self,
        images: list[ImageInput],
        arguments: ParameterArguments,
        latents: npt.ArrayLike | None,
        callback: StepCallback | None,
        progress: Progress | None,
    ) -> tuple[Job, list[PIL.Image.Image]]:
        """Check every argument, read the pictures, and then plan the memory, which may load the engines."""
        self.executor.require_open()
        unknown = set(arguments) - set(Parameters.fields())
        if unknown:
            raise TypeError(f"unexpected keyword argument {unknown.pop()!r}")
        if not images:
            raise ArgumentError("no picture was given")
        on_step_end = bind_callback(callback, self)
        parameters = Parameters(**arguments)  # type: ignore[arg-type]  # sigmas may be a list
        manifest = self.bundle.manifest
        request = memory_request(parameters, manifest, len(images))
        factor = manifest.model.vae_scale_factor
        latent_size = (request.height // factor, request.width // factor)
        shape = (request.videos, request.frames, manifest.model.latent_channels, *latent_size)  # [B, F, C, h, w]
        groups = groups_of(request.videos, manifest.ranges.batch)
        start = None if latents is None else checked_latents(latents, shape)
        notes: list[str] = []
        pictures = _read(images, parameters, request, notes.append)
        timings = Timings()
        with timed(timings, "load"):
            plan = self.executor.settle(request)  # checks the decode chunk before it loads
        settings = resolve(parameters, manifest, request, plan, seed=secrets.randbits(32))
        chunks = chunk_sizes(request.videos * request.frames, settings.decode_chunk_size, manifest.ranges.chunk)
        for note in notes:  # now that nothing is refused any more
            _log.warning(note)
        job = Job(
            settings,
            request,
            plan,
            latent_shape=shape,
            groups=groups,
            chunks=chunks,
            start=start,
            on_step_end=on_step_end,
            progress=progress or ignore_progress,
            timings=timings,
        )
        self.executor.watch(job.cancellation)
        return job, pictures

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


def _read(
    images: Sequence[ImageInput], parameters: Parameters, request: MemoryRequest, warn: Callable[[str], None]
) -> list[PIL.Image.Image]:
    """Read the pictures and fit them to the shape of the frames."""
    background = None if parameters.background is None else colour_of(parameters.background)
    pictures = []
    for number, image in enumerate(images, 1):
        name = name_of(image, number if len(images) > 1 else None)
        picture = load_image(image, icc=parameters.icc, background=background, name=name, warn=warn)
        height, width, mode = request.height, request.width, parameters.resize_mode
        pictures.append(framed(picture, height, width, mode, background=background, name=name, warn=warn))
    return pictures


def _as_list(image: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    return [*image] if isinstance(image, list | tuple) else [cast("ImageInput", image)]
