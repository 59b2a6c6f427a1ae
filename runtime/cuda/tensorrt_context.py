"""One execution context of a TensorRT engine: its profile, and the shapes, memory and addresses that it was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from svd_trt.engine.spec import NetworkSpec
from svd_trt.errors import BackendError, first_line
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.cuda.buffers import CudaBuffer
from svd_trt.runtime.cuda.cuda_device import CudaDevice
from svd_trt.runtime.cuda.tensorrt_errors import Errors

__all__ = ["EngineContext"]


class EngineContext(Closeable):
    """An execution context that keeps one profile. Nothing is passed to TensorRT that it has already.

    Attributes:
        profile: index of the profile.
        own_graphs: TensorRT for RTX captures its runs itself.
    """

    def __init__(
        self,
        handle: Any,
        device: CudaDevice,
        spec: NetworkSpec,
        errors: Errors,
        *,
        profile: int,
        profile_bytes: int,
        own_graphs: bool,
    ) -> None:
        """Take over ``handle`` and select its profile, whose largest sizes need ``profile_bytes`` of activations.

        Raises:
            BackendError: TensorRT refuses the profile.
        """
        self.profile = profile
        self.own_graphs = own_graphs
        self._context: Any = handle
        self._device = device
        self._spec = spec
        self._errors = errors
        self._profile_bytes = profile_bytes
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._needs = 0
        self._block_moves = -1
        errors.attach(handle)
        errors.clear()
        # The switch may copy on the stream. The runs are on the same stream, so they come after it.
        if not self._context.set_optimization_profile_async(profile, device.compute.handle):
            raise self._failure("selecting a profile", f"TensorRT has no profile {profile} of {spec.name}")

    def needs(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Set the shapes of the inputs; return the bytes of activations that a run of them needs.

        Raises:
            BackendError: the profile does not hold them, or TensorRT does not say how much they need.
        """
        if shapes != self._shapes:
            self._shapes = {}  # if one of them is refused, all are set again next time
            self._block_moves = -1
            for name, shape in shapes.items():
                self._errors.clear()
                if not self._context.set_input_shape(name, shape):
                    message = f"{self._spec.name} does not take {name} of shape {list(shape)}"
                    raise self._failure("setting shapes", message)
            self._needs = self._ask_needs()
            self._shapes = dict(shapes)
        return self._needs

    def run(self, buffers: Mapping[str, CudaBuffer], stream: int) -> None:
        """Enqueue one run on ``stream``.

        Raises:
            DeviceMemoryError: the activations do not fit.
            BackendError: TensorRT refuses a shape, or the run failed.
        """
        self._set_shapes(buffers)
        self._set_memory()
        self._set_addresses(buffers)
        self._errors.clear()
        if not self._context.execute_async_v3(stream):
            raise self._failure("running an engine", f"TensorRT failed in {self._spec.name}")

    def capturable(self, stream: int) -> bool:
        """Whether TensorRT for RTX lets a run with the present shapes be captured. It must have run with them once."""
        return bool(self._context.is_stream_capturable(stream))

    def close(self) -> None:
        """Release the context after its last run, even if an error's traceback still refers to this object."""
        self._context = None

    def _set_shapes(self, buffers: Mapping[str, CudaBuffer]) -> None:
        shapes = {tensor.name: buffers[tensor.name].shape for tensor in self._spec.inputs}
        changed = shapes != self._shapes
        self.needs(shapes)
        if changed:
            self._check_outputs(buffers)

    def _ask_needs(self) -> int:
        self._check_inputs()
        self._errors.clear()
        needs = int(self._context.update_device_memory_size_for_shapes())
        if needs == 0 and self._profile_bytes > 0:  # so TensorRT reports that the call failed
            message = f"TensorRT does not say how much memory {self._spec.name} needs"
            raise self._failure("laying out activations", message)
        return needs

    def _check_inputs(self) -> None:
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise BackendError(f"TensorRT cannot infer the shapes of {self._spec.name}: {first_line(error)}") from error
        if missing:
            raise BackendError(f"TensorRT does not know the shapes of {', '.join(missing)} in {self._spec.name}")

    def _check_outputs(self, buffers: Mapping[str, CudaBuffer]) -> None:
        for tensor in self._spec.outputs:
            given, wanted = buffers[tensor.name].shape, tuple(self._context.get_tensor_shape(tensor.name))
            if given != wanted:
                self._shapes = {}
                raise BackendError(f"{self._spec.name} gives {tensor.name} of shape {wanted}, not {given}")

    def _set_memory(self) -> None:
        block = self._device.activations
        block.reserve(self._needs, f"activations of {self._spec.name}")
        if self._needs and self._block_moves != block.moves:
            self._errors.clear()
            self._context.set_device_memory(block.address, block.nbytes)
            if self._errors.recorded:  # the call returns nothing, and keeps the old memory if it fails
                message = f"TensorRT does not take memory for {self._spec.name}"
                raise self._failure("setting the activations' memory", message)
            self._block_moves = block.moves

    def _set_addresses(self, buffers: Mapping[str, CudaBuffer]) -> None:
        for name, buffer in buffers.items():
            if self._addresses.get(name) != buffer.address:
                self._errors.clear()
                if not self._context.set_tensor_address(name, buffer.address):
                    message = f"{self._spec.name} does not take an address for {name}"
                    raise self._failure("setting addresses", message)
                self._addresses[name] = buffer.address

    def _failure(self, call: str, message: str) -> BackendError:
        return self._errors.failure(self._device.context, call, f"{message}: {self._errors.reason}", self._spec.name)
