"""The run itself: every contender in a process of its own, rounds in turn, and figures out of them.

A round has every contender make the video once, each time beginning with another of them, so that a machine that
grows warm or busy treats all alike; ratios are taken within a round. Warm-up videos, loading, building and compiling
are timed apart. Idle contenders wait for a line of input and take no processor time. Where memory does not hold them
all, those that are too many are started, and warmed up, for each round anew.
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

from svd_trt.benchmarks.bundles import Bundles
from svd_trt.benchmarks.contender_process import ContenderError, Worker
from svd_trt.benchmarks.contenders import Entrant
from svd_trt.benchmarks.fidelity import compare_frames
from svd_trt.benchmarks.machine import describe_clocks, describe_machine
from svd_trt.benchmarks.protocol import Job, Made, Ready
from svd_trt.benchmarks.resources import free_vram
from svd_trt.benchmarks.schema import BASELINE, STAGES, Contender, Curve, Fidelity, Peak, Result, Round, Spread, Subject
from svd_trt.benchmarks.stats import measure, ratios
from svd_trt.errors import BenchmarkError, SvdTrtError
from svd_trt.export.preflight import available_memory

__all__ = ["Bench", "Report"]

_ROOM = 1.5  # a contender stays loaded while so many times what the largest took is left for the others

Report = Callable[[str, int, int], None]
"""Called as ``report(what, done, total)``."""


@dataclass
class _Taking:
    """A contender that takes part, and what it has shown so far; ``worker`` is None where it does not stay loaded."""

    entrant: Entrant
    bundle: Path | None
    worker: Worker | None
    ready: Ready
    started_s: float
    warmup: Made
    prepare_s: float | None
    rounds: dict[int, Made] = field(default_factory=dict)
    failed: str | None = None
    fidelity: Fidelity | None = None


@dataclass
class Bench:
    """One run of the harness.

    Attributes:
        subject: what to make.
        entrants: who makes it; the first is the baseline.
        rounds: how often.
        threads: processors for each.
        work: folder for bundles, videos and frames.
        picture: what the video is of.
        bundles: finds or builds what svd-trt's contenders run.
        command: for the record.
        gpu: there is one to use.
        report: told of progress.
        timeout: seconds that a contender may take for one answer.
    """

    subject: Subject
    entrants: Sequence[Entrant]
    rounds: int
    threads: int
    work: Path
    picture: Path
    bundles: Bundles
    command: str
    gpu: bool
    report: Report
    timeout: float = 3600.0
    peak: Peak | None = None
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _paths: dict[str, Path] = field(default_factory=dict)
    _built_s: dict[str, float | None] = field(default_factory=dict)
    _reference: Path | None = None
    _taking: dict[str, _Taking] = field(default_factory=dict)
    _skipped: dict[str, str] = field(default_factory=dict)

    def run(self, keep: Callable[[Result], None]) -> Result:
        """Measure; ``keep`` gets the result after every round, so that an interruption loses one at most.

        Raises:
            BenchmarkError: the baseline failed.
        """
        date = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        machine = describe_machine()
        # First what takes much memory for a while; whoever builds an engine measures kernels, and wants the GPU alone.
        self._build()
        self._make_reference()
        with ExitStack() as stack:
            for index, entrant in enumerate(self.entrants):
                if entrant.name not in self._skipped:
                    self.report(f"load {entrant.name}", index, len(self.entrants))
                    self._admit(entrant, stack)
            self.report("load", len(self.entrants), len(self.entrants))
            for number in range(self.rounds):
                self._round(number)
                result = self._result(date, machine)
                keep(result)
        return result

    def with_curves(self, result: Result) -> Result:
        """The result with the curves, and notes, since."""
        return msgspec.structs.replace(result, curves=list(self.curves), notes=list(self.notes))

    def _build(self) -> None:
        """Every bundle that is wanted; who cannot run here, or gets none, is skipped."""
        for entrant in self.entrants:
            try:
                if (obstacle := entrant.obstacle()) is not None:
                    raise ContenderError(obstacle)
                if entrant.bundle:
                    self._paths[entrant.name], self._built_s[entrant.name] = self.bundles.get(entrant.bundle)
            except (ContenderError, SvdTrtError) as error:
                self._skipped[entrant.name] = str(error)

    def _make_reference(self) -> None:
        """Frames of eager diffusers in fp32: on a CPU in fp32 the baseline makes them itself."""
        if self.subject.precision == "fp32" and not self.gpu:
            self._reference = self.work / f"{BASELINE}.npy"
            return
        path = self.work / "reference-fp32.npy"
        exact = msgspec.structs.replace(self.subject, precision="fp32")
        self.report("reference in fp32", 0, 0)
        try:
            with self.start(self.entrants[0], exact, None, exact=True) as worker:
                worker.make(self.work / "reference.mp4", path)
        except ContenderError as error:
            self.notes.append(f"frames were not compared: the reference in fp32 failed: {error}")
        else:
            self._reference = path

    def _admit(self, entrant: Entrant, stack: ExitStack) -> None:
        """Load a contender and have it make a first video; note why where it cannot."""
        bundle = self._paths.get(entrant.name)
        try:
            with ExitStack() as held:
                worker = held.enter_context(self.start(entrant, self.subject, bundle))
                warmup = worker.make(self._video(entrant))
                took = [warmup, *(t.warmup for t in self._taking.values())]
                stays = _has_room(took, gpu=self.gpu)
                if stays:
                    stack.enter_context(held.pop_all())
        except (ContenderError, SvdTrtError) as error:
            if entrant.name == BASELINE:
                raise BenchmarkError(
                    f"{BASELINE} failed, and all else is measured against it: {error}{_hint(error)}"
                ) from error
            self._skipped[entrant.name] = str(error)
            return
        kept = worker if stays else None
        built_s = self._built_s.get(entrant.name)
        self._taking[entrant.name] = _Taking(entrant, bundle, kept, worker.ready, worker.started_s, warmup, built_s)

    def start(self, entrant: Entrant, subject: Subject, bundle: Path | None, *, exact: bool = False) -> Worker:
        """A process of ``entrant``, loaded."""
        job = Job(
            contender=entrant.name,
            subject=subject,
            picture=str(self.picture),
            bundle=None if bundle is None else str(bundle),
            threads=self.threads,
            gpu=self.gpu and not entrant.on_cpu,
            exact=exact,
        )
        return Worker(job, self.work / f"{entrant.name}.log", timeout=self.timeout)

    def _round(self, number: int) -> None:
        taking = [t for t in self._taking.values() if t.failed is None]
        first = number % len(taking)
        for index, one in enumerate(taking[first:] + taking[:first]):
            self.report(
                f"round {number + 1}: {one.entrant.name}", number * len(taking) + index, self.rounds * len(taking)
            )
            frames = self.work / f"{one.entrant.name}.npy" if number == 0 else None
            try:
                one.rounds[number] = self._make(one, frames)
            except ContenderError as error:
                one.failed = f"failed in round {number + 1}: {error}"
                if one.entrant.name == BASELINE:
                    raise BenchmarkError(f"{BASELINE} failed in round {number + 1}: {error}{_hint(error)}") from error
        if number == 0:
            self._compare()

    def _make(self, one: _Taking, frames: Path | None) -> Made:
        if one.worker is not None:
            return one.worker.make(self._video(one.entrant), frames)
        with self.start(one.entrant, self.subject, one.bundle) as worker:
            worker.make(self._video(one.entrant))
            return worker.make(self._video(one.entrant), frames)

    def _compare(self) -> None:
        """Every contender's frames with those of the reference."""
        if self._reference is None:
            return
        reference = np.load(self._reference)
        for one in self._taking.values():
            if one.failed is None:
                one.fidelity = compare_frames(np.load(self.work / f"{one.entrant.name}.npy"), reference)

    def _video(self, entrant: Entrant) -> Path:
        return self.work / f"{entrant.name}.mp4"

    def _result(self, date: str, machine: dict[str, object]) -> Result:
        baseline = self._taking[BASELINE]
        found = [self._contender(e, baseline) for e in self.entrants]
        return Result(
            date=date,
            command=self.command,
            machine=machine,
            threads=self.threads,
            subject=self.subject,
            peak=self.peak,
            contenders=found,
            curves=list(self.curves),
            clocks_after=describe_clocks(),
            notes=list(self.notes),
        )

    def _contender(self, entrant: Entrant, baseline: _Taking) -> Contender:
        one = self._taking.get(entrant.name)
        if one is None or one.failed is not None or not one.rounds:
            reason = self._skipped.get(entrant.name) or (one.failed if one else None) or "not measured"
            return Contender(name=entrant.name, what=entrant.what, skipped=reason)
        peak = None if self.gpu and entrant.on_cpu else self.peak  # it is the GPU's
        return _figures(one, baseline, self.subject, peak)


