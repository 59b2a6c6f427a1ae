"""A benchmark run: every contender in a process of its own, in rounds, and the figures from their measurements.

In a round every contender makes the video once. Each round begins with another contender, so that a machine that grows
warm or busy treats all alike; ratios are taken within a round. Warm-up videos, loading, building and compiling are
timed separately. A contender that waits uses no CPU time. If memory does not hold all contenders at once, those that
do not fit are started, and warmed up, for each round.
"""

from __future__ import annotations

import datetime as dt
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from svd_trt.benchmarks.contender_process import ContenderError, ContenderProcess, Loaded, Measurement
from svd_trt.benchmarks.contenders import Contender, Job
from svd_trt.benchmarks.machine import describe_clocks, describe_machine
from svd_trt.benchmarks.measuring import compare_frames, free_vram
from svd_trt.benchmarks.results import (
    BASELINE,
    STAGES,
    ContenderResult,
    Curve,
    Fidelity,
    Peak,
    Result,
    Round,
    Spread,
    Summary,
    Workload,
)
from svd_trt.benchmarks.workload import Bundles
from svd_trt.errors import BenchmarkError, SvdTrtError
from svd_trt.export.preflight import available_memory
from svd_trt.progress import Progress

__all__ = ["Bench"]

_RESERVE = 1.5  # a contender stays loaded if this many times the largest one's memory is left for the others


@dataclass
class _Participant:
    """A contender that runs here, and what was measured of it; ``process`` is None if it does not stay loaded."""

    contender: Contender
    bundle: Path | None
    process: ContenderProcess | None
    loaded: Loaded
    started_s: float
    warmup: Measurement
    build_s: float | None
    rounds: dict[int, Measurement] = field(default_factory=dict)
    failed: str | None = None
    fidelity: Fidelity | None = None


