"""The GPU as the pipeline sees it: one stream computes, another copies frames out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Protocol

import numpy.typing as npt

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import ArgumentError, BackendError
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.cuda.buffers import CudaBuffer, DeviceMemory, PinnedBuffer, as_cuda
from svd_trt.runtime.cuda.context import Context
from svd_trt.runtime.cuda.streams import Event, Graph, Stream
from svd_trt.runtime.device import Buffer, HostBuffer, Mark, Session
from svd_trt.runtime.device import Closeable as CloseableProtocol

__all__ = ["ActivationBlock", "CudaDevice", "Engine", "Recording"]


class Engine(CloseableProtocol, Protocol):
    """What runs networks on the GPU: TensorRT, or ONNX Runtime."""

    @property
    def name(self) -> str:
        """With its version, for people."""

    @property
    def uses_block(self) -> bool:
        """Networks compute in the device's activation block."""

    def load(self, device: CudaDevice, bundle: Bundle, network: NetworkName, streamed_bytes: int) -> Session:
        """See `svd_trt.runtime.device.Device.open`."""


class CudaDevice(Closeable):
    """One GPU. Implements `svd_trt.runtime.device.Device`.

    Attributes:
        context: the GPU's context.
        compute: the stream of the networks.
        activations: the block that all networks compute in, one after another.
        use_graphs: replay recordings as CUDA graphs; False runs every call as it comes.
        refusals: why recordings are replayed call by call, if any are.
    """

    steps_in_flight = 2  # one runs, one waits, so the GPU is never idle and a cancelled run stops after two

    def __init__(self, context: Context, engine: Engine) -> None:
        """``context`` and ``engine`` are the device's from now on, and closed with it."""
        with ExitStack() as stack:
            self.context = stack.enter_context(context)
            self.compute = stack.enter_context(Stream(self.context, "compute"))
            self._copies = stack.enter_context(Stream(self.context, "copy"))
            self._computed = stack.enter_context(Event(self.compute))
            self.activations = stack.enter_context(ActivationBlock(self))
            stack.callback(engine.close)
            self._held = stack.pop_all()
        self._engine = engine
        self.capturing = False
        self.use_graphs = True
        self.refusals: list[str] = []
        self._recordings: weakref.WeakSet[Recording] = weakref.WeakSet()

    @property
    def name(self) -> str:
        return f"{self._engine.name} ({self.context.gpu.name})"

    def open(self, bundle: Bundle, network: NetworkName, *, streamed_bytes: int = 0) -> Session:
        """Load one network."""
        with self.context.current():
            return self._engine.load(self, bundle, network, streamed_bytes)

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> CudaBuffer:
        """An allocation of its own, so that it is aligned as TensorRT wants tensors to be."""
        return CudaBuffer.allocate(self.context, shape, dtype, name)

    def host(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> PinnedBuffer:
        """Pinned memory."""
        return PinnedBuffer(self.context, shape, dtype, name)

    def mark(self) -> Event:
        """An event, of the compute stream unless a fetch records it."""
        return Event(self.compute)

    def send(self, source: HostBuffer, target: Buffer) -> None:
        """On the compute stream, before what is enqueued next."""
        assert isinstance(source, PinnedBuffer)
        device = as_cuda(target)
        assert device.nbytes <= source.nbytes
        self.compute.copy_in(device.address, source.address, device.nbytes, device.name)

    def fetch(self, source: Buffer, target: HostBuffer, done: Mark) -> None:
        """On the stream of copies, after what is enqueued on the other so far."""
        assert isinstance(target, PinnedBuffer)
        assert isinstance(done, Event)
        device = as_cuda(source)
        assert device.nbytes <= target.nbytes
        self._computed.record()
        self._copies.wait_for(self._computed)
        self._copies.copy_out(target.address, device.address, device.nbytes, device.name)
        done.record_on(self._copies)

    def copy(self, source: Buffer, target: Buffer) -> None:
        """On the compute stream."""
        from_, to = as_cuda(source), as_cuda(target)
        assert from_.nbytes == to.nbytes
        self.compute.copy_within(to.address, from_.address, to.nbytes, to.name)

    def after(self, mark: Mark) -> None:
        """The compute stream waits."""
        assert isinstance(mark, Event)
        self.compute.wait_for(mark)

    def record(self, work: Callable[[], None]) -> Recording:
        """A CUDA graph, from the second call on."""
        recording = Recording(self, work)
        self._recordings.add(recording)
        return recording

    def forget_recordings(self) -> None:
        """Drop every graph: an engine or the memory that they compute in is about to go."""
        for recording in list(self._recordings):
            recording.forget()

    def synchronize(self) -> None:
        """Wait for both streams."""
        self.compute.synchronize()
        self._copies.synchronize()

    def reserve(self, nbytes: int) -> None:
        """The activation block, at its largest, so that it does not move while networks take turns.

        One that is larger, from another plan, is given back: its rest belongs to the engines of this one.
        """
        if not self._engine.uses_block:
            return
        if self.activations.nbytes > nbytes:
            self.activations.close()
        self.activations.reserve(nbytes, "activations")

    def trim(self) -> None:
        """Free the activation block; the next network to run has it again."""
        self.activations.close()

    def free_bytes(self) -> int | None:
        """What the driver has left, and what this pipeline holds already; None where the engine allocates by itself."""
        return self.context.memory()[0] + self.context.taken if self._engine.uses_block else None

    @property
    def notes(self) -> list[str]:
        """That work is not replayed as CUDA graphs, and why."""
        return [f"CUDA graphs are not used: {reason}" for reason in dict.fromkeys(self.refusals)]

    def set_budget(self, nbytes: int | None) -> None:
        """Enforced at every allocation.

        Raises:
            ArgumentError: the engine allocates by itself.
        """
        if nbytes is not None and not self._engine.uses_block:
            raise ArgumentError(f"{self._engine.name} allocates by itself and keeps no budget; leave the budget out")
        self.context.budget = nbytes

    def close(self) -> None:
        """Release streams, the activation block, and the context."""
        self.forget_recordings()
        self._held.close()


class ActivationBlock(Closeable):
    """Memory that networks compute in. They run one after another on one stream, so they share it.

    Attributes:
        address: of the block; 0 where there is none.
        nbytes: its size.
        moves: how often it was allocated anew; what was told its address must be told again.
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
        """Have at least ``nbytes``. Growing waits for the GPU and drops what was recorded."""
        if nbytes <= self.nbytes:
            return
        self.close()  # first, so that old and new need not fit beside each other
        self._memory = DeviceMemory(self._device.context, nbytes, what)
        self.moves += 1

    def close(self) -> None:
        """Free the block."""
        if self._memory is not None:
            self._device.synchronize()
            self._device.forget_recordings()
            memory, self._memory = self._memory, None
            memory.close()


class Recording(Closeable):
    """Work that is captured as a CUDA graph when it is called the second time, and launched from then on.

    The first call runs it as it is: TensorRT initialises lazily, and what it does then cannot be captured. Where
    capturing is refused, every call does.
    """

    def __init__(self, device: CudaDevice, work: Callable[[], None]) -> None:
        self._device = device
        self._work = work
        self._warm = False
        self._refused = False
        self._graph: Graph | None = None

    def __call__(self) -> None:
        """Enqueue the work."""
        if self._graph is None and self._warm and not self._refused and self._device.use_graphs:
            self._capture()
        if self._graph is not None:
            self._graph.launch(self._device.compute)
            return
        self._work()
        self._warm = True

    def forget(self) -> None:
        """Drop the graph, once it is not running; the next call warms up again."""
        self._warm = False
        if self._graph is not None:
            self._device.synchronize()
            graph, self._graph = self._graph, None
            graph.close()

    @property
    def captured(self) -> bool:
        """Calls launch a graph."""
        return self._graph is not None

    def _capture(self) -> None:
        device = self._device
        try:
            try:
                device.compute.begin_capture()
                device.capturing = True
                self._work()
            except BaseException:
                self._abandon_capture()
                raise
            finally:
                device.capturing = False
            self._graph = device.compute.end_capture()
        except BackendError as error:
            # Nothing of it ran; run call by call, where a failure that has nothing to do with capturing shows.
            self._refused = True
            device.refusals.append(str(error))

    def _abandon_capture(self) -> None:
        with suppress(BackendError):  # what ended the capture is the failure to tell
            self._device.compute.end_capture().close()

    def close(self) -> None:
        """Drop the graph for good."""
        self.forget()
        self._refused = True
