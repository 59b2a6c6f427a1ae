"""An NVIDIA GPU as a device: one stream computes, and another one copies frames to the host."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import numpy.typing as npt

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import ArgumentError, BackendError
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.cuda.buffers import CudaBuffer, DeviceMemory, PinnedBuffer, as_cuda
from svd_trt.runtime.cuda.context import Context
from svd_trt.runtime.cuda.shared_frames import CudaFrames
from svd_trt.runtime.cuda.streams import CapturedGraph, CudaEvent, Stream
from svd_trt.runtime.device import Buffer, Device, Event, Graph, HostBuffer, Session
from svd_trt.runtime.layer_times import LayerTimes

__all__ = ["ActivationBlock", "CudaDevice", "CudaGraph", "GpuBackend"]


class GpuBackend(Closeable, ABC):
    """Runs networks on a GPU: TensorRT, or ONNX Runtime.

    Attributes:
        uses_block: networks compute in the device's activation block. Otherwise the backend allocates by itself.
        reports_layers: networks add to the device's `CudaDevice.layer_times`.
    """

    uses_block = False
    reports_layers = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Name and version in messages."""

    @abstractmethod
    def load(self, device: CudaDevice, bundle: Bundle, network: NetworkName, streamed_bytes: int) -> Session:
        """Load one network. See `svd_trt.runtime.device.Device.open`."""


