"""Picture to video: encode, denoise, decode, over whatever device the networks run on."""

from __future__ import annotations

import dataclasses
import os
import secrets
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, Self, TypeAlias, Unpack, cast

import numpy as np
import numpy.typing as npt
import PIL.Image

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.memory import MemoryPlan, MemoryRequest, plan_memory
from svd_trt.errors import ArgumentError, BackendError, BudgetError, DeviceMemoryError
from svd_trt.runtime.backends import Provider, RunBackend, open_device
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.decode import ChunkedDecode
from svd_trt.runtime.denoise import Floats, Loop, StepCallback
from svd_trt.runtime.device import Device
from svd_trt.runtime.engines import CLOSED, Engines
from svd_trt.runtime.generation import Generation, Progress
from svd_trt.runtime.images import ImageInput, load_image
from svd_trt.runtime.output import VideoOutput, VideoStream
from svd_trt.runtime.parameters import ParameterArguments, Parameters, resolve
from svd_trt.units import format_bytes
from svd_trt.version import __version__

__all__ = ["OutputType", "VideoPipeline"]

OutputType: TypeAlias = Literal["pil", "np", "latent"]

_OURS = 0.95  # of what is free; the rest is for what engines take beside what their builder reports
_LESS = 0.9  # of what was too much, to try next


