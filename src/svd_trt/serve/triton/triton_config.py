"""``config.pbtxt``: what Triton must know about a model, in the text format of protobuf."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from svd_trt.engine.manifest import Manifest
from svd_trt.errors import ArgumentError
from svd_trt.runtime.backends import Provider
from svd_trt.serve.triton.triton_tensors import OUTPUTS, TensorInfo, input_tensors

__all__ = ["DEFAULT_QUEUE", "Gpus", "ModelOptions", "check_name", "config_text"]

Gpus: TypeAlias = Literal["auto", "none"] | tuple[int, ...]

DEFAULT_QUEUE = 16

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_GPU_PROVIDERS = ("cuda", "tensorrt")


@dataclass(frozen=True)
class ModelOptions:
    """How Triton runs a model.

    Attributes:
        gpus: indexes of the GPUs that run it; ``auto`` is each GPU of the machine if the bundle can run there, and
            otherwise the CPU; ``none`` is the CPU.
        instances: pipelines on each GPU, or on the CPU. Each has networks and buffers of its own.
        max_queue: requests that wait at most; Triton refuses more.
        provider: of ONNX Runtime, instead of the bundle's engines.
        vram_budget: bytes of device memory of each instance.
    """

    gpus: Gpus = "auto"
    instances: int = 1
    max_queue: int = DEFAULT_QUEUE
    provider: Provider | None = None
    vram_budget: int | None = None


def check_name(name: str) -> str:
    """``name`` if it can be that of a model.

    Raises:
        ArgumentError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ArgumentError(
            f"{name!r} cannot be the name of a Triton model; "
            "give one of letters, digits, dots, hyphens and underscores with --name"
        )
    return name


def config_text(name: str, manifest: Manifest, options: ModelOptions) -> str:
    """The content of ``config.pbtxt`` for a bundle with ``manifest``.

    Raises:
        ArgumentError: GPUs are named that cannot run this bundle.
    """
    # Triton has no queue policy without its batcher. With a batch size of 0 the batcher only queues: every request
    # runs alone, and its tensors have no batch dimension.
    lines = [
        f'name: "{name}"',
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        f"dynamic_batching {{ default_queue_policy {{ max_queue_size: {options.max_queue} }} }}",
        _instance_group(manifest, options),
        *(_tensor("input", tensor, " optional: true") for tensor in input_tensors(manifest.host.arguments)),
        *(_tensor("output", tensor) for tensor in OUTPUTS),
        *_parameters(options),
    ]
    return "\n".join(lines) + "\n"


def _instance_group(manifest: Manifest, options: ModelOptions) -> str:
    runs_on_gpu = manifest.tensorrt is not None or options.provider in _GPU_PROVIDERS
    if isinstance(options.gpus, tuple):
        if not runs_on_gpu:
            raise ArgumentError(
                "the bundle has no engines to run on a GPU; leave --gpus out to run it on the CPU, or add "
                "--provider cuda"
            )
        kind = f"kind: KIND_GPU gpus: {list(options.gpus)}"
    elif options.gpus == "auto" and runs_on_gpu:
        kind = "kind: KIND_AUTO"
    else:
        kind = "kind: KIND_CPU"
    return f"instance_group {{ {kind} count: {options.instances} }}"


def _tensor(field: str, tensor: TensorInfo, more: str = "") -> str:
    return f'{field} {{ name: "{tensor.name}" data_type: TYPE_{tensor.kind} dims: {list(tensor.shape)}{more} }}'


def _parameters(options: ModelOptions) -> Iterator[str]:
    for key in ("provider", "vram_budget"):
        if (value := getattr(options, key)) is not None:
            yield f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(str(value))} }} }}"
