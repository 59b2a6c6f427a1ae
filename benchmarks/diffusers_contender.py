"""diffusers' pipeline, run as its documentation says, with a clock around each stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from svd_trt.benchmarks.contenders import Job, Runner, Video
from svd_trt.benchmarks.measuring import clock_for
from svd_trt.benchmarks.results import Stage
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.reference import load_pipeline

__all__ = ["DiffusersRunner"]

_LOW_MEMORY_CHUNK = 2


class DiffusersRunner(Runner):
    """``StableVideoDiffusionPipeline``; ``mode`` is ``eager``, ``compile`` or ``low-memory``."""

    def __init__(self, job: Job, mode: str) -> None:
        self.job, self.mode = job, mode
        self.clock = clock_for(gpu=job.gpu)
        self._spans: list[tuple[Stage, Any, Any]] = []
        self._step_starts: list[Any] = []
        self._step_ends: list[Any] = []

    def load(self) -> None:
        import torch

        torch.set_num_threads(self.job.threads)
        if self.job.exact:
            torch.backends.cudnn.allow_tf32 = False  # on by default, and 10 bits of mantissa are not fp32
            torch.backends.cuda.matmul.allow_tf32 = False
        workload, gpu = self.job.workload, self.job.gpu
        pipe = load_pipeline(
            open_checkpoint(workload.model), torch.float16 if workload.precision == "fp16" else torch.float32
        )
        pipe.set_progress_bar_config(disable=True)
        if self.mode == "low-memory":
            pipe.unet.enable_forward_chunking()
            if gpu:
                pipe.enable_model_cpu_offload()
        elif gpu:
            pipe.to("cuda")
        if self.mode == "compile":
            options: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True} if gpu else {}
            pipe.unet = torch.compile(pipe.unet, **options)
        self._time_stages(pipe)
        self.pipe = pipe

    def make_video(self, write: Callable[[Any], None]) -> Video:
        import torch
        from diffusers.utils import load_image

        workload = self.job.workload
        self._spans, self._step_starts, self._step_ends = [], [], []
        started, start = time.perf_counter(), self.clock.event()
        with torch.no_grad():
            pictures = self.pipe(
                load_image(self.job.picture),
                height=workload.height,
                width=workload.width,
                num_frames=workload.frames,
                num_inference_steps=workload.steps,
                decode_chunk_size=_LOW_MEMORY_CHUNK if self.mode == "low-memory" else workload.decode_chunk_size,
                generator=torch.manual_seed(workload.seed),
                callback_on_step_end=self._end_step,
                output_type="pil",
            ).frames[0]
        frames = np.stack([np.asarray(picture) for picture in pictures])
        write(frames)
        self.clock.wait()
        seconds = self.clock.seconds
        stages: dict[Stage, float] = {"denoise": seconds(self._step_starts[0], self._step_ends[-1])}
        for stage, begin, end in self._spans:
            stages[stage] = stages.get(stage, 0.0) + seconds(begin, end)
        steps = [seconds(begin, end) for begin, end in zip(self._step_starts, self._step_ends, strict=True)]
        return Video(frames, stages, steps, started + seconds(start, self._step_starts[0]))

    def _time_stages(self, pipe: Any) -> None:
        """Wrap the pipeline's methods so that each call records events."""
        # For svd-trt, too, preparing the picture is part of encoding it.
        self._time_method(pipe.video_processor, "preprocess", "image_encode")
        self._time_method(pipe, "_encode_image", "image_encode")
        self._time_method(pipe, "_encode_vae_image", "vae_encode")
        self._time_method(pipe, "decode_latents", "decode")
        scale = pipe.scheduler.scale_model_input

        def start_step(*args: Any, **kwargs: Any) -> Any:  # scaling is the first thing in each step
            self._step_starts.append(self.clock.event())
            return scale(*args, **kwargs)

        pipe.scheduler.scale_model_input = start_step

    def _end_step(self, _pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        self._step_ends.append(self.clock.event())
        return values

    def _time_method(self, owner: Any, method: str, stage: Stage) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.clock.event()
            result = inner(*args, **kwargs)
            self._spans.append((stage, begin, self.clock.event()))
            return result

        setattr(owner, method, timed)
