"""What the routes do with jobs: accept, describe, cancel. None of these functions waits for a video."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svd_trt.errors import SvdTrtError
from svd_trt.runtime.pipeline import VideoPipeline
from svd_trt.serve.events import Hub, Live
from svd_trt.serve.limits import Limits
from svd_trt.serve.metrics import Metrics
from svd_trt.serve.models import Open
from svd_trt.serve.refusals import RequestError
from svd_trt.serve.render import Renderer
from svd_trt.serve.requests import VideoRequest, checked_request
from svd_trt.serve.store import ENDED, Job, Store, new_id

__all__ = ["Keep", "Service", "accept", "cancel", "close", "describe", "open_service", "require_room", "start"]

_RETRY = 5  # seconds, as long as no video was measured


@dataclass(frozen=True)
class Keep:
    """How long finished videos are kept: seconds, and bytes of all of them; None is without end."""

    seconds: float | None = 7 * 86400.0
    nbytes: int | None = 20_000_000_000


@dataclass(frozen=True)
class Service:
    """Everything that the routes need.

    Attributes:
        renderers: by the name of the model; the first is the default.
        api_key: that requests must show; None is for everybody who reaches the server.
        names: host names that requests may be for; empty allows any.
        grace: seconds that videos which are being made may take at the end.
    """

    store: Store
    hub: Hub
    metrics: Metrics
    limits: Limits
    renderers: Mapping[str, Renderer]
    api_key: str | None = None
    names: frozenset[str] = field(default_factory=frozenset)
    grace: float = 0.0

    @property
    def default(self) -> str:
        """The model of requests that name none."""
        return next(iter(self.renderers))


def open_service(
    store: Store,
    pipes: Mapping[str, VideoPipeline],
    bundles: Mapping[str, Path],
    open_bundle: Open,
    *,
    limits: Limits,
    keep: Keep,
    api_key: str | None,
    names: frozenset[str],
    on_failure: Callable[[SvdTrtError], object],
    batch: int = 1,
    grace: float = 0.0,
    replica: str | None = None,
) -> Service:
    """Put the parts together, after the store's jobs of before were recovered; `start` begins with them."""
    hub, metrics = Hub(), Metrics(replica)

    def reopen(name: str) -> Callable[[], VideoPipeline]:
        return lambda: open_bundle(bundles[name])

    renderers = {
        name: Renderer(
            name,
            pipe,
            reopen=reopen(name),
            store=store,
            hub=hub,
            metrics=metrics,
            limits=limits,
            keep=lambda: store.expire(keep.seconds, keep.nbytes),
            on_failure=on_failure,
            batch=batch,
        )
        for name, pipe in pipes.items()
    }
    service = Service(store, hub, metrics, limits, renderers, api_key, names, grace)
    for name, renderer in renderers.items():
        _watch(service, name, renderer)
    return service


def _watch(service: Service, name: str, renderer: Renderer) -> None:
    service.metrics.watch(name, lambda: service.store.waiting(name), lambda: renderer.pipe.device.free_bytes())


def start(service: Service) -> None:
    """Begin with what waits in the store."""
    for renderer in service.renderers.values():
        renderer.start()


def close(service: Service) -> None:
    """Stop what is being made after the grace, so that it waits again in the store, and close the bundles."""
    service.hub.close()
    until = time.monotonic() + service.grace
    for renderer in service.renderers.values():
        renderer.end()
    for renderer in service.renderers.values():
        renderer.stop(max(until - time.monotonic(), 0.0))
    service.store.close()


def require_room(service: Service) -> None:
    """Check that one more job may wait.

    Raises:
        RequestError: the queue is full.
    """
    if service.store.waiting() >= service.limits.queue:
        raise _full(service)


def accept(
    service: Service, model: str, picture: bytes, fields: Mapping[str, str], *, streamed: bool
) -> tuple[Job, Live]:
    """Check a request and put it into the queue. A stream needs what is live of its job from the start.

    Raises:
        RequestError: something in it is wrong, there is no such model, or the queue is full.
    """
    renderer = service.renderers.get(model)
    if renderer is None:
        known = ", ".join(service.renderers)
        raise RequestError(
            400, "invalid_request", f"there is no model {model[:100]!r}; this server has {known}", field="model"
        )
    if renderer.reopening:
        words = "the model is being opened again, because its device failed; try again later"
        raise RequestError(503, "server_error", words, headers={"Retry-After": "30"})
    request: VideoRequest = checked_request(picture, fields, renderer.pipe, service.limits)
    job_id = new_id()
    live = service.hub.live(job_id)
    job = service.store.add(
        job_id,
        model=model,
        picture=request.picture,
        given=request.given,
        arguments=request.settings.as_dict(),
        warnings=request.warnings,
        streamed=streamed,
        most=service.limits.queue,
    )
    if job is None:
        raise _full(service)
    renderer.wake()
    service.hub.notify()
    return job, live


def cancel(service: Service, job: Job) -> bool:
    """Cancel a job; False if it had ended. What is computed for it ends within a step."""
    cancelled = service.store.cancel(job, "the video was cancelled")
    if cancelled:
        service.metrics.ended(job.model, "cancelled")
        if job.model in service.renderers:
            service.renderers[job.model].cancel(job.id)
        service.hub.notify()
    return cancelled


def describe(service: Service, job: Job) -> dict[str, Any]:
    """The job object of the API."""
    live = service.hub.known(job.id) if job.status == "in_progress" else None
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": 100 if job.status == "completed" else _progress(live),
        "stage": live.step[0] if live is not None and live.step is not None else None,
        "position": service.store.ahead(job) if job.status == "queued" else None,
        "created_at": round(job.created_at, 3),
        "started_at": _rounded(job.started_at),
        "completed_at": _rounded(job.completed_at) if job.status in ENDED else None,
        "seconds_left": None if live is None else live.seconds_left,
        "error": job.error,
        "warnings": job.warnings,
        "arguments": job.arguments,
    }


def _progress(live: Live | None) -> int:
    return 0 if live is None else min(int(100 * live.share), 99)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _full(service: Service) -> RequestError:
    most = service.limits.queue
    slowest = max(renderer.seconds for renderer in service.renderers.values()) or _RETRY
    return RequestError(
        429,
        "queue_full",
        f"{most} videos wait already, as many as this server lets wait; try again later",
        limit=most,
        headers={"Retry-After": str(max(math.ceil(slowest), 1))},
    )