@dataclass
class Bench:
    """One run.

    Attributes:
        workload: the video to make.
        contenders: who makes it; the first is the baseline.
        rounds: how many.
        threads: processors for each contender.
        work: folder for videos, frames and logs.
        picture: file that the video starts from.
        bundles: finds or builds the bundles that svd-trt's contenders run.
        command: the command line, for the record.
        gpu: use the GPU.
        progress: called at the start of each stage.
        timeout: seconds that a contender may take to load, or for one video.
        peak: the machine's rate, if it was measured.
        notes: what could not be measured.
    """

    workload: Workload
    contenders: Sequence[Contender]
    rounds: int
    threads: int
    work: Path
    picture: Path
    bundles: Bundles
    command: str
    gpu: bool
    progress: Progress
    timeout: float = 3600.0
    peak: Peak | None = None
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _bundles: dict[str, tuple[Path, float | None]] = field(default_factory=dict)
    _reference: Path | None = None
    _participants: dict[str, _Participant] = field(default_factory=dict)
    _skipped: dict[str, str] = field(default_factory=dict)

    def run(self, keep: Callable[[Result], None]) -> Result:
        """Measure; ``keep`` gets the result after every round, so that an interruption loses at most one.

        Raises:
            BenchmarkError: the baseline failed, or the first of svd-trt's contenders that this machine can run failed
                before the first round.
        """
        date = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        machine = describe_machine()
        # Build first: it needs much memory, and TensorRT times kernels, which needs an idle GPU.
        self._build_bundles()
        self._make_reference()
        with ExitStack() as processes:
            for contender in self.contenders:
                if contender.name not in self._skipped:
                    self.progress(f"load {contender.name}", 0, 0)
                    self._load(contender, processes)
            for number in range(self.rounds):
                self._run_round(number)
                result = self._result(date, machine)
                keep(result)
        return result

    def with_curves(self, result: Result) -> Result:
        """The result with the curves and notes that were added since."""
        return msgspec.structs.replace(result, curves=list(self.curves), notes=list(self.notes))

    def start(
        self, contender: Contender, workload: Workload, bundle: Path | None, *, exact: bool = False
    ) -> ContenderProcess:
        """Start a process of ``contender`` and wait until it has loaded."""
        job = Job(
            contender=contender.name,
            workload=workload,
            picture=str(self.picture),
            bundle=None if bundle is None else str(bundle),
            threads=self.threads,
            gpu=self.gpu and not contender.on_cpu,
            exact=exact,
        )
        return ContenderProcess(job, self.work / f"{contender.name}.log", timeout=self.timeout)

    def _build_bundles(self) -> None:
        """Build the bundles; skip contenders that cannot run here.

        Raises:
            BenchmarkError: the bundle of the main contender cannot be built.
        """
        for contender in self.contenders:
            try:
                if (obstacle := contender.obstacle()) is not None:
                    self._skipped[contender.name] = obstacle
                elif contender.bundle:
                    self._bundles[contender.name] = self.bundles.get(contender.bundle)
            except SvdTrtError as error:
                self._skip(contender, f"its bundle was not built: {error}")

    def _make_reference(self) -> None:
        """Make the frames of eager diffusers in fp32; on a CPU in fp32 these are the baseline's own."""
        if self.workload.precision == "fp32" and not self.gpu:
            self._reference = self.work / f"{BASELINE}.npy"
            return
        path = self.work / "reference-fp32.npy"
        exact = msgspec.structs.replace(self.workload, precision="fp32")
        self.progress("reference in fp32", 0, 0)
        try:
            with self.start(self.contenders[0], exact, None, exact=True) as process:
                process.make_video(self.work / "reference.mp4", path)
        except ContenderError as error:
            self.notes.append(f"frames were not compared: the reference in fp32 failed: {error}")
        else:
            self._reference = path

    def _load(self, contender: Contender, processes: ExitStack) -> None:
        """Load a contender and have it make a first video, or note why it cannot."""
        bundle, build_s = self._bundles.get(contender.name, (None, None))
        try:
            with ExitStack() as opened:
                process = opened.enter_context(self.start(contender, self.workload, bundle))
                warmup = process.make_video(self._video(contender))
                stays = _fits([warmup, *(p.warmup for p in self._participants.values())], gpu=self.gpu)
                if stays:
                    processes.enter_context(opened.pop_all())
        except (ContenderError, SvdTrtError) as error:
            if contender.name == BASELINE:
                raise BenchmarkError(f"the baseline run, {BASELINE}, failed: {error}{_hint(error)}") from error
            self._skip(contender, str(error))
            return
        self._participants[contender.name] = _Participant(
            contender, bundle, process if stays else None, process.loaded, process.started_s, warmup, build_s
        )

    def _skip(self, contender: Contender, reason: str) -> None:
        """Note why a contender is not measured; without the main one there is little to measure.

        Raises:
            BenchmarkError: it is the main one.
        """
        self._skipped[contender.name] = reason
        if contender is self._main:
            raise BenchmarkError(
                f"{contender.name}, which this run is for, cannot be measured: {reason}; "
                "to measure the others, name each with --contender"
            )

    @property
    def _main(self) -> Contender | None:
        """The contender that the run is for: the first of svd-trt's own that this machine can run."""
        return next((c for c in self.contenders if c.kind == "svd-trt" and c.obstacle() is None), None)

    def _run_round(self, number: int) -> None:
        active = [p for p in self._participants.values() if p.failed is None]
        first = number % len(active)
        for participant in active[first:] + active[:first]:
            name = participant.contender.name
            self.progress(f"round {number + 1} of {self.rounds}: {name}", 0, 0)
            frames = self.work / f"{name}.npy" if number == 0 else None
            try:
                participant.rounds[number] = self._make_video(participant, frames)
            except ContenderError as error:
                participant.failed = f"failed in round {number + 1}: {error}"
                if name == BASELINE:
                    raise BenchmarkError(f"{BASELINE} {participant.failed}{_hint(error)}") from error
        if number == 0:
            self._compare_frames()

    def _make_video(self, participant: _Participant, frames: Path | None) -> Measurement:
        video = self._video(participant.contender)
        if participant.process is not None:
            return participant.process.make_video(video, frames)
        with self.start(participant.contender, self.workload, participant.bundle) as process:
            process.make_video(video)
            return process.make_video(video, frames)

    def _compare_frames(self) -> None:
        """Compare every contender's frames with the reference."""
        if self._reference is None:
            return
        reference = np.load(self._reference)
        for name, participant in self._participants.items():
            if participant.failed is None:
                participant.fidelity = compare_frames(np.load(self.work / f"{name}.npy"), reference)

    def _video(self, contender: Contender) -> Path:
        return self.work / f"{contender.name}.mp4"

    def _result(self, date: str, machine: dict[str, object]) -> Result:
        return Result(
            date=date,
            command=self.command,
            machine=machine,
            threads=self.threads,
            workload=self.workload,
            peak=self.peak,
            contenders=[self._contender_result(contender) for contender in self.contenders],
            curves=list(self.curves),
            clocks_after=describe_clocks(),
            notes=list(self.notes),
        )

    def _contender_result(self, contender: Contender) -> ContenderResult:
        name = contender.name
        participant = self._participants.get(name)
        if participant is None or participant.failed is not None or not participant.rounds:
            reason = self._skipped.get(name) or (participant.failed if participant else None) or "not measured"
            return ContenderResult(name=name, what=contender.what, skipped=reason)
        peak = None if self.gpu and contender.on_cpu else self.peak  # the peak is the GPU's
        return _figures(participant, self._participants[BASELINE], self.workload, peak)


