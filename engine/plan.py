"""ONNX to a TensorRT plan: parse, profile, build, with progress, cancellation and the builder's memory report."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svd_trt.engine.flavour import Flavour
from svd_trt.engine.spec import NetworkSpec
from svd_trt.errors import EngineBuildError

__all__ = ["PlanReport", "build_plan", "make_profile", "parse_network"]

Progress = Callable[[float], None]
"""Called with the fraction of the build that is done, from 0 to 1, from another thread."""

# The builder states these at INFO; they are the only memory figures that exist without loading the engine.
_MEMORY = {
    "activation_bytes": re.compile(r"Total Activation Memory: (\d+) bytes"),
    "weight_bytes": re.compile(r"Total Weights Memory: (\d+) bytes"),
}
# A profile that TensorRT cannot satisfy at one of its ends is only a warning to it; to users it is a bundle that
# fails at the frame counts they were promised.
_BROKEN_PROFILE = "not self-consistent"


@dataclass(frozen=True)
class PlanReport:
    """What the builder said of an engine; bytes are at the profile's maximum."""

    activation_bytes: int | None
    weight_bytes: int | None
    layers: int
    seconds: float


def build_plan(
    flavour: Flavour, onnx_path: Path, spec: NetworkSpec, plan_path: Path, progress: Progress | None = None
) -> PlanReport:
    """Build the engine of ``spec`` from ``onnx_path`` and write it to ``plan_path``.

    The build runs in a thread of its own so that Ctrl-C is heard: it is passed on to the builder, which stops at
    its next step, and KeyboardInterrupt is raised once it has.

    Raises:
        EngineBuildError: a node was refused, the tensors are not those of ``spec``, or the build failed.
    """
    job = _BuildJob(flavour, onnx_path, spec, plan_path, progress or (lambda _: None))
    thread = threading.Thread(target=job.run, name=f"build {spec.name}", daemon=True)
    thread.start()
    try:
        # Not thread.join(): interrupted by a signal, it takes the thread for finished (Python 3.11).
        while not job.done.wait(timeout=0.2):
            pass
    except BaseException:
        job.cancelled.set()
        job.done.wait()
        plan_path.unlink(missing_ok=True)
        raise
    if job.error is not None:
        plan_path.unlink(missing_ok=True)
        raise job.error
    assert job.report is not None
    return job.report


def parse_network(flavour: Flavour, builder: Any, logger: Any, onnx_path: Path, spec: NetworkSpec) -> tuple[Any, Any]:
    """Parse the file into a strongly typed network whose inputs and outputs are those of ``spec``.

    Returns the network and the parser, which owns memory that the network points to.

    Raises:
        EngineBuildError: the parser refused a node, or the tensors differ from ``spec``.
    """
    trt = flavour.trt
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        details = "; ".join(f"{e.desc()} (node {e.node_name() or e.node()})" for e in errors[:3]) or "no reason given"
        raise EngineBuildError(f"{flavour.name} {flavour.version} cannot parse {spec.name}: {details}")
    _check_tensors(network, spec)
    return network, parser


def make_profile(builder: Any, spec: NetworkSpec) -> Any:
    """The optimisation profile of ``spec``: minimum, optimum and maximum shape of every dynamic input."""
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        if tensor.dynamic:
            profile.set_shape(tensor.name, *spec.profile(tensor))
    return profile


def _strongly_typed(trt: Any) -> int:
    # A flag in TensorRT 10; the only mode, and no flag, in TensorRT 11 and TensorRT for RTX.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _check_tensors(network: Any, spec: NetworkSpec) -> None:
    def found(count: int, get: Callable[[int], Any]) -> list[tuple[str, tuple[int, ...]]]:
        return [(get(i).name, tuple(get(i).shape)) for i in range(count)]

    def wanted(tensors: tuple[Any, ...]) -> list[tuple[str, tuple[int, ...]]]:
        return [(t.name, tuple(a if isinstance(a, int) else -1 for a in t.shape)) for t in tensors]

    inputs, outputs = found(network.num_inputs, network.get_input), found(network.num_outputs, network.get_output)
    names = [name for name, _ in outputs]
    if inputs != wanted(spec.inputs) or names != [t.name for t in spec.outputs]:
        raise EngineBuildError(f"{spec.name}: the parsed network has {inputs} -> {names}, not what its manifest says")


@dataclass
class _BuildJob:
    """One build, run in a thread; the outcome is in ``report`` or ``error``."""

    flavour: Flavour
    onnx_path: Path
    spec: NetworkSpec
    plan_path: Path
    progress: Progress
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    report: PlanReport | None = None
    error: EngineBuildError | None = None

    def run(self) -> None:
        try:
            self.report = self._build()
        except EngineBuildError as error:
            self.error = error
        except Exception as error:  # anything TensorRT's bindings throw is a failed build to the caller
            self.error = EngineBuildError(f"building {self.spec.name} failed: {error}")
        finally:
            self.done.set()

    def _build(self) -> PlanReport:
        trt = self.flavour.trt
        started = time.perf_counter()
        logger = _make_logger(trt)
        monitor = _make_monitor(trt, self.progress, self.cancelled)
        builder = trt.Builder(logger)
        network, _parser = parse_network(self.flavour, builder, logger, self.onnx_path, self.spec)
        config = builder.create_builder_config()
        config.progress_monitor = monitor
        profile = make_profile(builder, self.spec)
        if profile:
            config.add_optimization_profile(profile)
        layers = network.num_layers
        plan = builder.build_serialized_network(network, config)
        if plan is None or logger.broken_profile:
            raise EngineBuildError(self._why_it_failed(logger))
        _write(plan, self.plan_path)
        return PlanReport(
            activation_bytes=logger.memory.get("activation_bytes"),
            weight_bytes=logger.memory.get("weight_bytes"),
            layers=layers,
            seconds=time.perf_counter() - started,
        )

    def _why_it_failed(self, logger: Any) -> str:
        if self.cancelled.is_set():
            return f"building {self.spec.name} was cancelled"
        reason = logger.broken_profile or (logger.errors[-1] if logger.errors else "no reason given")
        return f"{self.flavour.name} {self.flavour.version} cannot build {self.spec.name}: {reason}"


def _write(plan: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(memoryview(plan))
        file.flush()
        os.fsync(file.fileno())


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class comes from a module found at run time
        """Keeps what the builder reports of memory and of failures, and prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.memory: dict[str, int] = {}
            self.errors: list[str] = []
            self.broken_profile = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and _BROKEN_PROFILE in message:
                self.broken_profile = message
            elif severity == trt.ILogger.INFO:
                for key, pattern in _MEMORY.items():
                    if match := pattern.search(message):
                        self.memory[key] = int(match[1])

    return Logger()


def _make_monitor(trt: Any, progress: Progress, cancelled: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the fraction done; phases nest, and the outermost one counts the rest as parts of its steps."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock = threading.Lock()  # phases may report from several of the builder's threads
            self.phases: list[list[Any]] = []  # [name, steps, done], outermost first
            self.fraction = 0.0

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.phases.append([phase_name, max(num_steps, 1), 0])

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                for phase in self.phases:
                    if phase[0] == phase_name:
                        phase[2] = step + 1
            self._report()
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.phases = [phase for phase in self.phases if phase[0] != phase_name]
            self._report()

        def _report(self) -> None:
            with self.lock:
                fraction = 0.0
                for _, steps, done in reversed(self.phases):
                    fraction = min((done + fraction) / steps, 1.0)
                # Phases overlap and end early, so the estimate can step back; what is shown does not.
                self.fraction = max(self.fraction, fraction)
            progress(self.fraction)

    return Monitor()
