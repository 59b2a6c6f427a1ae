"""The questions for the first GPU that is at hand, the most valuable first.

    python -m svd_trt.benchmarks.gpu_probe --list
    python -m svd_trt.benchmarks.gpu_probe --limit 590 --missing

Each step runs in a process of its own with a limit of its own. A step that fails, crashes or runs over its limit is a
record like any other, and the next step starts. The file is written after each figure, so whatever was measured stays.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from svd_trt.benchmarks.machine import describe_machine
from svd_trt.benchmarks.probe_steps import NEEDS, STEPS, Answer, ProbeJob, Step, choose_steps
from svd_trt.benchmarks.results import write_file
from svd_trt.engine.child_process import ChildProcess
from svd_trt.engine.manifest import TensorRtName
from svd_trt.errors import ResultError, SvdTrtError

__all__ = ["main", "run_step"]

_STOPPED = "the probe was stopped"  # the reason in a record until its step ends
_WHOLE_SHARE = 0.95  # of --limit; with so much left, a step starts that could take more than all of it


@click.command()
@click.option("--step", "names", multiple=True, metavar="NAME", help="A step or a group, such as rtx; several times.")
@click.option("--missing", is_flag=True, help="Leave out the steps that ended and were not skipped.")
@click.option("--limit", type=click.FloatRange(1), metavar="SECONDS", help="Take so many seconds at most altogether.")
@click.option("--dry-run", is_flag=True, help="Run every step with tiny networks on the CPU, as far as it goes.")
@click.option("--backend", type=click.Choice(get_args(TensorRtName)), default="tensorrt-rtx", show_default=True)
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), help="Use this bundle instead of building one.")
@click.option("--model", help="Use this checkpoint, in any form that `svd-trt build` takes.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for bundles and logs.  [default: in /tmp]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON file to update.  [default: benchmarks/results/gpu-probe-GPU.json; of a dry run, in --work]",
)
@click.option("--list", "list_", is_flag=True, help="Show the steps, what they need and their limits.")
def main(
    names: tuple[str, ...],
    missing: bool,
    limit: float | None,
    dry_run: bool,
    backend: TensorRtName,
    bundle: Path | None,
    model: str | None,
    work: Path | None,
    output: Path | None,
    list_: bool,
) -> None:
    """Ask this machine's GPU what no other machine can answer, and record every answer."""
    try:
        steps = choose_steps(names)
        if list_:
            _print_steps(steps)
            return
        work = work or Path(tempfile.gettempdir(), "svd-trt-gpu-probe")
        work.mkdir(parents=True, exist_ok=True)
        record = _Record(output or _default_output(work, dry_run=dry_run), dry_run=dry_run)
        if missing:
            steps = [step for step in steps if not record.has_answer(step)]
        job = ProbeJob(
            work=str(work.resolve()),
            backend=backend,
            bundle=None if bundle is None else str(bundle.resolve()),
            model=model,
            dry_run=dry_run,
        )
        _run_steps(steps, job, record, limit)
    except SvdTrtError as error:
        sys.exit(f"error: {error}")


def _print_steps(steps: list[Step]) -> None:
    for step in steps:
        click.echo(f"{step.name:18} {step.seconds:4} s  {', '.join(step.needs)}\n    {step.what}")
    click.echo("\nneeds:")
    for need, meaning in NEEDS.items():
        click.echo(f"{need:18} {meaning}")


def _default_output(work: Path, *, dry_run: bool) -> Path:
    if dry_run:
        return work / "gpu-probe-dry-run.json"
    gpus = describe_machine()["gpu"]
    name = "-".join(gpus[0].partition(",")[0].lower().split()) if gpus else "none"
    return Path("benchmarks", "results", f"gpu-probe-{name}.json")


