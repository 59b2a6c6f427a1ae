"""The builder's process: parse the graph, set the profile, build, report progress and memory.

`svd_trt.engine.plan` runs it as ``python -m svd_trt.engine.tensorrt_build``. The request is one `Job` and the answers
are `Message` objects, each a line of JSON.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from svd_trt.engine.child_process import Answer, connect_to_parent
from svd_trt.engine.manifest import TensorRtName
from svd_trt.engine.profiles import Profile
from svd_trt.engine.spec import NetworkSpec
from svd_trt.engine.tensorrt_import import TensorRt, find_tensorrt
from svd_trt.errors import EngineBuildError, SvdTrtError

__all__ = [
    "EngineOptions",
    "Job",
    "MappedWeights",
    "Message",
    "PlanReport",
    "build",
    "make_config",
    "make_profile",
    "parse_network",
]

# The builder logs these at INFO; without loading the engine there are no other figures of its memory.
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")  # once for each profile, in their order
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
# TensorRT only warns of a profile that it cannot satisfy at one of its ends; users would get a bundle that fails at
# frame counts it was built for.
_BROKEN_PROFILE = "not self-consistent"
# Tensors that the engine allocates while it runs (seen if one is larger than any GPU's memory) are missing from the
# report of activation memory.
_UNREPORTED = "Static Tensor Allocation failed"


class PlanReport(msgspec.Struct, frozen=True):
    """The builder's report on an engine."""

    activation_bytes: tuple[int | None, ...]
    """Of each profile, at its maximum."""
    weight_bytes: int | None
    layers: int
    seconds: float
    weight_streaming: bool = False
    """The builder's flag: weights may stay in host memory."""


class EngineOptions(msgspec.Struct, frozen=True):
    """How one engine is built, besides its network and profiles. All of it is in the plan's key."""

    weight_streaming: bool = False
    """Weights may stay in host memory and be copied in as they are used."""


