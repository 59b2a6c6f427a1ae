"""Picture to video: encode, denoise, decode, over whatever device the networks run on."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, Unpack, cast

import numpy as np
import numpy.typing as npt
import PIL.Image

import svd_trt
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.manifest import read_manifest
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import ArgumentError, BackendError, BundleError, OutputError
from svd_trt.runtime.backends import RunBackend, open_device
from svd_trt.runtime.denoise import StepCallback
from svd_trt.runtime.device import Device, Session
from svd_trt.runtime.generation import Frames, Generation, Progress
from svd_trt.runtime.images import ImageInput, load_image
from svd_trt.runtime.parameters import ParameterArguments, Parameters, resolve

__all__ = ["Frames", "OutputType", "Progress", "VideoOutput", "VideoPipeline"]

OutputType: TypeAlias = Literal["pil", "np", "latent"]


@dataclass(frozen=True)
class VideoOutput:
    """What a pipeline made.

    Attributes:
        frames: by output type: ``pil``, a list of pictures for each video; ``np``, uint8 ``[B, F, H, W, 3]``;
            ``latent``, float32 ``[B, F, 4, h, w]``, as diffusers' ``output_type="latent"``.
        parameters: what it was made with, every default decided; ``parameters.seed`` makes it again.
        backend: where it ran.
        timings: seconds by stage; ``steps`` is a list of each step's.
        metadata: what a file says of how it was made.
    """

    frames: Any
    parameters: Parameters
    backend: str
    timings: Mapping[str, Any]
    metadata: Mapping[str, Any]

    def save(self, path: str | os.PathLike[str]) -> list[str]:
        """Write each video to ``path`` (its suffix chooses the format), numbered where there are several.

        Returns the paths written.

        Raises:
            OutputError: unknown suffix, not writable, or the output is latents.
        """
        from svd_trt.runtime.video import check_output, numbered, open_writer

        videos = [np.stack([np.asarray(frame) for frame in video]) for video in self.frames]
        if videos[0].dtype != np.uint8:
            raise OutputError("latents cannot be written as a video; ask for output_type 'pil' or 'np'")
        paths = [numbered(path, index, len(videos)) for index in range(len(videos))]
        for target in paths:
            check_output(target)
        for target, video in zip(paths, videos, strict=True):
            height, width = video.shape[1:3]
            fps = self.parameters.fps
            with open_writer(target, height=height, width=width, fps=fps, metadata=self.metadata) as writer:
                writer.write(video)
        return paths


class VideoPipeline:
    """Runs a bundle: ``with VideoPipeline.open("bundle") as pipe: video = pipe("picture.png", seed=42)``.

    The counterpart of diffusers' ``StableVideoDiffusionPipeline``: the same checkpoint, picture, seed and arguments
    give the same video. Networks are loaded when first used and kept. Not to be used from two threads at once.
    """

    def __init__(self, bundle: Bundle, device: Device) -> None:
        self.bundle = bundle
        self.device = device
        self._sessions: dict[NetworkName, Session] = {}
        self._closed = False

    @classmethod
    def open(
        cls, bundle: str | os.PathLike[str] | Bundle, *, backend: RunBackend = "auto", verify: bool = True
    ) -> Self:
        """Open a bundle.

        Args:
            bundle: a directory that `svd_trt.build_bundle` wrote, or one already opened.
            backend: where to run; ``auto`` takes the fastest that works here.
            verify: check contents against their hashes, which reads the whole bundle.

        Raises:
            BundleError: the bundle is missing, damaged or too new.
            BackendError: the backend cannot run here.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        return cls(opened, open_device(backend))

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
        run = self._prepare(image, parameters, latents, progress)
        result = run.denoise(callback_on_step_end)
        if output_type == "latent":
            return VideoOutput(result, run.parameters, self.device.name, run.timings, self._about(run))
        frames = np.concatenate(list(run.decode(result)))
        frames = frames.reshape(run.num_videos, run.frames, *frames.shape[1:])
        if output_type == "np":
            return VideoOutput(frames, run.parameters, self.device.name, run.timings, self._about(run))
        videos = [[PIL.Image.fromarray(frame) for frame in video] for video in frames]
        return VideoOutput(videos, run.parameters, self.device.name, run.timings, self._about(run))

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
        run = self._prepare(image, parameters, latents, progress)
        return VideoStream(run, callback_on_step_end, self._about(run))

    def close(self) -> None:
        """Release networks and device; harmless when repeated, and final."""
        self._closed = True
        while self._sessions:
            self._sessions.popitem()[1].close()
        self.device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def session(self, network: NetworkName) -> Session:
        """The loaded network, loading it first where need be.

        Raises:
            BackendError: the pipeline is closed.
            BundleError: the bundle was built again since it was opened, so its networks no longer belong together.
        """
        if self._closed:
            raise BackendError("the pipeline is closed; open it again with VideoPipeline.open")
        if network not in self._sessions:
            if read_manifest(self.bundle.path) != self.bundle.manifest:
                raise BundleError(f"{self.bundle.path} was built again while it was open; open it again")
            self._sessions[network] = self.device.open(self.bundle, network)
        return self._sessions[network]

    def _about(self, run: Generation) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {
            "svd_trt": svd_trt.__version__,
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
    ) -> Generation:
        unknown = set(parameters) - set(Parameters.fields())
        if unknown:
            raise TypeError(f"unexpected keyword argument {unknown.pop()!r}")
        images: list[ImageInput] = [*image] if isinstance(image, list | tuple) else [cast(ImageInput, image)]
        if not images:
            raise ArgumentError("no picture was given")
        checked = Parameters(**parameters)  # type: ignore[arg-type]  # sigmas may come as a list
        resolved = resolve(checked, self.bundle.manifest, pictures=len(images), seed=secrets.randbits(32))
        pictures = [load_image(one) for one in images]
        return Generation(self, resolved, pictures, latents, progress or (lambda *_: None))


class VideoStream(Iterator[Frames]):
    """Frames of a run, one uint8 ``[H, W, 3]`` at a time, all of the first video, then of the next.

    Attributes:
        parameters: what the video is made with, every default decided.
        num_videos: how many videos there are.
        timings: seconds by stage, complete after the last frame.
        metadata: what a file says of how it was made.
    """

    def __init__(self, run: Generation, callback: StepCallback | None, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.parameters = run.parameters
        self.num_videos = run.num_videos
        self.timings: Mapping[str, Any] = run.timings
        self.backend = run.pipe.device.name
        self._frames = self._generate(run, callback)

    def __next__(self) -> Frames:
        return next(self._frames)

    def close(self) -> None:
        """Give up the rest."""
        self._frames.close()

    @staticmethod
    def _generate(run: Generation, callback: StepCallback | None) -> Any:
        for chunk in run.decode(run.denoise(callback)):
            yield from chunk
