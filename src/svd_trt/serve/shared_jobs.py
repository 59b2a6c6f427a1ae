"""One table of jobs for several servers, each in a process of its own, and what they tell each other of the jobs.

One process has the `SharedJobs`. Each server has a `SharedTable`, which asks it for rows, and four times a second tells
it what the server makes and hears what the others make. So jobs that wait are found, cancelled ones stop, progress and
frames reach clients of another server, and jobs of a server that is gone are begun again.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svd_trt.serve.database import Database
from svd_trt.serve.events import Live
from svd_trt.serve.service import Service
from svd_trt.serve.store import Store

__all__ = ["LEASE", "News", "SharedJobs", "SharedTable", "Told"]

LEASE = 10.0
"""Seconds without a word of a job's server, after which its jobs wait again."""

_log = logging.getLogger("svd_trt")
_PERIOD = 0.25  # seconds between two exchanges
_PREVIEWS = 10  # of a job that are sent at once: they are made then, and the exchange must go on


@dataclass(frozen=True)
class Told:
    """What a server says.

    Attributes:
        models: that it serves.
        held: ids of `Store.held`.
        states: `Live.state` of those that it makes, and of those whose last previews are wanted.
        previews: of jobs whose previews were wanted: the number of the first, and some from there on.
        watched: jobs of others that its clients watch, and how many previews it has of them.
    """

    models: Sequence[str]
    held: Sequence[str] = ()
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    previews: Mapping[str, tuple[int, Sequence[str]]] = field(default_factory=dict)
    watched: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class News:
    """What a server hears.

    Attributes:
        changes: rises with every row that is written.
        ended: of its jobs: they were cancelled elsewhere.
        waiting: models that jobs wait for.
        states: of jobs that others make.
        previews: the next ones of the jobs that it watches.
        wanted: of its jobs that others watch, and how many previews they have.
    """

    changes: int
    ended: Sequence[str]
    waiting: Sequence[str]
    states: Mapping[str, Mapping[str, Any]]
    previews: Mapping[str, Sequence[str]]
    wanted: Mapping[str, int]


