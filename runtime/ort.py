"""ONNX Runtime on the CPU: the leaf that runs everywhere. Enqueuing is running here, so every mark is in the past."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.errors import BackendError, first_line
from svd_trt.runtime.backends import CPU_NAME
from svd_trt.runtime.closeable import Closeable, closed_error
from svd_trt.runtime.device import Array, Buffer, HostBuffer, Mark

__all__ = ["CpuBuffer", "CpuDevice", "CpuMark", "CpuSession", "load_onnx", "run_bound", "usable_processors"]

_BINDINGS_KEPT = 4  # two steps of the loop, in two passes each
_ERRORS_ONLY = 3  # onnxruntime's log level: its warnings speak of graph details that no user can act on


class CpuBuffer(Closeable):
    """A numpy array, which stays the same one.

    Attributes:
        flat: a view of it with one axis.
        number: no other buffer ever has it; what is remembered of a buffer is found by it.
    """

    _numbers = itertools.count()

    def __init__(self, array: Array) -> None:
        self.array = array
        self.flat = array.reshape(-1)
        self.number = next(self._numbers)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def rows(self, start: int, stop: int) -> CpuBuffer:
        """A view."""
        return CpuBuffer(self.array[start:stop])


class CpuMark(Closeable):
    """A time."""

    def __init__(self) -> None:
        self.time = 0.0

    def record(self) -> None:
        """Now."""
        self.time = time.perf_counter()

    def wait(self) -> None:
        """Nothing is ever under way."""

    def seconds_since(self, earlier: Mark) -> float:
        """Seconds between the two."""
        assert isinstance(earlier, CpuMark)
        return self.time - earlier.time


class CpuRecording(Closeable):
    """A function: enqueuing costs nothing here, so there is nothing to record."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def __call__(self) -> None:
        """Do it."""
        self._work()


