"""Export in a process of its own: torch's gigabytes are free before an engine is built, and Ctrl-C acts at once.

`Exporter` is the parent's side; ``python -m svd_trt.export.export_process`` is the child's. The child exports any
number of networks, one after another.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from svd_trt import errors
from svd_trt.engine.child_process import FREE_MEMORY_EARLY, Answer, ChildProcess, connect_to_parent
from svd_trt.errors import ExportError, SvdTrtError, first_line
from svd_trt.export.checkpoint import COMPONENT_OF, Component
from svd_trt.export.checkpoint_kinds import AnyCheckpoint
from svd_trt.export.recipe import Recipe

__all__ = ["Exported", "Exporter"]


class Exported(msgspec.Struct, frozen=True):
    """An exported network: its files, the graph first, and its size."""

    files: tuple[str, ...]
    nodes: int
    parameters: int


class _Job(msgspec.Struct, frozen=True):
    """The first line: the checkpoint, and the components of it whose weights are to be checked."""

    checkpoint: AnyCheckpoint
    components: tuple[Component, ...]


class _Request(msgspec.Struct, frozen=True):
    """Each further line: a network to export to ``path``."""

    recipe: Recipe
    path: str


class _Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to a request: a network, or an error with the name of its class."""

    exported: Exported | None = None
    error: tuple[str, str] | None = None


class Exporter:
    """Exports networks of one checkpoint in a process that is started with the first of them.

    Args:
        checkpoint: what to export.
        components: components to check before the first network is exported, so that damaged weights are found
            early.
    """

    def __init__(self, checkpoint: AnyCheckpoint, components: Sequence[Component]) -> None:
        self._job = _Job(checkpoint, tuple(components))
        self._child: ChildProcess | None = None
        self._opened = contextlib.ExitStack()

    def export(self, recipe: Recipe, path: Path) -> Exported:
        """Export one network to ``path`` and ``path.data``.

        Raises:
            CheckpointError: weights are damaged, or are not those of this architecture.
            ExportError: torch could not trace or translate the network, or the process died.
            OutputError: a file cannot be written.
        """
        if self._child is None:
            self._child = self._opened.enter_context(ChildProcess("svd_trt.export.export_process", FREE_MEMORY_EARLY))
            self._child.send(msgspec.json.encode(self._job))
        self._child.send(msgspec.json.encode(_Request(recipe, str(path))))
        line = self._child.receive()
        if line is None:
            raise ExportError(f"exporting {recipe.network} failed: {self._child.describe_exit('the exporter')}")
        reply = msgspec.json.decode(line, type=_Reply)
        if reply.error is not None:
            raise _make_error(*reply.error)
        assert reply.exported is not None
        return reply.exported

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


def _make_error(kind: str, text: str) -> SvdTrtError:
    found = getattr(errors, kind)
    assert issubclass(found, SvdTrtError)
    made: SvdTrtError = found(text)
    return made


def main() -> None:
    """The child's side: export the requested networks until the parent ends this process."""
    requests, answer = connect_to_parent()
    job = msgspec.json.decode(next(requests), type=_Job)
    for number, line in enumerate(requests):
        request = msgspec.json.decode(line, type=_Request)
        _answer(job, request, answer, check=number == 0)


def _answer(job: _Job, request: _Request, answer: Answer, *, check: bool) -> None:
    try:
        if check:
            for component in job.components:
                job.checkpoint.check(component)
        reply = _Reply(exported=_export(job.checkpoint, request.recipe, Path(request.path)))
    except SvdTrtError as error:
        reply = _Reply(error=(type(error).__name__, str(error)))
    except OSError as error:
        folder, reason = Path(request.path).parent, error.strerror or str(error)
        reply = _Reply(error=("OutputError", f"cannot write to {folder}: {reason}; free space or choose another place"))
    answer(msgspec.json.encode(reply))


def _export(checkpoint: AnyCheckpoint, recipe: Recipe, path: Path) -> Exported:
    from svd_trt.export.networks import dtype_of, make_network
    from svd_trt.export.onnx_export import export_network

    name = recipe.network
    model = checkpoint.load(COMPONENT_OF[name], dtype_of(name, recipe.precision))
    try:
        network = make_network(
            name,
            model,
            rewrites=recipe.rewrites,
            ff_chunks=recipe.ff_chunks,
            operators=recipe.operators,
            doubling=recipe.doubling,
            keeps_features=recipe.keeps_features,
        )
    except (RuntimeError, ValueError, AssertionError, MemoryError) as error:
        raise ExportError(f"{name} could not be rewritten: {first_line(error)}; try --no-rewrites") from error
    del model
    report = export_network(
        network,
        recipe.spec,
        path,
        smallest_latent=recipe.smallest_latent,
        fp32_statistics=recipe.fp32_statistics,
    )
    del network
    gc.collect()  # exported programs are reference cycles, and hold gigabytes of weights
    return Exported(tuple(str(file) for file in report.files), report.nodes, report.parameters)


if __name__ == "__main__":
    main()
