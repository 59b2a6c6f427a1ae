"""ONNX Runtime on the CPU, which runs everywhere. A call has finished when it returns."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import BackendError, first_line, is_lack_of_memory
from svd_trt.runtime.closeable import closed_error
from svd_trt.runtime.device import Array, Buffer, Device, Event, HostBuffer, Session
from svd_trt.runtime.layer_times import LayerTimes, add_layer_time
from svd_trt.runtime.linked_onnx import FOLDER_OPTION, find_onnx

__all__ = ["CpuBuffer", "CpuDevice", "CpuEvent", "CpuSession", "load_onnx", "run_bound", "usable_processors"]

_CPU = "CPUExecutionProvider"
_FATAL_ONLY = 4
_ERRORS_ONLY = 3  # ONNX Runtime's log level: its warnings are about graph details that no user can act on
_OF_NODES = "_kernel_time"  # ends the names of the events that are computations of nodes


class CpuBuffer(Buffer, HostBuffer):
    """A numpy array."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def rows(self, start: int, stop: int) -> CpuBuffer:
        """Rows ``start`` to ``stop`` as a view."""
        return CpuBuffer(self.array[start:stop])


class CpuEvent(Event):
    """The time of a call."""

    def __init__(self) -> None:
        self._time = 0.0

    def record(self) -> None:
        """Note the time."""
        self._time = time.perf_counter()

    def seconds_since(self, earlier: Event) -> float:
        """Seconds between the two calls of `record`."""
        assert isinstance(earlier, CpuEvent)
        return self._time - earlier._time


class CpuSession(Session):
    """An ONNX network in ONNX Runtime. It reads inputs and writes outputs in place.

    The network runs in a thread of its own, so that Ctrl-C reaches Python while a network computes for minutes.

    Attributes:
        run_seconds: how long ONNX Runtime has computed in all runs.
    """

    def __init__(self, bundle: Bundle, network: NetworkName, times: LayerTimes | None = None) -> None:
        """With ``times``, closing the session adds the time of every node to them."""
        self.spec = bundle.network(network).spec
        self._times = times
        self._folder = None if times is None else TemporaryDirectory(prefix="svd-trt-")
        prefix = None if self._folder is None else str(Path(self._folder.name, network))
        try:
            self._session: Any = load_onnx(bundle, network, [_CPU], plan_memory=False, profile_prefix=prefix)
        except BaseException:
            if self._folder is not None:
                self._folder.cleanup()
            raise
        self._worker = _Worker(network)
        self._running: Any = None
        self.run_seconds = 0.0

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Run once and wait. See `svd_trt.runtime.device.Session.enqueue`."""
        if self._session is None:
            raise closed_error(self.spec.name)
        binding = self._bind(tensors)
        self._running = options = onnxruntime.RunOptions()
        if self.stop is not None and self.stop.is_set():  # just before, so `cancel` had no run to end
            options.terminate = True
        try:
            self._worker.submit(lambda: self._run(binding, options)).result()
        except (KeyboardInterrupt, SystemExit):
            options.terminate = True
            # The run may still write to the caller's buffers. The worker works in order, so an empty call ends after
            # it, even if the interrupt arrived before there was a future to wait for.
            self._worker.submit(lambda: None).result()
            raise

    def _run(self, binding: Any, options: Any) -> None:
        started = time.perf_counter()
        run_bound(self._session, binding, options, self.spec.name)
        self.run_seconds += time.perf_counter() - started

    def _bind(self, tensors: Mapping[str, Buffer]) -> Any:
        binding = self._session.io_binding()
        for tensor in self.spec.inputs:
            binding.bind_input(*_binding(tensor.name, tensors[tensor.name]))
        for tensor in self.spec.outputs:
            binding.bind_output(*_binding(tensor.name, tensors[tensor.name]))
        return binding

    def cancel(self) -> None:
        """Ask the current run to end."""
        if self._running is not None:
            self._running.terminate = True

    def close(self) -> None:
        """Release the network."""
        self._worker.stop()
        session, self._session = self._session, None
        if session is not None and self._folder is not None and self._times is not None:
            with self._folder:
                _add_profile(self._times, self.spec.name, Path(session.end_profiling()))


class _Worker:
    """A thread that makes one call after the other.

    Not a ``ThreadPoolExecutor``: its thread starts inside the first call, where an interrupt can lose it, and the
    interpreter waits for it at exit, which takes minutes if a stream was not closed.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], None]) -> Future[None]:
        """Make the call in the thread, after all earlier ones."""
        future: Future[None] = Future()
        self._calls.put((call, future))
        return future

    def stop(self) -> None:
        """End the thread after all calls. Stopping twice is harmless."""
        self._calls.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            try:
                call()
                future.set_result(None)
            except BaseException as error:  # raised again by `Future.result`
                future.set_exception(error)
            del item, call, future  # free the buffers that the call refers to before waiting for the next


