"""What a pipeline hands out: whole videos, or frames as they are decoded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from svd_trt.engine.memory import MemoryPlan
from svd_trt.errors import OutputError
from svd_trt.runtime.denoise import StepCallback
from svd_trt.runtime.generation import Frames, Generation
from svd_trt.runtime.parameters import Parameters

__all__ = ["VideoOutput", "VideoStream"]


@dataclass(frozen=True)
class VideoOutput:
    """What a pipeline made.

    Attributes:
        frames: by output type: ``pil``, a list of pictures for each video; ``np``, uint8 ``[B, F, H, W, 3]``;
            ``latent``, float32 ``[B, F, 4, h, w]``, as diffusers' ``output_type="latent"``.
        parameters: what it was made with, every default decided; ``parameters.seed`` makes it again.
        backend: where it ran.
        memory: how the device's memory was used.
        timings: seconds by stage; ``steps`` is a list of each step's. Stages overlap.
        metadata: what a file says of how it was made.
    """

    frames: Any
    parameters: Parameters
    backend: str
    memory: MemoryPlan
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


class VideoStream(Iterator[Frames]):
    """Frames of a run, one uint8 ``[H, W, 3]`` at a time, all of the first video, then of the next.

    Attributes:
        parameters: what the video is made with, every default decided.
        num_videos: how many videos there are.
        memory: how the device's memory is used.
        timings: seconds by stage, complete after the last frame.
        metadata: what a file says of how it was made.
    """

    def __init__(self, run: Generation, callback: StepCallback | None, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.parameters = run.parameters
        self.num_videos = run.num_videos
        self.timings: Mapping[str, Any] = run.timings
        self.backend = run.pipe.device.name
        self.memory = run.plan
        self._frames = self._generate(run, callback)

    def __next__(self) -> Frames:
        return next(self._frames)

    def close(self) -> None:
        """Give up the rest."""
        self._frames.close()

    @staticmethod
    def _generate(run: Generation, callback: StepCallback | None) -> Any:
        with run.pipe.explaining(run):
            run.pipe.begin(run)
            for chunk in run.decode(run.denoise(callback)):
                yield from chunk