class CpuSession(Closeable):
    """An ONNX network in ONNX Runtime; inputs and outputs are used in place."""

    def __init__(self, bundle: Bundle, network: NetworkName) -> None:
        self.spec: NetworkSpec = bundle.network(network).spec
        self._session: Any = load_onnx(bundle, network, ["CPUExecutionProvider"], plan_memory=False)
        self._thread = _Thread(network)
        self._running: Any = None
        self._names = [t.name for t in self.spec.tensors]
        self._bindings: dict[tuple[int, ...], Any] = {}

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Run once and wait. See `svd_trt.runtime.device.Session.enqueue`."""
        if self._session is None:
            raise closed_error(self.spec.name)
        binding = self._bound(tensors)
        self._running = options = onnxruntime.RunOptions()
        try:
            self._thread.run(lambda: run_bound(self._session, binding, options, self.spec.name))
        except (KeyboardInterrupt, SystemExit):
            options.terminate = True
            self._thread.settle()
            raise

    def _bound(self, tensors: Mapping[str, Buffer]) -> Any:
        """The binding of these buffers, made once: the loop comes back to the same ones every other step."""
        buffers = cast("Mapping[str, CpuBuffer]", tensors)  # `_bind` looks, once
        key = tuple([buffers[name].number for name in self._names])
        if key not in self._bindings:
            while len(self._bindings) >= _BINDINGS_KEPT:
                del self._bindings[next(iter(self._bindings))]
            self._bindings[key] = self._bind(tensors)
        return self._bindings[key]

    def _bind(self, tensors: Mapping[str, Buffer]) -> Any:
        binding = self._session.io_binding()
        for tensor in self.spec.inputs:
            binding.bind_input(*_binding(tensor.name, tensors[tensor.name]))
        for tensor in self.spec.outputs:
            binding.bind_output(*_binding(tensor.name, tensors[tensor.name]))
        return binding

    def cancel(self) -> None:
        """End the run that is under way."""
        if self._running is not None:
            self._running.terminate = True

    def close(self) -> None:
        """Release the network."""
        self._thread.end()
        self._bindings.clear()
        self._session = None


class _Call:
    """One thing to do, and whether it is done: asking again, after an interruption, gives the same answer."""

    __slots__ = ("_lock", "done", "error", "work")

    def __init__(self, work: Callable[[], None]) -> None:
        self.work: Callable[[], None] | None = work
        self.error: BaseException | None = None
        self.done = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def finish(self) -> None:
        """Do it; in the thread."""
        assert self.work is not None
        try:
            self.work()
        except BaseException as error:  # the caller's to handle
            self.error = error
        self.done = True
        self._lock.release()  # before anything else: the caller waits, and every cache is cold
        self.work = None  # or the memory that it refers to is held until the next

    def wait(self) -> None:
        """Until it is done."""
        if not self.done:
            self._lock.acquire()  # the thread's release: whoever is interrupted from here on finds it done


class _Thread:
    """Runs one thing at a time beside the caller, so that Ctrl-C reaches Python while a network computes for minutes.

    What `concurrent.futures` does too, in a fifth of its time: a step of a small network should not wait for it.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._thread: Thread | None = Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], None]) -> None:
        """Do ``work``, wait for its end, and raise what it raised. Interrupted, it may go on: see `settle`."""
        call = _Call(work)
        self._calls.put(call)
        call.wait()
        if call.error is not None:
            raise call.error

    def settle(self) -> None:
        """Wait until nothing is under way, wherever the caller of `run` was interrupted: calls are served in order."""
        self.run(lambda: None)

    def end(self) -> None:
        """End the thread; harmless when repeated."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call.finish()
            del call


class CpuDevice(Closeable):
    """The CPU, through ONNX Runtime. Implements `svd_trt.runtime.device.Device`."""

    name = CPU_NAME
    steps_in_flight = 1
    notes = ()

    def open(self, bundle: Bundle, network: NetworkName, *, streamed_bytes: int = 0) -> CpuSession:  # noqa: ARG002
        """Load the ONNX form of one network; weights are in host memory anyway."""
        return CpuSession(bundle, network)

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> CpuBuffer:  # noqa: ARG002
        """A new array."""
        return CpuBuffer(np.empty(tuple(shape), dtype))

    def host(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> CpuBuffer:
        """The same."""
        return self.empty(shape, dtype, name)

    def mark(self) -> CpuMark:
        """A time that is not set."""
        return CpuMark()

    def send(self, source: HostBuffer, target: Buffer) -> None:
        """Copy."""
        array = _array(target)
        array.reshape(-1)[:] = source.array.reshape(-1)[: array.size]

    def fetch(self, source: Buffer, target: HostBuffer, done: Mark) -> None:
        """Copy, and mark."""
        array = _array(source)
        target.array.reshape(-1)[: array.size] = array.reshape(-1)
        done.record()

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy."""
        _cpu(target).flat[:] = _cpu(source).flat

    def after(self, mark: Mark) -> None:
        """Nothing is ever under way."""

    def record(self, work: Callable[[], None]) -> CpuRecording:
        """The function itself."""
        return CpuRecording(work)

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def reserve(self, nbytes: int) -> None:
        """Networks share nothing here."""

    def trim(self) -> None:
        """Networks give their memory back themselves."""

    def free_bytes(self) -> None:
        """The system swaps rather than refuses, so memory is not counted."""

    def set_budget(self, nbytes: int | None) -> None:
        """Not counted."""


def load_onnx(
    bundle: Bundle,
    network: NetworkName,
    providers: Sequence[Any],
    provider_options: Sequence[Any] | None = None,
    *,
    plan_memory: bool = True,
) -> Any:
    """An ONNX Runtime session of one network.

    Args:
        bundle: where it is.
        network: which.
        providers: as `onnxruntime.InferenceSession` takes them.
        provider_options: one for each.
        plan_memory: have the first run note where each tensor lies, and later runs take all of it as one block. On a
            processor that costs more than it saves: the block lies beside what the first run left in the arena, so it
            is twice the memory, and the second run touches all of it for the first time.

    Raises:
        BackendError: onnxruntime refuses it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.enable_mem_pattern = plan_memory
    options.intra_op_num_threads = usable_processors()
    path = bundle.onnx_path(network)
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers, provider_options=provider_options)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise BackendError(f"onnxruntime cannot load {path}: {first_line(error)}") from error


def usable_processors() -> int:
    """How many we may use: by itself ONNX Runtime counts all of the machine's, and binds its threads to them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_bound(session: Any, binding: Any, options: Any, name: str) -> None:
    """Run ``session`` with what is bound.

    Raises:
        BackendError: onnxruntime failed, or the run was asked to end.
    """
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:
        raise BackendError(f"onnxruntime failed in {name}: {first_line(error)}") from error


def _cpu(buffer: Buffer) -> CpuBuffer:
    assert isinstance(buffer, CpuBuffer)
    return buffer


def _array(buffer: Buffer) -> Array:
    return _cpu(buffer).array


def _binding(name: str, buffer: Buffer) -> tuple[Any, ...]:
    """Arguments of bind_input and bind_output for memory that is used in place."""
    array = _array(buffer)
    assert array.flags.c_contiguous
    return name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
