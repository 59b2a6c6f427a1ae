"""Shared parts of the training stages: learning rate, resumable state, averaged weights, a log."""

from __future__ import annotations

import csv
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def autocast() -> torch.autocast:
    """bfloat16 in the forward pass, float32 weights: twice as fast on CPUs with AVX512-BF16, without loss scaling.

    Other CPUs would be slower with it, and compute in float32.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(torch.cpu.get_capabilities().get("avx512_bf16")))


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 100, floor: float = 0.02) -> float:
    """Linear warm-up, then half a cosine down to `floor` times the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def save_state(path: Path, step: int, **parts: Any) -> None:
    """Saves the state_dict of each part, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, fresh)
    fresh.replace(path)


def load_state(path: Path, **parts: Any) -> int:
    """Restores the parts from the file of `save_state`. Returns the step to resume at, 0 if there is no file."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


class Average:
    """Exponential moving average of a module's weights, over a shorter time in the first steps."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        names = list(self.shadow)
        weights = module.state_dict()
        torch._foreach_lerp_([self.shadow[k] for k in names], [weights[k] for k in names], 1 - decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.shadow

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, value in state.items():
            self.shadow[name].copy_(value)


class Log:
    """Appends mean values to a CSV every `every` steps and prints them to stderr."""

    def __init__(self, path: Path, steps: int, title: str, every: int = 20) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.steps, self.title, self.every = path, steps, title, every
        self.sums: dict[str, list[float]] = {}
        self.since = time.perf_counter()

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.sums.setdefault(name, []).append(value)
        if (step + 1) % self.every and step + 1 != self.steps:
            return
        means = {name: sum(column) / len(column) for name, column in self.sums.items()}
        seconds = (time.perf_counter() - self.since) / max(map(len, self.sums.values()))
        self.sums, self.since = {}, time.perf_counter()
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *means, "seconds_per_step"])
            writer.writerow([step + 1, *(f"{v:.6g}" for v in means.values()), f"{seconds:.3f}"])
        text = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(f"{self.title} {step + 1}/{self.steps}  {text}  {seconds:.2f} s/step", file=sys.stderr, flush=True)


class _FlatConv3d(torch.nn.Conv3d):
    """A (3,1,1) convolution, computed as a 2-D one with the same weights and the same result."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        padding = (self.kernel_size[0] // 2, 0)
        flat = torch.nn.functional.conv2d(hidden_states.flatten(3), self.weight[..., 0], self.bias, padding=padding)
        return flat.reshape(*flat.shape[:3], *hidden_states.shape[3:])


def flatten_temporal_convolutions(module: torch.nn.Module) -> None:
    """For training only: torch 2.13 computes their bfloat16 weight gradient slowly on CPUs, and it is NaN."""
    for part in module.modules():
        if type(part) is torch.nn.Conv3d and part.kernel_size[1:] == (1, 1):
            part.__class__ = _FlatConv3d


def share_cores() -> None:
    """Uses fewer threads while other processes run (Linux): threads that wait for each other would be very slow."""
    cores = len(os.sched_getaffinity(0))
    try:
        stat = Path("/proc/stat").read_text()
    except OSError:
        return
    running = int(stat.split("procs_running")[1].split()[0])  # includes this thread
    torch.set_num_threads(max(1, min(cores, cores - running + 1)))


class _OneTokenAttention:
    """Cross-attention to a single token. The softmax is 1, so the result is the value of the token."""

    def __call__(
        self, attn: Any, _queries: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        answer: torch.Tensor = attn.to_out[0](attn.to_v(encoder_hidden_states))
        return answer  # [B,1,C], broadcast over the queries


def speed_up_attention(unet: Any) -> None:
    """For training only: attention with the same results that is faster for such short sequences."""
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(
        {n: _OneTokenAttention() if "attn2" in n else AttnProcessor() for n in unet.attn_processors}
    )