class CudaDevice(Device):
    """One GPU.

    Attributes:
        context: the GPU's context.
        compute: the stream of the networks.
        activations: the block that all networks compute in, one after another.
        graph: the graph whose work is being enqueued, captured or not; None for other work.
        use_graphs: replay captured work as CUDA graphs; False enqueues every call by itself.
        refusals: why captured work is enqueued call by call, if it is; each reason once.
        own_captures: what the backend captures itself, a sentence each.
        layer_times: gets the time of every layer; None if layers are not measured.
    """

    kind = "cuda"
    steps_in_flight = 2  # one runs and one waits, so the GPU never idles, and Ctrl-C takes effect within two steps

    def __init__(self, context: Context, backend: GpuBackend, stream: Stream | None = None) -> None:
        """Take over ``context`` and ``backend``, which are closed with the device. ``stream`` is the caller's."""
        with ExitStack() as stack:
            self.context = stack.enter_context(context)
            self.compute = stack.enter_context(stream or Stream(self.context, "compute"))
            self._copies = stack.enter_context(Stream(self.context, "copy"))
            self._computed = stack.enter_context(CudaEvent(self.compute))
            self.activations = stack.enter_context(ActivationBlock(self))
            stack.callback(backend.close)
            self._held = stack.pop_all()
        self._backend = backend
        self.graph: CudaGraph | None = None
        self.use_graphs = True
        self.refusals: list[str] = []
        self.own_captures: list[str] = []
        self.layer_times: LayerTimes | None = None
        self._late: deque[CudaFrames] = deque()
        self._graphs: weakref.WeakSet[CudaGraph] = weakref.WeakSet()

    @property
    def name(self) -> str:
        return f"{self._backend.name} ({self.context.gpu.name})"

    def open(self, bundle: Bundle, network: NetworkName, *, streamed_bytes: int = 0) -> Session:
        """Load one network."""
        with self.context.current():
            return self._backend.load(self, bundle, network, streamed_bytes)

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> CudaBuffer:
        """Allocate memory for this buffer alone, so that it is aligned as TensorRT requires."""
        return CudaBuffer.allocate(self.context, shape, dtype, name)

    def host(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> PinnedBuffer:
        """Allocate pinned memory."""
        return PinnedBuffer(self.context, shape, dtype, name)

    def event(self) -> CudaEvent:
        """Make an event of the compute stream; a fetch records it on the copy stream."""
        return CudaEvent(self.compute)

    def send(self, source: HostBuffer, target: Buffer) -> None:
        """Copy on the compute stream, before the work that is enqueued next."""
        assert isinstance(source, PinnedBuffer)
        device = as_cuda(target)
        assert device.nbytes <= source.nbytes
        self.compute.copy_in(device.address, source.address, device.nbytes, device.name)

    def fetch(self, source: Buffer, target: HostBuffer, done: Event) -> None:
        """Copy on the copy stream, after the work that is enqueued on the compute stream now."""
        assert isinstance(target, PinnedBuffer)
        assert isinstance(done, CudaEvent)
        device = as_cuda(source)
        assert device.nbytes <= target.nbytes
        self._computed.record()
        self._copies.wait_for(self._computed)
        self._copies.copy_out(target.address, device.address, device.nbytes, device.name)
        done.record_on(self._copies)

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy on the compute stream."""
        from_, to = as_cuda(source), as_cuda(target)
        assert from_.nbytes == to.nbytes
        self.compute.copy_within(to.address, from_.address, to.nbytes, to.name)

    def wait_for(self, event: Event) -> None:
        """Make the compute stream wait."""
        assert isinstance(event, CudaEvent)
        self.compute.wait_for(event)

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """Make a graph that is captured at its second call."""
        graph = CudaGraph(self, work)
        self._graphs.add(graph)
        return graph

    def share_frames(self, shape: Sequence[int]) -> CudaFrames:
        """Allocate memory that the caller keeps as long as it likes."""
        self._free_late()
        return CudaFrames(self.context, shape, self._late, self._is_capturing)

    def measure_layers(self, times: LayerTimes) -> None:
        """Measure the layers of networks that are opened from now on, without graphs: launches report no layers."""
        if not self._backend.reports_layers:
            super().measure_layers(times)
        self.layer_times = times
        self.use_graphs = False
        _add_once(self.refusals, "the times of layers are measured")

    def drop_graphs(self) -> None:
        """Drop every captured graph, because an engine or the memory that it computes in is about to be freed."""
        for graph in list(self._graphs):
            graph.drop()

    def synchronize(self) -> None:
        """Wait for both streams."""
        self.compute.synchronize()
        self._copies.synchronize()

    def reserve(self, nbytes: int) -> None:
        """Allocate the activation block at its largest, so that it does not move when networks take turns.

        A larger block, from another plan, is freed first, because this plan needs the rest of it for engines.
        """
        if not self._backend.uses_block:
            return
        if self.activations.nbytes > nbytes:
            self.activations.close()
        self.activations.reserve(nbytes, "activations")

    def trim(self) -> None:
        """Free the activation block. The next network that runs allocates it again."""
        self.activations.close()

    def free_bytes(self) -> int | None:
        """What the driver has left and what this pipeline holds; None if the backend allocates by itself."""
        return self.context.memory()[0] + self.context.taken if self._backend.uses_block else None

    @property
    def runs_engines(self) -> bool:
        """True unless the backend is ONNX Runtime."""
        return self._backend.uses_block

    @property
    def notes(self) -> list[str]:
        """Why CUDA graphs are not used, or only those that the backend captures."""
        return [*(f"CUDA graphs are not used: {reason}" for reason in self.refusals), *self.own_captures]

    def set_budget(self, nbytes: int | None) -> None:
        """Set the budget that every allocation is checked against.

        Raises:
            ArgumentError: the backend allocates by itself.
        """
        if nbytes is not None and not self._backend.uses_block:
            raise ArgumentError(f"{self._backend.name} allocates by itself and keeps no budget; leave the budget out")
        self.context.budget = nbytes

    def close(self) -> None:
        """Release graphs, streams, the activation block and the context."""
        self._free_late()
        self.drop_graphs()
        self._held.close()

    def _is_capturing(self) -> bool:
        return self.graph is not None and self.graph.capturing

    def _free_late(self) -> None:
        """Free frames that were dropped during a capture."""
        while self._late:
            self._late.popleft().free()


class ActivationBlock(Closeable):
    """Memory that networks compute in. They run one after another on one stream, so they can share it.

    Attributes:
        address: of the block; 0 if it is not allocated.
        nbytes: its size.
        moves: how often it was allocated. After each time, contexts need the new address.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._memory: DeviceMemory | None = None
        self.moves = 0

    @property
    def address(self) -> int:
        return self._memory.address if self._memory else 0

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes if self._memory else 0

    def reserve(self, nbytes: int, what: str) -> None:
        """Make the block at least ``nbytes`` large. Growing it waits for the GPU and drops captured graphs."""
        if nbytes <= self.nbytes:
            return
        self.close()  # first, so that the old and the new block need not fit at the same time
        self._memory = DeviceMemory(self._device.context, nbytes, what)
        self.moves += 1

    def close(self) -> None:
        """Free the block."""
        if self._memory is not None:
            self._device.synchronize()
            self._device.drop_graphs()
            memory, self._memory = self._memory, None
            memory.close()


class CudaGraph(Graph):
    """Work that is captured as a CUDA graph at the second call, and launched from then on.

    The first call enqueues the work as it is, because TensorRT initialises lazily and its initialisation cannot be
    captured. If the capture is refused, every call enqueues the work as it is.

    Attributes:
        capturing: the work is being captured.
        refused: the work will not be captured.
    """

    def __init__(self, device: CudaDevice, work: Callable[[], None]) -> None:
        super().__init__(work)
        self._device = device
        self._warm = False
        self._graph: CapturedGraph | None = None
        self._places = 0
        self._at_close: dict[object, Callable[[], None]] = {}
        self.capturing = False
        self.refused = False

    def __call__(self) -> None:
        """Enqueue the work."""
        if self._graph is None and self._warm and not self.refused and self._device.use_graphs:
            self._capture()
        if self._graph is not None:
            self._graph.launch(self._device.compute)
            return
        self._enqueue()
        self._warm = True

    def next_place(self) -> int:
        """Count the networks that the work enqueues: 0 for the first one in every call."""
        self._places += 1
        return self._places - 1

    def refuse(self, reason: str) -> None:
        """Never capture the work. What enqueues it calls this before there is a capture, in a call that is not one."""
        if not self.refused:
            self.refused = True
            _add_once(self._device.refusals, reason)

    def leave_to_backend(self, note: str) -> None:
        """Never capture the work, because what enqueues it captures it itself, as ``note`` says. See `refuse`."""
        if not self.refused:
            self.refused = True
            _add_once(self._device.own_captures, note)

    def when_closed(self, owner: object, call: Callable[[], None]) -> None:
        """Make `close` call ``call``, until ``owner`` calls `forget`."""
        self._at_close[owner] = call

    def forget(self, owner: object) -> None:
        """Do not call at `close` what ``owner`` gave."""
        self._at_close.pop(owner, None)

    def drop(self) -> None:
        """Drop the captured graph after its last launch has ended. The next call warms up again."""
        self._warm = False
        if self._graph is not None:
            self._device.synchronize()
            graph, self._graph = self._graph, None
            graph.close()

    @property
    def captured(self) -> bool:
        """True if calls launch a graph."""
        return self._graph is not None

    def _enqueue(self) -> None:
        self._places = 0
        self._device.graph = self
        try:
            self._work()
        finally:
            self._device.graph = None

    def _capture(self) -> None:
        stream = self._device.compute
        try:
            try:
                stream.begin_capture()
                self.capturing = True
                self._enqueue()
            except BaseException:
                self._abandon_capture()
                raise
            finally:
                self.capturing = False
            self._graph = stream.end_capture()
        except BackendError as error:
            # None of the work ran. Call by call, a failure that is not about capturing shows again.
            self.refuse(str(error))

    def _abandon_capture(self) -> None:
        with suppress(BackendError):  # the error that ended the capture is the one to report
            self._device.compute.end_capture().close()

    def close(self) -> None:
        """Drop the captured graph for good."""
        self.drop()
        self.refused = True
        while self._at_close:
            self._at_close.popitem()[1]()


def _add_once(texts: list[str], text: str) -> None:
    """Add ``text`` if it is new: a server makes a graph for every loop, for months."""
    if text not in texts:
        texts.append(text)