class Job(msgspec.Struct, frozen=True):
    """One engine to build."""

    tensorrt: TensorRtName
    onnx_path: str
    plan_path: str
    spec: NetworkSpec
    profiles: tuple[Profile, ...]
    options: EngineOptions


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer, which has one of these: the fraction done, the report, or the error."""

    progress: float | None = None
    report: PlanReport | None = None
    error: str | None = None


def build(
    tensorrt: TensorRt,
    onnx_path: Path,
    spec: NetworkSpec,
    plan_path: Path,
    profiles: Sequence[Profile],
    options: EngineOptions,
    report_fraction: Callable[[float], object],
) -> PlanReport:
    """Build the engine of ``spec`` from ``onnx_path`` and write it to ``plan_path``, in this process.

    ``report_fraction`` is called with the fraction done, from 0 to 1, from threads of the builder.

    Raises:
        EngineBuildError: a node was refused, the tensors are not those of ``spec``, or the build failed.
    """
    trt = tensorrt.trt
    started = time.perf_counter()
    logger = _make_logger(trt)
    monitor = _make_monitor(trt, report_fraction)  # must outlive the builder
    builder = trt.Builder(logger)
    weights = MappedWeights(onnx_path)  # so must these, which the network points to
    network, _parser = parse_network(tensorrt, builder, logger, onnx_path, spec, weights)
    config = make_config(tensorrt, builder, spec, profiles, options)
    config.progress_monitor = monitor
    report = _compile(tensorrt, builder, logger, network, config, spec, plan_path, weights)
    return msgspec.structs.replace(report, seconds=time.perf_counter() - started)


def _compile(
    tensorrt: TensorRt,
    builder: Any,
    logger: Any,
    network: Any,
    config: Any,
    spec: NetworkSpec,
    plan_path: Path,
    weights: MappedWeights,
) -> PlanReport:
    layers = network.num_layers
    with _PlanFile(tensorrt.trt, plan_path) as plan, weights.kept_small():
        built = plan.build(builder, network, config)
    reason = logger.broken_profile or (logger.errors[-1] if logger.errors else "no reason given")
    if not built or logger.broken_profile:
        raise EngineBuildError(f"{tensorrt.name} {tensorrt.version} cannot build {spec.name}: {reason}")
    count = max(config.num_optimization_profiles, 1)
    known = len(logger.activation_bytes) == count and not logger.unreported
    return PlanReport(
        activation_bytes=tuple(logger.activation_bytes) if known else (None,) * count,
        weight_bytes=logger.weight_bytes,
        layers=layers,
        seconds=0.0,
        weight_streaming=config.get_flag(tensorrt.trt.BuilderFlag.WEIGHT_STREAMING),
    )


def parse_network(
    tensorrt: TensorRt, builder: Any, logger: Any, onnx_path: Path, spec: NetworkSpec, weights: MappedWeights
) -> tuple[Any, Any]:
    """Parse the file into a strongly typed network whose inputs and outputs are those of ``spec``.

    Returns the network and the parser. The parser and ``weights`` own memory that the network points to.

    Raises:
        EngineBuildError: the parser refused a node, or the tensors differ from ``spec``.
    """
    trt = tensorrt.trt
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not _parse(parser, onnx_path, weights):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        details = "; ".join(f"{e.desc()} (node {e.node_name() or e.node()})" for e in errors[:3]) or "no reason given"
        raise EngineBuildError(f"{tensorrt.name} {tensorrt.version} cannot parse {spec.name}: {details}")
    _check_tensors(network, spec)
    return network, parser


def _parse(parser: Any, onnx_path: Path, weights: MappedWeights) -> bool:
    """Parse the graph with the mapped weights; before TensorRT 10.13 the parser reads a copy of them itself."""
    if not hasattr(parser, "load_initializer"):
        return bool(parser.parse_from_file(str(onnx_path)))
    loaded = parser.load_model_proto(onnx_path.read_bytes(), str(onnx_path))
    return bool(
        loaded and all(parser.load_initializer(*tensor) for tensor in weights.tensors()) and parser.parse_model_proto()
    )


def make_config(
    tensorrt: TensorRt, builder: Any, spec: NetworkSpec, profiles: Sequence[Profile], options: EngineOptions
) -> Any:
    """The builder's configuration: the profiles, and the flags about precision, memory and reports."""
    flags = tensorrt.trt.BuilderFlag
    config = builder.create_builder_config()
    config.profiling_verbosity = tensorrt.trt.ProfilingVerbosity.DETAILED  # makes the builder list its kernels
    config.clear_flag(flags.TF32)  # it rounds products of fp32 tensors to 10 bits, and fp32 is asked for to be exact
    for ranges in profiles:
        if ranges:  # a network of fixed sizes has no profile of its own
            config.add_optimization_profile(make_profile(builder, spec, ranges))
    if options.weight_streaming:
        # TensorRT 10 accepts it for strongly typed networks only; these are strongly typed.
        config.set_flag(flags.WEIGHT_STREAMING)
    elif hasattr(flags, "REQUIRE_USER_ALLOCATION"):
        # Without it TensorRT for RTX may allocate while it runs, which a CUDA graph cannot capture. With both flags the
        # builder needs a CUDA driver (seen with 1.7.1), and streamed weights are slow anyway.
        config.set_flag(flags.REQUIRE_USER_ALLOCATION)
    return config


def make_profile(builder: Any, spec: NetworkSpec, ranges: Profile) -> Any:
    """The optimisation profile of ``ranges``: minimum, optimum and maximum shape of every dynamic input."""
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        if tensor.dynamic:
            profile.set_shape(tensor.name, *spec.profile(tensor, ranges))
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