def _figures(one: _Taking, baseline: _Taking, subject: Subject, peak: Peak | None) -> Contender:
    made = list(one.rounds.values())
    shared = [n for n in one.rounds if n in baseline.rounds]
    against = [baseline.rounds[n] for n in shared]
    ours = [one.rounds[n] for n in shared]
    spread = Spread(
        step_s=measure([statistics.median(m.steps) for m in made]),
        total_s=measure([m.total_s for m in made]),
        stages={stage: measure([m.stages[stage] for m in made]) for stage in STAGES},
        ratio_to_eager=ratios([m.total_s for m in against], [m.total_s for m in ours]),
        step_ratio_to_eager=ratios(
            [statistics.median(m.steps) for m in against], [statistics.median(m.steps) for m in ours]
        ),
    )
    rate = None if subject.step_flops is None else subject.step_flops / spread.step_s.median
    warm, ready, first = spread.total_s.median, one.ready, one.warmup
    host = [m.host_s for m in made if m.host_s is not None]
    energy = [m.energy_j for m in made if m.energy_j is not None]
    extra = max(0.0, first.total_s - first.load_s - warm)  # a compiler works in the first call
    return Contender(
        name=one.entrant.name,
        what=one.entrant.what,
        skipped=None,
        step_s=spread.step_s.median,
        total_s=spread.total_s.median,
        stages={stage: m.median for stage, m in spread.stages.items()},
        ratio_to_eager=spread.ratio_to_eager.median,
        step_ratio_to_eager=spread.step_ratio_to_eager.median,
        spread=spread,
        psnr_db=None if one.fidelity is None else one.fidelity.worst_psnr_db,
        fidelity=one.fidelity,
        import_s=ready.import_s,
        load_s=ready.load_s + first.load_s,
        prepare_s=extra if one.entrant.mode == "compile" else one.prepare_s,
        first_call_s=extra,
        warmup_s=first.total_s,
        startup_s=one.started_s + first.first_step_s - ready.load_s - first.load_s,
        peak_rss=max(m.peak_rss for m in (first, *made)),
        peak_vram=first.peak_vram,  # while it was the only one to take any
        energy_j=statistics.median(energy) if energy else None,
        host_overhead_s=statistics.median(host) if host else None,
        step_flops_per_s=rate,
        share_of_peak=None if rate is None or peak is None else rate / peak.flops_per_s,
        rounds=[
            Round(round=n, total_s=m.total_s, stages=m.stages, steps=m.steps, energy_j=m.energy_j)
            for n, m in one.rounds.items()
        ],
    )


def _has_room(took: Sequence[Made], *, gpu: bool) -> bool:
    """Whether enough memory of either kind is left for another one beside those that are loaded."""
    if available_memory() < _ROOM * max(m.peak_rss for m in took):
        return False
    if not gpu:
        return True
    free = free_vram()
    return free is None or free >= _ROOM * max(m.peak_vram or 0 for m in took)


def _hint(error: Exception) -> str:
    """What to do where the message says that memory ran out."""
    return "; --decode-chunk-size 4, fewer --num-frames or a smaller size need less" if "memory" in str(error) else ""