class VideoPipeline(Closeable):
    """Runs a bundle: ``with VideoPipeline.open("bundle") as pipe: video = pipe("picture.png", seed=42)``.

    The counterpart of diffusers' ``StableVideoDiffusionPipeline``: the same checkpoint, picture, seed and arguments
    give the same video. Networks are loaded when first used. Not to be used from two threads at once; several
    pipelines of one bundle, on one GPU or on several, can be.
    """

    def __init__(self, bundle: Bundle, device: Device, vram_budget: int | None = None) -> None:
        self.bundle = bundle
        self.device = device
        self.engines = Engines(bundle, device)
        self.vram_budget = vram_budget
        device.set_budget(vram_budget)
        self._closed = False
        self._denoising = False
        self._loop: tuple[object, Loop] | None = None
        self._decoding: weakref.WeakSet[ChunkedDecode] = weakref.WeakSet()

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
            bundle: a directory that `svd_trt.build_bundle` wrote, or one already opened.
            backend: where to run; ``auto`` takes the fastest that works here.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            provider: of ONNX Runtime: ``cpu``, ``cuda`` or ``tensorrt``.
            vram_budget: bytes of device memory to stay in; None is 95 % of what is free on a GPU, and no limit on the
                CPU. The CUDA context's own few hundred megabytes come on top. On the CPU a budget chooses the same
                way to run as on a GPU.
            verify: check contents against their hashes, which reads the whole bundle.

        Raises:
            BundleError: the bundle is missing, damaged or too new.
            BackendError: the backend cannot run here, or the bundle's engines cannot.
            ArgumentError: the device or the budget is malformed.
        """
        if vram_budget is not None and (type(vram_budget) is not int or vram_budget < 1):
            raise ArgumentError(f"vram_budget must be a whole number of bytes above 0, not {vram_budget!r}")
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        where = open_device(opened, backend, device, provider)
        try:
            return cls(opened, where, vram_budget)
        except BaseException:
            where.close()
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
        """Make a video of each picture.

        Args:
            image: a path, a PIL image, an array (uint8, or float in [0, 1]; ``[H, W, 3]``), or a list of those.
            output_type: ``pil``, ``np`` (uint8) or ``latent``.
            latents: noise of unit variance to start from, ``[B, F, 4, h, w]``, instead of the seed's.
            callback_on_step_end: called as ``f(pipe, step, timestep, {"latents": array})`` after each step; may
                return ``{"latents": array}`` to go on from. An exception in it stops the run.
            progress: see `Progress`.
            **parameters: see `svd_trt.runtime.parameters.Parameters`: diffusers' names and defaults.

        Raises:
            ArgumentError: an argument is malformed or outside what the bundle was built for.
            ImageError: a picture cannot be read.
        """
        if output_type not in ("pil", "np", "latent"):
            raise ArgumentError(f"output_type must be pil, np or latent, not {output_type!r}")
        run = self._prepare(image, parameters, latents, progress, callback_on_step_end)
        with self.explaining(run):
            self.begin(run)
            made: Any = run.denoise(callback_on_step_end)
            if output_type != "latent":
                made = np.concatenate(list(run.decode(made)))
                made = made.reshape(run.num_videos, run.frames, *made.shape[1:])
        if output_type == "pil":
            made = [[PIL.Image.fromarray(frame) for frame in video] for video in made]
        return VideoOutput(made, run.parameters, self.device.name, run.plan, run.timings, self._about(run))

    def stream(
        self,
        image: ImageInput | Sequence[ImageInput],
        *,
        latents: npt.ArrayLike | None = None,
        callback_on_step_end: StepCallback | None = None,
        progress: Progress | None = None,
        **parameters: Unpack[ParameterArguments],
    ) -> VideoStream:
        """As a call, but frames are handed out as their chunk is decoded: the whole video is never in memory.

        Arguments are checked at once; the work starts with the first frame that is asked for.
        """
        run = self._prepare(image, parameters, latents, progress, callback_on_step_end)
        return VideoStream(run, callback_on_step_end, self._about(run))

    def close(self) -> None:
        """Release networks and device; harmless when repeated, and final.

        Raises:
            ArgumentError: called from a callback of a run that goes on.
        """
        self._require_idle("close")
        self._closed = True
        with ExitStack() as stack:  # the later ones are done even if an earlier one fails
            stack.callback(self.device.close)
            stack.callback(self.engines.close)
            self._abandon(BackendError(CLOSED))

    def release(self) -> None:
        """Give the device's memory back: networks and buffers come again when they are needed. Ends open streams.

        Raises:
            ArgumentError: called from a callback of a run that goes on.
        """
        self._require_idle("release")
        with ExitStack() as stack:
            stack.callback(self.device.trim)
            stack.callback(self.engines.release)
            self._abandon(BackendError("the pipeline's memory was released; ask for the video again"))

    @contextmanager
    def denoising(self) -> Iterator[None]:
        """A run of the loop, whose memory nothing else may use until it ends.

        Raises:
            ArgumentError: called from a callback of such a run.
        """
        self._require_idle("start another video with")
        self._denoising = True
        try:
            yield
        finally:
            self._denoising = False

    def _require_idle(self, verb: str) -> None:
        if self._denoising:
            raise ArgumentError(
                f"a callback cannot {verb} the pipeline that calls it; raise an exception to end the run, "
                "or open another pipeline"
            )

    def plan(self, request: MemoryRequest) -> MemoryPlan:
        """How ``request`` would be run now, within the budget.

        Raises:
            BudgetError: no plan needs so little.
        """
        manifest = self.bundle.manifest
        if self.vram_budget is not None:
            return plan_memory(manifest, request, self.vram_budget)
        fastest, free = plan_memory(manifest, request, None), self.device.free_bytes()
        if fastest.total_bytes is None or free is None:
            return fastest
        return plan_memory(manifest, request, int(free * _OURS))

    def loop(self, passes: list[dict[str, Floats]], shape: tuple[int, ...], steps: int) -> Loop:
        """The loop's memory for these shapes; kept until others are wanted."""
        key = (shape, [{name: array.shape for name, array in inputs.items()} for inputs in passes])
        if self._loop is not None and self._loop[0] == key and steps <= self._loop[1].steps:
            return self._loop[1]
        self._drop_loop()
        made = Loop(self.device, passes, shape, steps)
        self._loop = (key, made)
        return made

    def begin(self, run: Generation) -> None:
        """Follow the plan of ``run``; what an earlier run of another shape holds is given back."""
        self._require_idle("start another video with")
        if self._loop is not None and self._loop[1].shape[1:] != run.latent_shape[1:]:
            self._drop_loop()
        self.engines.follow(run.plan)

    def watch(self, decoding: ChunkedDecode) -> None:
        """Have ``decoding`` end when the pipeline does."""
        self._decoding.add(decoding)

    @contextmanager
    def explaining(self, run: Generation) -> Iterator[None]:
        """Where memory runs out, give back all that is held and say what to do."""
        try:
            yield
        except DeviceMemoryError as error:
            with suppress(BackendError):
                self.release()
            error.advise(self._advice(run, error))
            raise

    def _advice(self, run: Generation, error: DeviceMemoryError) -> str:
        """Which setting to use, now that everything is free that can be."""
        free = [size for size in (self.vram_budget, self.device.free_bytes(), run.plan.total_bytes) if size is not None]
        within = int(min(free) * _LESS) if free else error.free
        try:
            plan = plan_memory(self.bundle.manifest, run.request, within)
        except BudgetError as unfit:
            return str(unfit)
        assert plan.total_bytes is not None, "without figures there is no plan within a budget"
        size = format_bytes(plan.total_bytes, round_up=True)
        return f"try --vram-budget '{size}' (vram_budget={plan.total_bytes}): {plan.words()}"

    def _abandon(self, error: BackendError) -> None:
        with ExitStack() as stack:
            stack.callback(self._drop_loop)
            for decoding in list(self._decoding):
                stack.callback(decoding.abort, error)

    def _drop_loop(self) -> None:
        if self._loop is not None:
            self.device.synchronize()
            self._loop[1].close()
            self._loop = None

    def _about(self, run: Generation) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {
            "svd_trt": __version__,
            "model": manifest.source.model,
            "precision": manifest.precision,
            "backend": self.device.name,
            **run.parameters.as_dict(),
        }

    def _prepare(
        self,
        image: ImageInput | Sequence[ImageInput],
        parameters: ParameterArguments,
        latents: npt.ArrayLike | None,
        progress: Progress | None,
        callback: StepCallback | None,
    ) -> Generation:
        if self._closed:
            raise BackendError(CLOSED)
        unknown = set(parameters) - set(Parameters.fields())
        if unknown:
            raise TypeError(f"unexpected keyword argument {unknown.pop()!r}")
        images: list[ImageInput] = [*image] if isinstance(image, list | tuple) else [cast(ImageInput, image)]
        if not images:
            raise ArgumentError("no picture was given")
        if callback is not None and not callable(callback):
            raise ArgumentError(f"callback_on_step_end must be a function, not {callback!r}")
        checked = Parameters(**parameters)  # type: ignore[arg-type]  # sigmas may come as a list
        resolved = resolve(checked, self.bundle.manifest, pictures=len(images), seed=secrets.randbits(32))
        request = _request(resolved, len(images), checked.decode_chunk_size)
        plan = self.plan(request)
        resolved = dataclasses.replace(resolved, decode_chunk_size=plan.decode_chunk_size)
        pictures = [load_image(one) for one in images]
        return Generation(self, resolved, pictures, latents, progress or (lambda *_: None), plan, request)


def _request(parameters: Parameters, pictures: int, decode_chunk_size: int | None) -> MemoryRequest:
    """What ``parameters`` ask of memory."""
    p = parameters
    assert p.num_frames is not None
    assert p.height is not None
    assert p.width is not None
    videos = pictures * p.num_videos_per_prompt
    return MemoryRequest(
        frames=p.num_frames,
        height=p.height,
        width=p.width,
        videos=videos,
        pictures=pictures,
        guided=max(p.min_guidance_scale, p.max_guidance_scale) > 1,
        decode_chunk_size=decode_chunk_size,
    )
