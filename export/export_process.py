"""Exporting in a process of its own: torch's gigabytes are back before an engine is built, and Ctrl-C needs no leave.

`export_networks` is the parent's side; ``python -m svd_trt.export.export_process`` is the child's, and exports any
number of networks one after another.
"""

from __future__ import annotations

import base64
import gc
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from svd_trt import errors
from svd_trt.engine.child_process import FREE_MEMORY_EARLY, Answer, ChildProcess, connect_to_parent
from svd_trt.engine.manifest import GraphEntry, Precision
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.errors import ExportError, SvdTrtError, first_line
from svd_trt.export.checkpoint import COMPONENT_OF, Checkpoint

__all__ = ["Exported", "Task", "export_networks"]


@dataclass(frozen=True)
class Task:
    """One network to export to ``path``."""

    spec: NetworkSpec
    path: Path


class Exported(msgspec.Struct, frozen=True):
    """An exported network: its files, the graph first, and its size."""

    network: NetworkName
    files: tuple[str, ...]
    nodes: int
    parameters: int


@dataclass(frozen=True)
class _Job:
    checkpoint: Checkpoint
    precision: Precision
    graph: GraphEntry
    tasks: tuple[Task, ...]


class _Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing at a time: a network begun, one finished, all done, or an error of the class that is named."""

    started: NetworkName | None = None
    exported: Exported | None = None
    finished: bool = False
    error: tuple[str, str] | None = None


def export_networks(
    checkpoint: Checkpoint,
    precision: Precision,
    graph: GraphEntry,
    tasks: Sequence[Task],
    started: Callable[[NetworkName], None],
    exported: Callable[[Exported], None],
) -> None:
    """Export each of ``tasks`` in order; ``started`` and ``exported`` are called as it goes.

    Raises:
        CheckpointError: weights are damaged, or are not those of this architecture.
        ExportError: torch could not trace or translate a network, or the process died.
        OutputError: a file cannot be written.
    """
    current: NetworkName = tasks[0].spec.name
    job = pickle.dumps(_Job(checkpoint, precision, graph, tuple(tasks)))
    with ChildProcess("svd_trt.export.export_process", FREE_MEMORY_EARLY) as child:
        child.send(base64.b64encode(job))
        while (line := child.receive()) is not None:
            message = msgspec.json.decode(line, type=_Message)
            if message.started is not None:
                current = message.started
                started(current)
            if message.exported is not None:
                exported(message.exported)
            if message.error is not None:
                raise _revive(*message.error)
            if message.finished:
                return
        raise ExportError(f"exporting {current} failed: {child.describe_exit('the exporter')}")


def _revive(kind: str, text: str) -> SvdTrtError:
    found = getattr(errors, kind)
    assert issubclass(found, SvdTrtError)
    revived: SvdTrtError = found(text)
    return revived


def _work(line: bytes, answer: Answer) -> None:
    job = pickle.loads(base64.b64decode(line))  # noqa: S301  (from our own parent, over a pipe)
    assert isinstance(job, _Job)

    def say(message: _Message) -> None:
        answer(msgspec.json.encode(message))

    try:
        for component in dict.fromkeys(COMPONENT_OF[task.spec.name] for task in job.tasks):
            job.checkpoint.check(component)  # all of them before minutes go into the first
        for task in job.tasks:
            say(_Message(started=task.spec.name))
            say(_Message(exported=_export(job, task)))
    except SvdTrtError as error:
        say(_Message(error=(type(error).__name__, str(error))))
    except OSError as error:
        where = job.tasks[0].path.parent
        reason = error.strerror or str(error)
        say(_Message(error=("OutputError", f"cannot write to {where}: {reason}; free space or choose another place")))
    else:
        say(_Message(finished=True))


def _export(job: _Job, task: Task) -> Exported:
    from svd_trt.export.networks import dtype_of, make_network
    from svd_trt.export.onnx_export import export_network

    spec, upsamplers = task.spec, job.checkpoint.description.upsamplers
    half = job.precision == "fp16" and job.graph.rewrites
    model = job.checkpoint.load(COMPONENT_OF[spec.name], dtype_of(spec.name, job.precision))
    try:
        network = make_network(
            spec.name,
            model,
            rewrites=job.graph.rewrites,
            ff_chunks=job.graph.ff_chunks,
            operators=job.graph.operators,
            doubling=spec.name == "denoiser" and _halves(spec, upsamplers),
        )
    except (RuntimeError, ValueError, AssertionError, MemoryError) as error:
        raise ExportError(f"{spec.name} could not be rewritten: {first_line(error)}; try --no-rewrites") from error
    del model
    report = export_network(
        network, spec, task.path, smallest_latent=2**upsamplers + 1, fp32_statistics=half and spec.name != "vae_encoder"
    )
    del network
    gc.collect()  # exported programs hold cycles, and with them gigabytes of weights
    return Exported(spec.name, tuple(str(file) for file in report.files), report.nodes, report.parameters)


def _halves(spec: NetworkSpec, times: int) -> bool:
    """True where height and width of the latents are fixed and can be halved so many times."""
    height, width = spec.tensor("latents").shape[-2:]
    return all(isinstance(axis, int) and axis % 2**times == 0 for axis in (height, width))


if __name__ == "__main__":
    # Under its own name, where the job's classes are; here they would be those of __main__.
    from svd_trt.export.export_process import _work as work

    requests, answer = connect_to_parent()
    work(next(requests), answer)
