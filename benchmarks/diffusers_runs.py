"""diffusers' pipeline, run as its documentation says, with a clock at the border of each stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from svd_trt.benchmarks.clock import clock_for
from svd_trt.benchmarks.protocol import Job
from svd_trt.benchmarks.runs import Run, Video
from svd_trt.benchmarks.schema import Stage
from svd_trt.export.reference import load_pipeline

__all__ = ["DiffusersRun"]

_LOW_MEMORY_CHUNK = 2


class DiffusersRun(Run):
    """``StableVideoDiffusionPipeline``; ``mode`` is ``eager``, ``compile`` or ``low-memory``."""

    def __init__(self, job: Job, mode: str) -> None:
        self.subject, self.mode, self.gpu = job.subject, mode, job.gpu
        self.threads, self.exact = job.threads, job.exact
        self.picture = job.picture
        self.clock = clock_for(gpu=job.gpu)
        self.spans: list[tuple[Stage, Any, Any]] = []
        self.begins: list[Any] = []
        self.ends: list[Any] = []

    def load(self) -> None:
        import torch

        torch.set_num_threads(self.threads)
        if self.exact:
            torch.backends.cudnn.allow_tf32 = False  # on by default, and 10 bits of mantissa are not fp32
            torch.backends.cuda.matmul.allow_tf32 = False
        dtype = torch.float16 if self.subject.precision == "fp16" else torch.float32
        pipe = load_pipeline(self.subject.model, dtype)
        pipe.set_progress_bar_config(disable=True)
        if self.mode == "low-memory":
            pipe.unet.enable_forward_chunking()
            if self.gpu:
                pipe.enable_model_cpu_offload()
        elif self.gpu:
            pipe.to("cuda")
        if self.mode == "compile":
            options: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True} if self.gpu else {}
            pipe.unet = torch.compile(pipe.unet, **options)
        self._clock(pipe.video_processor, "preprocess", "image_encode")  # the picture's preparation, as for svd-trt
        self._clock(pipe, "_encode_image", "image_encode")
        self._clock(pipe, "_encode_vae_image", "vae_encode")
        self._clock(pipe, "decode_latents", "decode")
        scale = pipe.scheduler.scale_model_input

        def begin(*args: Any, **kwargs: Any) -> Any:  # the first thing of each step
            self.begins.append(self.clock.mark())
            return scale(*args, **kwargs)

        pipe.scheduler.scale_model_input = begin
        self.pipe = pipe

    def make(self, write: Callable[[Any], None]) -> Video:
        import torch

        s = self.subject
        self.spans, self.begins, self.ends = [], [], []
        started, start = time.perf_counter(), self.clock.mark()
        with torch.no_grad():
            frames = self.pipe(
                self._image(),
                height=s.height,
                width=s.width,
                num_frames=s.frames,
                num_inference_steps=s.steps,
                decode_chunk_size=_LOW_MEMORY_CHUNK if self.mode == "low-memory" else s.decode_chunk_size,
                generator=torch.manual_seed(s.seed),
                callback_on_step_end=self._end,
                output_type="pil",
            ).frames[0]
        made = np.stack([np.asarray(frame) for frame in frames])
        write(made)
        self.clock.settle()
        seconds = self.clock.seconds
        stages: dict[Stage, float] = {"denoise": seconds(self.begins[0], self.ends[-1])}
        for stage, begin, end in self.spans:
            stages[stage] = stages.get(stage, 0.0) + seconds(begin, end)
        steps = [seconds(begin, end) for begin, end in zip(self.begins, self.ends, strict=True)]
        return Video(made, stages, steps, started + seconds(start, self.begins[0]))

    def _image(self) -> Any:
        from diffusers.utils import load_image

        return load_image(self.picture)

    def _end(self, _pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        self.ends.append(self.clock.mark())
        return values

    def _clock(self, owner: Any, method: str, stage: Stage) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.clock.mark()
            result = inner(*args, **kwargs)
            self.spans.append((stage, begin, self.clock.mark()))
            return result

        setattr(owner, method, timed)