def _figures(
    participant: _Participant, baseline: _Participant, workload: Workload, peak: Peak | None
) -> ContenderResult:
    """The figures of one contender from its measurements and the baseline's."""
    measured = list(participant.rounds.values())
    spread = _spread(participant, baseline)
    rate = None if workload.step_flops is None else workload.step_flops / spread.step_s.median
    total, loaded, first = spread.total_s.median, participant.loaded, participant.warmup
    host = [m.host_s for m in measured if m.host_s is not None]
    energy = [m.energy_j for m in measured if m.energy_j is not None]
    first_call_s = max(0.0, first.total_s - first.load_s - total)
    contender, fidelity = participant.contender, participant.fidelity
    return ContenderResult(
        name=contender.name,
        what=contender.what,
        step_s=spread.step_s.median,
        total_s=total,
        stages={stage: summary.median for stage, summary in spread.stages.items()},
        ratio_to_eager=spread.ratio_to_eager.median,
        step_ratio_to_eager=spread.step_ratio_to_eager.median,
        spread=spread,
        psnr_db=None if fidelity is None else fidelity.worst_psnr_db,
        fidelity=fidelity,
        import_s=loaded.import_s,
        load_s=loaded.load_s + first.load_s,
        prepare_s=first_call_s if contender.mode == "compile" else participant.build_s,
        first_call_s=first_call_s,
        warmup_s=first.total_s,
        startup_s=participant.started_s + first.first_step_s - loaded.load_s - first.load_s,
        peak_rss=max(m.peak_rss for m in (first, *measured)),
        peak_vram=first.peak_vram,  # no other contender used the GPU during the warm-up
        energy_j=statistics.median(energy) if energy else None,
        host_overhead_s=statistics.median(host) if host else None,
        step_flops_per_s=rate,
        share_of_peak=None if rate is None or peak is None else rate / peak.flops_per_s,
        rounds=[
            Round(round=number, total_s=m.total_s, stages=m.stages, steps=m.steps, energy_j=m.energy_j)
            for number, m in participant.rounds.items()
        ],
    )


def _spread(participant: _Participant, baseline: _Participant) -> Spread:
    measured = list(participant.rounds.values())
    pairs = [(baseline.rounds[number], m) for number, m in participant.rounds.items() if number in baseline.rounds]
    return Spread(
        step_s=Summary.of([_step_s(m) for m in measured]),
        total_s=Summary.of([m.total_s for m in measured]),
        stages={stage: Summary.of([m.stages[stage] for m in measured]) for stage in STAGES},
        ratio_to_eager=Summary.of_ratios([eager.total_s for eager, _ in pairs], [m.total_s for _, m in pairs]),
        step_ratio_to_eager=Summary.of_ratios([_step_s(eager) for eager, _ in pairs], [_step_s(m) for _, m in pairs]),
    )


def _step_s(measurement: Measurement) -> float:
    return statistics.median(measurement.steps)


def _fits(measurements: Sequence[Measurement], *, gpu: bool) -> bool:
    """True if enough RAM and VRAM are left for another contender beside those that are loaded."""
    if available_memory() < _RESERVE * max(m.peak_rss for m in measurements):
        return False
    if not gpu:
        return True
    free = free_vram()
    return free is None or free >= _RESERVE * max(m.peak_vram or 0 for m in measurements)


def _hint(error: Exception) -> str:
    """What to do if the error says that memory ran out."""
    return "; --decode-chunk-size 4, fewer --num-frames or a smaller size need less" if "memory" in str(error) else ""