class MappedWeights:
    """The weights beside an ONNX graph, mapped into memory: the builder reads them from the file without a copy."""

    def __init__(self, onnx_path: Path) -> None:
        self._onnx_path = onnx_path
        self._map: mmap.mmap | None = None
        path = onnx_path.with_name(f"{onnx_path.name}.data")
        if path.exists():
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def tensors(self) -> Iterator[tuple[str, int, int]]:
        """Name, address and size in bytes of each tensor in the file."""
        import onnx

        if self._map is None:
            return
        base = np.frombuffer(self._map, np.uint8).ctypes.data
        for tensor in onnx.load(self._onnx_path, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                yield tensor.name, base + int(place.get("offset", 0)), int(place["length"])

    @contextlib.contextmanager
    def kept_small(self) -> Iterator[None]:
        """Return pages to the system while the builder reads on; they stay in its cache and can be read again."""
        done = threading.Event()

        def sweep() -> None:
            while not done.wait(0.2):
                assert self._map is not None
                self._map.madvise(mmap.MADV_DONTNEED)

        thread = threading.Thread(target=sweep, daemon=True)
        if self._map is not None:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if thread.ident is not None:
                thread.join()


class _PlanFile:
    """The file of a plan, written piece by piece if this TensorRT can: a whole plan in memory takes gigabytes."""

    def __init__(self, trt: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._trt = trt
        self._file = path.open("wb")
        self._problem: OSError | None = None

    def build(self, builder: Any, network: Any, config: Any) -> bool:
        """Build the engine into the file; False if the builder failed or the file could not be written."""
        if hasattr(builder, "build_serialized_network_to_stream"):
            return bool(builder.build_serialized_network_to_stream(network, config, self._writer()))
        plan = builder.build_serialized_network(network, config)
        if plan is not None:
            self._file.write(memoryview(plan))
        return plan is not None

    def _writer(self) -> Any:
        outer = self

        class Writer(self._trt.IStreamWriter):  # type: ignore[misc,name-defined]  # from a module found at run time
            """Writes to the file and keeps errors, since an exception must not pass through the builder."""

            def __init__(self) -> None:
                outer._trt.IStreamWriter.__init__(self)

            def write(self, data: Any) -> int:
                try:
                    return outer._file.write(data)
                except OSError as error:
                    outer._problem = error
                    return 0

        return Writer()

    def __enter__(self) -> _PlanFile:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._problem is not None:
                raise self._problem
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class comes from a module found at run time
        """Keeps the builder's messages about memory and failures, and prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.activation_bytes: list[int] = []
            self.weight_bytes: int | None = None
            self.kernels: list[str] = []
            self.errors: list[str] = []
            self.broken_profile = ""
            self.unreported = False

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and _BROKEN_PROFILE in message:
                self.broken_profile = message.strip()
            elif _UNREPORTED in message:
                self.unreported = True
            elif "LayerType:" in message:
                self.kernels.append(message)
            elif match := _ACTIVATIONS.search(message):
                self.activation_bytes.append(int(match[1]))
            elif match := _WEIGHTS.search(message):
                self.weight_bytes = int(match[1])

    return Logger()


def _make_monitor(trt: Any, report_fraction: Callable[[float], object]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the fraction done. Phases nest: a phase counts the inner ones as parts of its running step."""

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
            return True

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.phases = [phase for phase in self.phases if phase[0] != phase_name]
            self._report()

        def _report(self) -> None:
            with self.lock:
                fraction = 0.0
                for _, steps, done in reversed(self.phases):
                    fraction = min((done + fraction) / steps, 1.0)
                # Phases overlap and end early, so the estimate can decrease; the reported fraction must not.
                self.fraction = max(self.fraction, fraction)
            report_fraction(self.fraction)

    return Monitor()


def _work(line: bytes, answer: Answer) -> None:
    job = msgspec.json.decode(line, type=Job)
    shown = 0.0

    def say(message: Message) -> None:
        answer(msgspec.json.encode(message))

    def progress(fraction: float) -> None:
        nonlocal shown
        if fraction >= shown + 0.002:  # a large network has tens of thousands of steps
            shown = fraction
            say(Message(progress=fraction))

    try:
        tensorrt = find_tensorrt(job.tensorrt)
        report = build(
            tensorrt,
            Path(job.onnx_path),
            job.spec,
            Path(job.plan_path),
            job.profiles,
            job.options,
            progress,
        )
    except SvdTrtError as error:
        say(Message(error=str(error)))
    except OSError as error:
        reason = error.strerror or str(error)
        say(Message(error=f"cannot write the engine of {job.spec.name}: {reason}; free space or choose another place"))
    except Exception as error:  # whatever TensorRT's bindings raise means that the build failed
        say(Message(error=f"building {job.spec.name} failed: {error}"))
    else:
        say(Message(report=report))


if __name__ == "__main__":
    requests, answer = connect_to_parent()
    _work(next(requests), answer)
