"""The networks of a bundle on a device: all loaded and kept, or one after another."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.manifest import read_manifest
from svd_trt.engine.memory import MemoryPlan
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import BackendError, BundleError
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.device import Device, Session

__all__ = ["CLOSED", "Engines"]

CLOSED = "the pipeline is closed; open it again with VideoPipeline.open"

_PATIENCE = 0.1  # seconds between looks at whether to give up waiting


class Engines(Closeable):
    """Loads networks when they are first used, and lends them, one at a time, to whoever enqueues work.

    The denoising loop and the thread that decodes may both want the device; what one of them enqueues under a lease
    is not interrupted by the other.
    """

    def __init__(self, bundle: Bundle, device: Device) -> None:
        self._bundle = bundle
        self._device = device
        self._loaded: dict[NetworkName, Session] = {}
        self._lock = threading.RLock()
        self._closed = False
        self._resident = True
        self._streamed_bytes = 0

    def follow(self, plan: MemoryPlan) -> None:
        """Keep to ``plan`` from now on."""
        with self._lock:
            if plan.streamed_bytes != self._streamed_bytes:
                self._drop("denoiser")
            if plan.resident != self._resident:
                self._device.trim()
            self._resident, self._streamed_bytes = plan.resident, plan.streamed_bytes
            if plan.resident and plan.activation_bytes is not None:
                self._device.reserve(plan.activation_bytes)

    def load(self, network: NetworkName) -> None:
        """Load ``network`` where it is not; see `lend` for what can go wrong."""
        with self.lend(network):
            pass

    def lend(self, network: NetworkName, stop: threading.Event | None = None) -> AbstractContextManager[Session]:
        """The loaded network, for as long as the block takes; waits while another thread has one.

        Args:
            network: which.
            stop: give up waiting once this is set.

        Raises:
            BackendError: the pipeline is closed, the device cannot run the network, or the waiting was given up.
            DeviceMemoryError: it does not fit.
            BundleError: the bundle was built again since it was opened, so its networks no longer belong together.
        """
        return _Lease(self, network, stop)

    def _lock_for(self, stop: threading.Event | None) -> None:
        while not self._lock.acquire(timeout=_PATIENCE):
            if stop is not None and stop.is_set():
                raise BackendError("the stream was given up")

    def _ready(self, network: NetworkName) -> Session:
        """``network``, loaded if need be; only under the lock."""
        if self._closed:
            raise BackendError(CLOSED)
        if not self._resident:
            for other in [name for name in self._loaded if name != network]:
                self._drop(other)
        if network not in self._loaded:
            self._loaded[network] = self._open(network)
        return self._loaded[network]

    def release(self) -> None:
        """Let go of every network; they are loaded again when they are wanted."""
        with self._lock, ExitStack() as stack:
            for network in list(self._loaded):
                stack.callback(self._drop, network)

    def close(self) -> None:
        """Let go of every network for good."""
        with self._lock:
            self._closed = True
            self.release()

    def _open(self, network: NetworkName) -> Session:
        if read_manifest(self._bundle.path) != self._bundle.manifest:
            raise BundleError(f"{self._bundle.path} was built again while it was open; open it again")
        streamed = self._streamed_bytes if network == "denoiser" else 0
        return self._device.open(self._bundle, network, streamed_bytes=streamed)

    def _drop(self, network: NetworkName) -> None:
        session = self._loaded.pop(network, None)
        if session is not None:
            try:
                session.close()
            finally:
                if not self._resident:
                    self._device.trim()


class _Lease(AbstractContextManager[Session]):
    """See `Engines.lend`.

    Not a generator: every step of the loop takes a lease, just after the network has used up every cache, and then a
    generator's detours cost tens of microseconds.
    """

    def __init__(self, engines: Engines, network: NetworkName, stop: threading.Event | None) -> None:
        self._engines, self._network, self._stop = engines, network, stop

    def __enter__(self) -> Session:
        self._engines._lock_for(self._stop)
        try:
            return self._engines._ready(self._network)
        except BaseException:
            self._engines._lock.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engines._lock.release()