class SharedJobs:
    """The table, and what the servers say. Called by one thread at a time.

    Args:
        folder: of the jobs.
        models: that are served.
        first: no server can be making a job of the folder yet.

    Raises:
        OutputError: as `Store`.
        LockedError: as `Store`.
    """

    def __init__(self, folder: Path, models: Sequence[str], *, first: bool = True) -> None:
        self._rows = Database(folder)
        self._store = Store(folder, self._rows)
        self._swept = self.heard_at = time.monotonic()
        self._heard: dict[str, float] = {}  # jobs, and when a server last held them
        self._served: dict[str, float] = {}  # models, and when a server last had them
        self._states: dict[str, Mapping[str, Any]] = {}
        self._previews: dict[str, list[str]] = {}
        self._watched: dict[str, float] = {}
        if first:
            self._store.recover(models)

    def execute(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        """As `Database.execute`."""
        return self._rows.execute(statement, *values)

    def close(self) -> None:
        """Leave the folder to others."""
        self._rows.close()

    def exchange(self, told: Told) -> News:
        """Take what a server says, and answer with what it should know."""
        now = self.heard_at = time.monotonic()
        self._heard |= dict.fromkeys((*told.held, *told.states), now)
        self._served |= dict.fromkeys(told.models, now)
        self._watched |= dict.fromkeys(told.watched, now)
        for job_id, state in told.states.items():
            self._states[job_id] = state
            known = self._previews.setdefault(job_id, [])
            if state["shown"] < len(known):  # it was begun again
                known.clear()
            start, more = told.previews.get(job_id, (0, ()))
            if start == len(known):
                known.extend(more)
        if now >= self._swept + 1.0:
            self._swept = now
            self._sweep(now)
        return News(
            changes=self._rows.changes,
            ended=self._ended(told.held),
            waiting=self._waiting(),
            states={job_id: state for job_id, state in self._states.items() if job_id not in told.states},
            previews={job_id: self._previews.get(job_id, [])[count:] for job_id, count in told.watched.items()},
            wanted={job_id: len(self._previews.get(job_id, ())) for job_id in told.states if job_id in self._watched},
        )

    def _ended(self, held: Sequence[str]) -> list[str]:
        rows = self._rows.execute(
            "SELECT value FROM json_each(?) WHERE value NOT IN "
            "(SELECT id FROM jobs WHERE status IN ('queued', 'in_progress'))",
            json.dumps(held),
        )
        return [row["value"] for row in rows]

    def _waiting(self) -> list[str]:
        return [row["model"] for row in self._rows.execute("SELECT DISTINCT model FROM jobs WHERE status = 'queued'")]

    def _sweep(self, now: float) -> None:
        """Take back the jobs of servers that are gone, end those whose model is gone, and forget what is old."""
        before = now - LEASE
        begun = self._rows.execute(
            "SELECT id FROM jobs WHERE status = 'in_progress' OR (status = 'queued' AND streamed)"
        )
        models = [model for model, heard in self._served.items() if heard >= before]
        # What nobody has spoken of yet has just been begun; it is new from now on.
        lost = {row["id"] for row in begun if self._heard.setdefault(row["id"], now) < before}
        strange = {model for model in self._waiting() if self._served.setdefault(model, now) < before}
        if lost or strange:
            jobs = [job for job in self._store.unfinished() if job.id in lost or job.model in strange]
            _log.warning("%d jobs are taken back from a server that is gone", len(jobs))
            self._store.take_back(jobs, models)
        for job_id in [job_id for job_id, heard in self._heard.items() if heard < before]:
            for known in (self._heard, self._states, self._previews):
                known.pop(job_id, None)
        self._watched = {job_id: asked for job_id, asked in self._watched.items() if asked >= before}


class SharedTable:
    """The table of jobs in another process, as a server has it.

    Args:
        call: calls a method of the `SharedJobs` by its name; from any thread.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._made: dict[str, Live] = {}
        self._others: dict[str, Live] = {}
        self._wanted: Mapping[str, int] = {}
        self._last: tuple[Any, ...] = ()

    def execute(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        """As `Database.execute`."""
        rows: list[dict[str, Any]] = self._call("execute", statement, *values)
        return rows

    def begin(self, service: Service) -> None:
        """Exchange news for ``service``, whose store has this table, until `close`."""
        self._thread = threading.Thread(target=self._run, args=(service,), name="svd-trt exchange", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the exchange."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, service: Service) -> None:
        while not self._ending.wait(_PERIOD):
            try:
                self.exchange(service)
            except Exception as error:  # the other process may come back
                _log.warning("no news of other servers: %s", error)

    def exchange(self, service: Service) -> None:
        """Exchange news once."""
        live, held = service.hub.all(), service.store.held
        before, wanted = self._made, self._wanted
        self._made = {job_id: one for job_id, one in before.items() if job_id in held or self._owes(job_id, one)}
        self._made |= {job_id: live[job_id] for job_id in held if job_id in live}
        made = before | self._made  # of one that has ended since, the last state, which it is heard with from now on
        told = Told(
            models=list(service.renderers),
            held=held,
            states={job_id: one.state() for job_id, one in made.items()},
            previews={job_id: _next(one, wanted[job_id]) for job_id, one in made.items() if job_id in wanted},
            watched={job_id: live[job_id].shown for job_id in service.hub.watched() & live.keys() - made.keys()},
        )
        news: News = self._call("exchange", told)
        self._wanted = news.wanted
        for job_id in news.ended:
            service.store.release(job_id)
            for renderer in service.renderers.values():
                renderer.cancel(job_id)
        for model in news.waiting:
            if model in service.renderers:
                service.renderers[model].wake()
        self._others = {job_id: service.hub.live(job_id) for job_id in news.states}
        for job_id, one in self._others.items():
            one.follow(news.states[job_id], news.previews.get(job_id, ()))
        last, self._last = self._last, (news.changes, news.states, news.previews)
        if last != self._last:
            service.hub.notify()

    def _owes(self, job_id: str, live: Live) -> bool:
        """Whether somebody waits for frames of a job that has ended here."""
        return self._wanted.get(job_id, live.shown) < live.shown


def _next(live: Live, first: int) -> tuple[int, list[str]]:
    """Some previews of a job from one on."""
    return first, [live.preview(index) for index in range(first, min(live.shown, first + _PREVIEWS))]