class CpuDevice(Device):
    """The CPU through ONNX Runtime."""

    name = "onnxruntime (CPU)"

    def __init__(self) -> None:
        self._times: LayerTimes | None = None

    def open(self, bundle: Bundle, network: NetworkName, *, streamed_bytes: int = 0) -> CpuSession:  # noqa: ARG002
        """Load the ONNX form of one network. Weights are in host memory in any case."""
        return CpuSession(bundle, network, self._times)

    def measure_layers(self, times: LayerTimes) -> None:
        """Make ONNX Runtime profile the nodes of networks that are opened from now on."""
        self._times = times

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> CpuBuffer:  # noqa: ARG002
        """Allocate an array with undefined content."""
        return CpuBuffer(np.empty(tuple(shape), dtype))

    def host(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> CpuBuffer:
        """Allocate an array with undefined content."""
        return self.empty(shape, dtype, name)

    def event(self) -> CpuEvent:
        """Make an event that is not recorded yet."""
        return CpuEvent()

    def send(self, source: HostBuffer, target: Buffer) -> None:
        """Fill ``target`` from the start of ``source``."""
        array = _array(target)
        array.reshape(-1)[:] = source.array.reshape(-1)[: array.size]

    def fetch(self, source: Buffer, target: HostBuffer, done: Event) -> None:
        """Copy to the start of ``target``, and record ``done``."""
        array = _array(source)
        target.array.reshape(-1)[: array.size] = array.reshape(-1)
        done.record()

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy between two arrays of the same number of bytes."""
        _array(target).reshape(-1)[:] = _array(source).reshape(-1)


def load_onnx(
    bundle: Bundle,
    network: NetworkName,
    providers: Sequence[Any],
    provider_options: Sequence[Any] | None = None,
    *,
    plan_memory: bool = True,
    profile_prefix: str | None = None,
) -> Any:
    """Make an ONNX Runtime session of one network.

    Args:
        bundle: the bundle that holds the network.
        network: its name.
        providers: as `onnxruntime.InferenceSession` takes them.
        provider_options: one for each provider.
        plan_memory: whether the first run notes the place of every tensor so that later runs allocate all of them as
            one block. On a CPU this costs more than it saves: the block is allocated beside what the first run left in
            the arena, so memory doubles, and the second run touches the whole block for the first time.
        profile_prefix: where the path of the file begins that gets the time of every node; None measures none. The
            session's ``end_profiling`` completes the file and returns its path.

    Raises:
        BackendError: ONNX Runtime refuses the network.
    """
    # By default a session that cannot be made is made again on the CPU, with a banner on standard output.
    own = {"enable_fallback": 0}
    options = onnxruntime.SessionOptions()
    # What fails on the CPU is raised as well; of other providers only the log says why they are not there.
    options.log_severity_level = _FATAL_ONLY if list(providers) == [_CPU] else _ERRORS_ONLY
    options.enable_mem_pattern = plan_memory
    options.intra_op_num_threads = usable_processors()
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    path = bundle.onnx_path(network)
    try:
        graph, weights = find_onnx(bundle, network)
        if weights is not None:
            options.add_session_config_entry(FOLDER_OPTION, str(weights))
        return onnxruntime.InferenceSession(
            graph, options, providers=providers, provider_options=provider_options, **own
        )
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise BackendError(f"onnxruntime cannot load {path}: {_reason(error)}") from error


def _add_profile(times: LayerTimes, network: NetworkName, path: Path) -> None:
    """Add the nodes of ONNX Runtime's profile ``path`` to ``times``.

    Raises:
        BackendError: the profile is cut short.
    """
    try:
        events = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BackendError(
            f"the times of {network}'s nodes were lost, because onnxruntime could not write them to {path.parent}; "
            "free space there, or set TMPDIR to another folder"
        ) from error
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_OF_NODES):
            name = f"{event['name'].removesuffix(_OF_NODES)} ({event['args']['op_name']})"
            add_layer_time(times, network, name, event["dur"] / 1e3)  # dur is in microseconds


def usable_processors() -> int:
    """Count the processors that this process may use. ONNX Runtime counts all of the machine's by default."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_bound(session: Any, binding: Any, options: Any, name: str) -> None:
    """Run ``session`` with the buffers of ``binding``.

    Raises:
        BackendError: ONNX Runtime failed, or the run was cancelled.
    """
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:
        raise BackendError(f"onnxruntime failed in {name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line, with what to do if memory ran out; the library says that in several ways, none of them plain."""
    text = first_line(error)
    if is_lack_of_memory(error):
        return f"memory ran out; close other programs, or raise the limit if there is one ({text})"
    return text


def _array(buffer: Buffer) -> Array:
    assert isinstance(buffer, CpuBuffer)
    return buffer.array


def _binding(name: str, buffer: Buffer) -> tuple[Any, ...]:
    """Make the arguments of bind_input and bind_output that use the memory in place."""
    array = _array(buffer)
    assert array.flags.c_contiguous
    return name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
