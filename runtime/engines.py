"""The networks of a bundle on a device: all of them stay loaded, or one at a time is loaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.manifest import read_manifest
from svd_trt.engine.memory import MemoryPlan
from svd_trt.engine.spec import SHALLOW, NetworkName
from svd_trt.errors import BackendError, BundleError
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.device import Device, Session
from svd_trt.runtime.flag import Flag

__all__ = ["CLOSED", "Engines"]

CLOSED = "the pipeline is closed; open it again with VideoPipeline.open"

_POLL_SECONDS = 0.1  # between two checks of whether to stop waiting
_OF_STEPS: set[NetworkName] = {"denoiser", SHALLOW}  # steps take turns with them, so one stays for the other


class Engines(Closeable):
    """Loads networks when they are first used, and gives them to one thread at a time.

    The denoising loop and the decode thread may both want the device. While one of them has a network, the other
    cannot enqueue work.
    """

    def __init__(self, bundle: Bundle, device: Device) -> None:
        self._bundle = bundle
        self._device = device
        self._loaded: dict[NetworkName, Session] = {}
        self._lock = threading.RLock()
        self._using: Session | None = None
        self._using_lock = threading.RLock()  # a signal handler may cancel while its own thread holds it
        self._closed = False
        self._resident = True
        self._streamed_bytes = 0

    def follow(self, plan: MemoryPlan) -> None:
        """Keep to ``plan`` from now on."""
        with self._lock:
            if plan.streamed_bytes != self._streamed_bytes:
                self._drop("denoiser")
            if not plan.shallow_steps:  # the plan does not count it
                self._drop(SHALLOW)
            if plan.resident != self._resident:
                self._device.trim()
            self._resident, self._streamed_bytes = plan.resident, plan.streamed_bytes
            if plan.resident and plan.activation_bytes is not None:
                self._device.reserve(plan.activation_bytes)

    @contextmanager
    def use(self, network: NetworkName, stop: Flag | None = None) -> Iterator[Session]:
        """Hold ``network`` while the block runs. It is loaded if necessary; another thread's block is waited for.

        Args:
            network: which network.
            stop: once this flag is set, the wait for another thread ends, and so does a run if the device can do that.

        Raises:
            BackendError: the pipeline is closed, the device cannot run the network, or ``stop`` was set.
            DeviceMemoryError: the network does not fit.
            BundleError: the bundle was rebuilt after it was opened, so its networks do not belong together.
        """
        while not self._lock.acquire(timeout=_POLL_SECONDS):
            if stop is not None and stop.is_set():
                raise BackendError("the stream was closed")
        try:
            session = self._load(network)
            with self._in_use(session, stop):
                yield session
        finally:
            self._lock.release()

    def cancel(self, stop: Flag) -> None:
        """End the run of the thread that uses a network with ``stop``, which is set."""
        with self._using_lock:
            if self._using is not None and self._using.stop is stop:
                self._using.cancel()

    @contextmanager
    def _in_use(self, session: Session, stop: Flag | None) -> Iterator[None]:
        """Let `cancel` reach ``session`` in the block."""
        with self._using_lock:
            before, stop_before = self._using, session.stop
            self._using, session.stop = session, stop
        try:
            yield
        finally:
            with self._using_lock:
                self._using, session.stop = before, stop_before

    def save(self) -> None:
        """Keep for other processes what the loaded networks compiled."""
        with self._lock:
            for session in self._loaded.values():
                session.save()

    def release(self) -> None:
        """Unload every network. A network is loaded again when it is used."""
        with self._lock, ExitStack() as stack:
            for network in list(self._loaded):
                stack.callback(self._drop, network)

    def close(self) -> None:
        """Unload every network for good."""
        with self._lock:
            self._closed = True
            self.release()

    def _load(self, network: NetworkName) -> Session:
        """Load ``network`` if it is not loaded. The caller holds the lock."""
        if self._closed:
            raise BackendError(CLOSED)
        if not self._resident:
            kept = _OF_STEPS if network in _OF_STEPS else {network}
            for other in self._loaded.keys() - kept:
                self._drop(other)
        if network not in self._loaded:
            self._loaded[network] = self._open(network)
        return self._loaded[network]

    def _open(self, network: NetworkName) -> Session:
        """Load ``network`` from the bundle as it was opened, which another process may replace at any moment."""
        self._refuse_rebuilt()
        streamed = self._streamed_bytes if network == "denoiser" else 0
        try:
            session = self._device.open(self._bundle, network, streamed_bytes=streamed)
        except BackendError:
            self._refuse_rebuilt()  # files of two builds do not fit together, and that is the reason to give
            raise
        try:
            self._refuse_rebuilt()
        except BaseException:
            session.close()
            raise
        return session

    def _refuse_rebuilt(self) -> None:
        if read_manifest(self._bundle.path) != self._bundle.manifest:
            raise BundleError(f"{self._bundle.path} was rebuilt while it was open; open it again")

    def _drop(self, network: NetworkName) -> None:
        session = self._loaded.pop(network, None)
        if session is not None:
            try:
                session.close()
            finally:
                if not self._resident:
                    self._device.trim()
