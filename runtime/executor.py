"""What stays on the device between generations: engines, the loop's buffers, and decodes that are not finished."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Protocol, TypeVar, cast

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.measured import with_measured
from svd_trt.engine.memory import MemoryPlan, MemoryRequest, networks_of, plan_memory
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import ArgumentError, BackendError, BudgetError, DeviceMemoryError, SvdTrtError
from svd_trt.runtime.cancellation import Cancellation
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.device import Array, Device, Session, download, synchronized_on_error, upload
from svd_trt.runtime.engines import CLOSED, Engines
from svd_trt.runtime.flag import Flag
from svd_trt.runtime.turns import Turns
from svd_trt.units import format_bytes

__all__ = ["Executor"]

_FREE_SHARE = 0.95  # of the free memory is planned with; engines take some that their builder does not report
_RETRY_SHARE = 0.9  # of the memory that was not enough is suggested for the next try

_Loop = TypeVar("_Loop", bound=Closeable)


class _Decode(Protocol):
    """A decode that is not finished."""

    def abort(self, error: BackendError) -> None: ...


class Executor(Closeable):
    """Owns the device and everything that is kept on it. The stages of a generation are functions over it.

    Attributes:
        bundle: the networks.
        device: where they run.
        vram_budget: bytes of device memory to stay within; None plans with the memory that is free.
        turns: who may use the executor. Everything but `session`, `cancel` and `plan` needs the turn.
    """

    def __init__(self, bundle: Bundle, device: Device, vram_budget: int | None = None) -> None:
        self.bundle = bundle
        self.device = device
        self.vram_budget = vram_budget
        device.set_budget(vram_budget)
        self.turns = Turns()
        self._engines = Engines(bundle, device)
        self._measured: dict[NetworkName, tuple[int, ...]] = {}
        self._closed = False
        self._denoising = False
        self._followed: MemoryPlan | None = None
        self._loop: tuple[object, tuple[int, ...], Closeable] | None = None
        self._decodes: weakref.WeakSet[_Decode] = weakref.WeakSet()
        self._runs: weakref.WeakSet[Cancellation] = weakref.WeakSet()
        self._runs_lock = threading.RLock()  # a signal handler may cancel while its own thread holds it
        _alive.add(self)

    def require_open(self) -> None:
        """Refuse to run after `close`.

        Raises:
            BackendError: the executor is closed, or this process was forked from the one that opened it.
        """
        self.turns.require_process()
        if self._closed:
            raise BackendError(CLOSED)

    def plan(self, request: MemoryRequest) -> MemoryPlan:
        """Choose the fastest way to run ``request`` within the budget, or within the memory that is free.

        Raises:
            BudgetError: no plan needs so little memory.
        """
        manifest = with_measured(self.bundle.manifest, self._measured)
        if self.vram_budget is not None:
            return plan_memory(manifest, request, self.vram_budget)
        fastest, free = plan_memory(manifest, request, None), self.device.free_bytes()
        if fastest.total_bytes is None or free is None:
            return fastest
        return plan_memory(manifest, request, int(free * _FREE_SHARE))

    def settle(self, request: MemoryRequest) -> MemoryPlan:
        """Plan as `plan` does. The first time, load the engines and ask them; if they need more, plan once more.

        If the engines are loaded one at a time, the first one stays loaded.

        Raises:
            BudgetError: no plan needs so little memory.
            DeviceMemoryError: an engine does not fit.
        """
        plan = self.plan(request)
        unknown = [name for name in reversed(networks_of(request)) if name not in self._measured]
        if self.device.free_bytes() is None or not unknown:
            return plan
        with self._following(request, plan):
            for name in unknown:
                with self._engines.use(name) as session:
                    sizes = session.profile_bytes()
                    if sizes is not None:
                        self._measured[name] = sizes
        return self.plan(request)

    @contextmanager
    def running(self, request: MemoryRequest, plan: MemoryPlan, latent_shape: tuple[int, ...]) -> Iterator[None]:
        """Follow ``plan`` during a generation whose latents are ``latent_shape``, ``[B, F, C, h, w]``.

        If memory runs out, everything is released and the error says which budget to use.

        Raises:
            ArgumentError: called from a callback of another generation.
        """
        if not self._denoising and self._loop is not None and self._loop[1][1:] != latent_shape[1:]:
            self._drop_loop()
        with self._following(request, plan):
            yield
            self._engines.save()  # now, because a server may run for months and then be killed

    @contextmanager
    def _following(self, request: MemoryRequest, plan: MemoryPlan) -> Iterator[None]:
        """Follow ``plan`` while the block runs; if memory runs out, release everything and say which budget to use."""
        try:
            self._require_idle("start another video with")
            self._follow(plan)
            yield
        except DeviceMemoryError as error:
            with suppress(BackendError):
                self.release()
            error.advise(self._advice(request, plan, error))
            raise

    def session(self, network: NetworkName, stop: Flag | None = None) -> AbstractContextManager[Session]:
        """Hold a network while a block runs; it is loaded if necessary. See `Engines.use`."""
        self.turns.require_process()
        return self._engines.use(network, stop)

    def load(self, network: NetworkName) -> None:
        """Load a network before its first use. See `Engines.use` for errors."""
        with self.session(network):
            pass

    def run(
        self,
        network: NetworkName,
        inputs: Mapping[str, Array],
        sizes: Mapping[str, int],
        stop: Flag | None = None,
    ) -> dict[str, Array]:
        """Run one network once: arrays in, arrays out.

        Args:
            network: which network.
            inputs: an array for each of its inputs.
            sizes: a value for each symbol in the shapes of its outputs.
            stop: see `Engines.use`.
        """
        spec = self.bundle.network(network).spec
        with ExitStack() as stack:
            tensors = {name: stack.enter_context(upload(self.device, a, name)) for name, a in inputs.items()}
            for tensor in spec.outputs:
                buffer = self.device.empty(tensor.resolve(sizes), tensor.dtype, tensor.name)
                tensors[tensor.name] = stack.enter_context(buffer)
            stack.enter_context(synchronized_on_error(self.device))  # before the buffers are freed
            with self.session(network, stop) as session:
                session.enqueue(tensors)
            return {tensor.name: download(self.device, tensors[tensor.name]) for tensor in spec.outputs}

    def loop(self, key: object, shape: tuple[int, ...], make: Callable[[], _Loop]) -> _Loop:
        """Return the loop's buffers of the last generation if ``key`` is the same; else free them and ``make`` others.

        ``shape`` is the shape of the latents.
        """
        if self._loop is None or self._loop[0] != key:
            self._drop_loop()
            self._loop = (key, shape, make())
        return cast("_Loop", self._loop[2])

    @contextmanager
    def denoising(self, plan: MemoryPlan) -> Iterator[None]:
        """Refuse every other use of the loop's buffers while the block runs, and follow ``plan`` again.

        Between two groups of videos another generation may have run, which followed a plan of its own.

        Raises:
            ArgumentError: called from a callback of a generation that is denoising.
        """
        self._require_idle("start another video with")
        if plan != self._followed:
            self._follow(plan)
        self._denoising = True
        try:
            yield
        finally:
            self._denoising = False

    def track(self, decode: _Decode) -> None:
        """Abort ``decode`` if the executor is closed or released before it is finished."""
        self._decodes.add(decode)

    def watch(self, cancellation: Cancellation) -> None:
        """Make `cancel` reach a generation for as long as ``cancellation`` exists."""
        with self._runs_lock:
            self._runs.add(cancellation)

    def cancel(self, reason: SvdTrtError) -> None:
        """Make the generation that runs, and those that are not finished, raise ``reason``. Any thread may call it."""
        if self.turns.foreign:
            return
        with self._runs_lock:
            runs = list(self._runs)
        for run in runs:
            run.cancel(reason)

    def stopping(self, cancellation: Cancellation) -> AbstractContextManager[None]:
        """Let ``cancellation`` end the run of a network in the block."""
        return cancellation.calling(lambda _: self._engines.cancel(cancellation.event))

    def release(self) -> None:
        """Free engines and buffers, and end open streams. Both are made again when they are needed.

        Raises:
            ArgumentError: called from a callback of a generation that is denoising.
        """
        self._require_idle("release")
        self._followed = None
        with ExitStack() as stack:  # later callbacks run even if an earlier one fails
            stack.callback(self.device.trim)
            stack.callback(self._engines.release)
            self._abort(BackendError("the pipeline's memory was released; ask for the video again"))

    def close(self) -> None:
        """Free everything and close the device. Closing twice is harmless, and so is closing in a forked process.

        A generation that another thread runs is ended first.

        Raises:
            ArgumentError: called from a callback of a generation that is denoising.
        """
        if self.turns.foreign:
            return
        if self.turns.mine:
            self._require_idle("close")
        self._closed = True  # calls that wait for their turn end too
        self.cancel(BackendError(CLOSED))
        with self.turns.taken(), ExitStack() as stack:  # later callbacks run even if an earlier one fails
            stack.callback(self.device.close)
            stack.callback(self._engines.close)
            self._abort(BackendError(CLOSED))

    def _follow(self, plan: MemoryPlan) -> None:
        self._engines.follow(plan)
        self._followed = plan

    def _require_idle(self, verb: str) -> None:
        if self._denoising:
            raise ArgumentError(
                f"a callback cannot {verb} the pipeline that calls it; raise an exception to end the run, "
                "or open another pipeline"
            )

    def _advice(self, request: MemoryRequest, plan: MemoryPlan, error: DeviceMemoryError) -> str:
        """Which budget to use. Everything that can be freed is free now."""
        limits = [size for size in (self.vram_budget, self.device.free_bytes(), plan.total_bytes) if size is not None]
        within = int(min(limits) * _RETRY_SHARE) if limits else error.free
        try:
            smaller = plan_memory(with_measured(self.bundle.manifest, self._measured), request, within)
        except BudgetError as unfit:
            return str(unfit)
        assert smaller.total_bytes is not None, "a plan within a budget has figures"
        size = format_bytes(smaller.total_bytes, round_up=True)
        return f"try --vram-budget '{size}' (vram_budget={smaller.total_bytes}): {smaller.words()}"

    def _abort(self, error: BackendError) -> None:
        with ExitStack() as stack:
            stack.callback(self._drop_loop)
            for decode in list(self._decodes):
                stack.callback(decode.abort, error)

    def _drop_loop(self) -> None:
        if self._loop is not None:
            self.device.synchronize()
            self._loop[2].close()
            self._loop = None


_alive: weakref.WeakSet[Executor] = weakref.WeakSet()


def _prepare_child() -> None:
    """Keep what a forked process cannot free from being freed there.

    ONNX Runtime's threads and the GPU's context exist in the parent only, so freeing a network, or ONNX Runtime itself
    at the end of the process, would wait for ever for a thread that is not there.
    """
    for executor in list(_alive):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(executor))
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):  # only glibc has on_exit
        # Called with the exit code, when Python has finished and before the destructors of libraries.
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)


os.register_at_fork(after_in_child=_prepare_child)