class _Record:
    """The file of records: those that it had stay until their step runs again.

    Raises:
        ResultError: the file is not one of this program, or of a dry run and this is none, or the reverse.
    """

    def __init__(self, path: Path, *, dry_run: bool) -> None:
        self.path = path
        self.dry_run = dry_run
        self.machine = describe_machine()
        self.steps: dict[str, Any] = {}
        if path.exists():
            try:
                content = json.loads(path.read_bytes())
                same = content["benchmark"] == "gpu-probe" and content["dry_run"] == dry_run
            except (ValueError, KeyError, TypeError):
                same = False
            if not same:
                raise ResultError(f"{path} is no record of such a probe; move it away, or name another file with -o")
            self.steps = content["steps"]

    def has_answer(self, step: Step) -> bool:
        """Whether ``step`` ended. One that was skipped may run now: what it needs can come later, such as a bundle."""
        entry = self.steps.get(step.name)
        return entry is not None and entry["outcome"] != "skipped" and entry["reason"] != _STOPPED

    @property
    def rtx_runs(self) -> bool:
        """Whether a small engine of TensorRT for RTX, and not of TensorRT, ran on this GPU."""
        small = [entry for name, entry in self.steps.items() if name.startswith("rtx-")]
        return any(
            entry["outcome"] == "passed" and str(entry["figures"].get("tensorrt")).startswith("tensorrt-rtx")
            for entry in small
        )

    def update(self, step: Step, entry: dict[str, Any]) -> None:
        """Write ``entry`` as the record of ``step``. A file may hold records of several commits."""
        self.steps[step.name] = {**entry, "commit": self.machine["commit"]}
        order = [known.name for known in STEPS]
        content = {
            "benchmark": "gpu-probe",
            "dry_run": self.dry_run,
            "machine": self.machine,
            "steps": {name: self.steps[name] for name in order if name in self.steps},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, json.dumps(content, indent=1).encode() + b"\n")


def _run_steps(steps: list[Step], job: ProbeJob, record: _Record, limit: float | None) -> None:
    started, whole = time.monotonic(), math.inf if limit is None else limit
    left_out = 0
    for step in steps:
        left = whole - (time.monotonic() - started)
        # A step that is cut short would leave a record that says nothing, so it waits for the next command.
        if left < min(step.seconds, _WHOLE_SHARE * whole):
            left_out += 1
            continue
        click.echo(f"{step.name}: {step.what}")

        def update(entry: dict[str, Any], step: Step = step) -> None:
            record.update(step, entry)

        job = msgspec.structs.replace(job, rtx_runs=record.rtx_runs)
        entry = run_step(step, job, min(step.seconds, left), update)
        reason = f": {entry['reason']}" if entry["reason"] else ""
        click.echo(f"  {entry['outcome']} in {entry['seconds']:g} s{reason}")
        if entry["figures"]:
            click.echo(f"  {json.dumps(entry['figures'])[:2000]}")
    if left_out:
        click.echo(f"{left_out} steps did not fit into --limit; go on with --missing")
    click.echo(f"wrote {record.path}")


def run_step(step: Step, job: ProbeJob, seconds: float, update: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run ``step`` in a process of its own for at most ``seconds``; ``update`` gets its record after each figure.

    Returns:
        The record: ``outcome`` (``passed``, ``failed``, ``crashed``, ``timeout`` or ``skipped``), ``reason``,
        ``seconds``, ``limit``, ``date`` and ``figures``. What was reported before a crash is in it.
    """
    started = time.monotonic()
    entry: dict[str, Any] = {
        "outcome": "crashed",  # unless the process says otherwise
        "reason": _STOPPED,
        "seconds": 0.0,
        "limit": round(seconds),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "figures": {},
    }
    with ChildProcess(
        "svd_trt.benchmarks.probe_process", log=Path(job.work, f"{step.name}.log"), own_session=True
    ) as child:
        work = msgspec.structs.replace(job, place=step.place, arguments=step.arguments, needs=step.needs)
        child.send(msgspec.json.encode(work))
        while True:
            update(entry)
            try:
                line = child.receive(max(started + seconds - time.monotonic(), 0))
            except TimeoutError:
                entry |= {"outcome": "timeout", "reason": f"it ran longer than {seconds:.0f} s"}
                break
            if line is None:
                entry["reason"] = child.describe_exit("the step")
                break
            answer = msgspec.json.decode(line, type=Answer)
            entry["figures"] |= answer.figures
            if answer.outcome is not None:
                entry |= {"outcome": answer.outcome, "reason": answer.reason}
                break
    entry["seconds"] = round(time.monotonic() - started, 1)
    update(entry)
    return entry


if __name__ == "__main__":
    main()
