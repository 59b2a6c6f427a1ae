"""The builder's process: parse the graph, set the profile, build, report progress and memory.

`svd_trt.engine.plan` runs it as ``python -m svd_trt.engine.tensorrt_build``. The request is one `Job` and the answers
are `Message` objects, each a line of JSON.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from svd_trt.engine.builder_messages import make_logger, make_monitor
from svd_trt.engine.child_process import Answer, connect_to_parent
from svd_trt.engine.driver import gpu_count, load_driver, select_gpu
from svd_trt.engine.kernels import parse_kernels, write_kernels
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
    "engine_memory",
    "kept_timings",
    "make_config",
    "make_profile",
    "parse_network",
]


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
    optimization_level: int | None = None
    """0 to 5: how much time the builder takes to find fast kernels; None is TensorRT's default, 3."""


class Job(msgspec.Struct, frozen=True):
    """One engine to build."""

    tensorrt: TensorRtName
    target: str
    device: int
    onnx_path: str
    plan_path: str
    kernels_path: str
    timing_cache: str | None
    spec: NetworkSpec
    profiles: tuple[Profile, ...]
    options: EngineOptions


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer, which has one of these: the fraction done, a note to the user, the report, or the error."""

    note: str | None = None
    progress: float | None = None
    report: PlanReport | None = None
    error: str | None = None


def build(job: Job, report_fraction: Callable[[float], object], note: Callable[[str], object]) -> PlanReport:
    """Build the engine of ``job`` in this process, and write its plan and its list of kernels.

    ``report_fraction`` is called with the fraction done, from 0 to 1, from threads of the builder; ``note`` with what
    the user should know.

    Raises:
        EngineBuildError: a node was refused, the tensors are not those of ``spec``, or the build failed.
    """
    started = time.perf_counter()
    tensorrt = find_tensorrt(job.tensorrt, job.device, tuple(job.target.split(",")) if job.target else ())
    if tensorrt.name == "tensorrt":
        select_gpu(load_driver(), job.device)
    trt, spec, onnx_path = tensorrt.trt, job.spec, Path(job.onnx_path)
    logger = make_logger(trt)
    monitor = make_monitor(trt, report_fraction)  # must outlive the builder
    builder = trt.Builder(logger)
    weights = MappedWeights(onnx_path)  # so must these, which the network points to
    network, _parser = parse_network(tensorrt, builder, logger, onnx_path, spec, weights)
    config = make_config(tensorrt, builder, spec, job.profiles, job.options)
    config.progress_monitor = monitor
    with kept_timings(config, Path(job.timing_cache) if job.timing_cache else None, note):
        report = _compile(tensorrt, builder, logger, network, config, spec, Path(job.plan_path), weights)
    if (asked := engine_memory(trt, Path(job.plan_path), len(report.activation_bytes))) is not None:
        report = msgspec.structs.replace(report, activation_bytes=asked)
    known = zip(job.profiles, report.activation_bytes, strict=True)
    write_kernels(parse_kernels(logger.kernels, spec, list(known)), Path(job.kernels_path))
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
    reason = logger.broken_profile or (logger.errors[0] if logger.errors else "no reason given")
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
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if tensorrt.name == "tensorrt-rtx":
        _set_targets(config, tensorrt)
    if options.weight_streaming:
        # TensorRT 10 accepts it for strongly typed networks only; these are strongly typed.
        config.set_flag(flags.WEIGHT_STREAMING)
    elif hasattr(flags, "REQUIRE_USER_ALLOCATION"):
        # Without it TensorRT for RTX may allocate while it runs, which a CUDA graph cannot capture. With both flags the
        # builder needs a CUDA driver (seen with 1.7.1), and streamed weights are slow anyway.
        config.set_flag(flags.REQUIRE_USER_ALLOCATION)
    return config


def _set_targets(config: Any, tensorrt: TensorRt) -> None:
    """Compile for the GPUs that were asked for; without any, TensorRT for RTX compiles for Ampere and later."""
    targets = tensorrt.target.split(",") if tensorrt.target else []
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        capability = getattr(tensorrt.trt.ComputeCapability, target.upper())
        if not config.set_compute_capability(capability, index):
            raise EngineBuildError(f"{tensorrt.name} {tensorrt.version} does not build for {target}")


def engine_memory(trt: Any, plan_path: Path, profiles: int) -> tuple[int, ...] | None:
    """Activation bytes of each of ``profiles`` profiles, from the engine itself; None if it cannot be loaded here.

    Loading it needs a GPU that it was built for, and a driver that works. Without them there is only the builder's log.
    """
    try:
        if not gpu_count():
            return None
    except SvdTrtError:
        return None
    with plan_path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        view = memoryview(plan)
        try:
            engine = trt.Runtime(make_logger(trt)).deserialize_cuda_engine(view)
        finally:
            view.release()
    if engine is None:
        return None
    return tuple(int(engine.get_device_memory_size_for_profile_v2(index)) for index in range(profiles))


@contextlib.contextmanager
def kept_timings(config: Any, path: Path | None, note: Callable[[str], object]) -> Iterator[None]:
    """Let the builder take measured times of kernels from the file ``path``, and add its own when it has built.

    TensorRT gives and takes the file's content. A file of another version or GPU stays as it is. A file that cannot be
    read or written fails no build, because the engine does not need it.
    """
    if path is None:
        yield
        return
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        note(f"the timing cache {path} cannot be read ({error.strerror}); it is not used")
        yield
        return
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        note(f"{path} is the timing cache of another TensorRT or GPU: it is not used, and left as it is")
        yield
        return
    yield
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(bytes(config.get_timing_cache().serialize()))
        partial.replace(path)
    except OSError as error:
        note(f"the timing cache {path} cannot be written ({error.strerror}); the engine is built all the same")
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


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
        report = build(job, progress, lambda text: say(Message(note=text)))
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
