"""The routes of the API, as an ASGI application over a `Service`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import anyio
import anyio.to_thread
from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from svd_trt.errors import OutputError
from svd_trt.serve.content import CONTENT_TYPES, converted, preferred
from svd_trt.serve.events import Live, job_events
from svd_trt.serve.guard import Guard, error_response
from svd_trt.serve.models import model_object
from svd_trt.serve.page_response import page
from svd_trt.serve.refusals import RequestError
from svd_trt.serve.schemas import ErrorBody, Health, ModelList, Video, VideoList, form_schema
from svd_trt.serve.service import Service, accept, cancel, close, describe, require_room, start
from svd_trt.serve.store import ENDED, Job
from svd_trt.serve.streaming import STREAM_TYPES, first_frame, video_stream
from svd_trt.serve.uploads import Body, read_form
from svd_trt.version import __version__

__all__ = ["build_application"]

_log = logging.getLogger("svd_trt")
_CHECKS = 2  # pictures that are decoded at the same time
_Id = Annotated[str, Path(alias="id", pattern="^vid_[0-9a-f]{32}$")]
_REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503)
}


def build_application(service: Service) -> FastAPI:
    """The application. It begins with the jobs that wait when it starts, and puts them back when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await anyio.to_thread.run_sync(start, service)
        yield
        await anyio.to_thread.run_sync(close, service)

    application = FastAPI(
        title="svd-trt",
        version=__version__,
        description="Videos of pictures with Stable Video Diffusion.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=_REFUSED,
    )
    application.add_middleware(Guard, service=service)
    _answer_errors(application, service)
    _add_videos(application, service)
    _add_results(application, service)
    _add_others(application, service)
    return application


def _answer_errors(application: FastAPI, service: Service) -> None:
    """Make every error the object of the API."""

    def answer(error: RequestError) -> Response:
        service.metrics.refused(error.error["type"])
        return error_response(error)

    @application.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return answer(error)

    @application.exception_handler(OutputError)
    async def full(_: Request, error: OutputError) -> Response:
        return answer(RequestError(503, "server_error", str(error), headers={"Retry-After": "60"}))

    @application.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = str(first["loc"][-1])
        if first["loc"][0] == "path":
            return answer(_not_found())
        return answer(_of_query(field, first))

    @application.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> Response:
        kind: Literal["not_found", "invalid_request"] = "not_found" if error.status_code == 404 else "invalid_request"
        message = {404: "there is nothing at this address", 405: "this address does not take this method"}
        told = message.get(error.status_code, str(error.detail))
        return answer(RequestError(error.status_code, kind, told, headers=error.headers))


def _add_videos(application: FastAPI, service: Service) -> None:
    checks = anyio.CapacityLimiter(_CHECKS)

    @application.post(
        "/v1/videos",
        status_code=202,
        response_model=Video,
        summary="Make a video of a picture",
        openapi_extra={"requestBody": form_schema()},
        responses={
            200: {"description": "With stream=true: the video.", "content": {"video/x-yuv4mpeg": {}, "video/mp4": {}}}
        },
    )
    async def create(
        request: Request,
        stream: Annotated[bool, Query(description="Answer with the video while it is decoded.")] = False,
        form: Annotated[Literal["y4m", "mp4", "mkv"], Query(alias="format", description="Of the stream.")] = "y4m",
    ) -> Response:
        body = Body(request.receive, service.limits)
        try:
            await anyio.to_thread.run_sync(require_room, service)
            async with read_form(request, body, service.limits) as (picture, fields):
                model = fields.pop("model", "") or service.default

                def add() -> tuple[Job, Live]:
                    return accept(service, model, picture.read(), fields, streamed=stream)

                job, live = await anyio.to_thread.run_sync(add, limiter=checks)
        except RequestError as error:
            if error.status != 408:
                await body.discard()
            raise
        place = {"Location": f"/v1/videos/{job.id}"}
        if not stream:
            return JSONResponse(await _described(service, job), 202, place)
        await first_frame(service, job, live, request.is_disconnected)
        return StreamingResponse(video_stream(service, job, live, form), media_type=STREAM_TYPES[form], headers=place)

    @application.get("/v1/videos", response_model=VideoList, summary="List jobs, the newest first")
    def listed(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(pattern="^vid_[0-9a-f]{32}$")] = None,
    ) -> Response:
        if after is not None and service.store.get(after) is None:
            raise RequestError(
                400,
                "invalid_request",
                "after names a video that was removed; list again from the newest one",
                field="after",
            )
        jobs = service.store.newest(limit + 1, after)
        data = [describe(service, job) for job in jobs[:limit]]
        return JSONResponse({"object": "list", "data": data, "has_more": len(jobs) > limit})

    @application.get("/v1/videos/{id}", response_model=Video, summary="How a job is getting on")
    def shown(job_id: _Id) -> Response:
        return JSONResponse(describe(service, _job(service, job_id)))

    @application.delete("/v1/videos/{id}", response_model=Video, summary="Cancel a job, or remove a video")
    def removed(job_id: _Id) -> Response:
        job = _job(service, job_id)
        if job.status in ENDED or not cancel(service, job):
            service.store.remove(job.id)
            return JSONResponse(describe(service, job))
        return JSONResponse(describe(service, _job(service, job_id)))


def _add_results(application: FastAPI, service: Service) -> None:
    conversions = anyio.CapacityLimiter(1)  # an encoder uses all cores

    @application.get(
        "/v1/videos/{id}/events",
        response_class=StreamingResponse,
        summary="Steps and frames as they come",
        responses={200: {"description": "Events status, step, frame and end.", "content": {"text/event-stream": {}}}},
    )
    async def events(job_id: _Id) -> Response:
        await anyio.to_thread.run_sync(_job, service, job_id)

        def now() -> dict[str, Any] | None:
            job = service.store.get(job_id)
            return None if job is None else describe(service, job)

        headers = {"X-Accel-Buffering": "no"}
        return StreamingResponse(job_events(service.hub, job_id, now), media_type="text/event-stream", headers=headers)

    @application.head("/v1/videos/{id}/content", include_in_schema=False)  # players ask for its size
    @application.get(
        "/v1/videos/{id}/content",
        response_class=FileResponse,
        summary="The finished video",
        responses={
            200: {"description": "The video.", "content": {kind: {} for kind in CONTENT_TYPES.values()}},
            206: {"description": "A part of it."},
            416: {"description": "There is no such part."},
        },
    )
    async def content(
        request: Request,
        job_id: _Id,
        form: Annotated[Literal["mp4", "webm", "webp", "mkv"] | None, Query(alias="format")] = None,
    ) -> Response:
        job = await anyio.to_thread.run_sync(_job, service, job_id)
        if job.status != "completed":
            raise RequestError(
                409,
                "invalid_request",
                f"the video is {job.status.replace('_', ' ')}; its content exists once it is completed",
            )
        kind = form or preferred(request.headers.get("accept", ""))
        try:
            metadata = job.metadata or {}
            kept = service.store.video(job, ".mkv")
            # They wait here, and not in the threads that other requests need.
            path = await anyio.to_thread.run_sync(
                converted, kept, kind, job.arguments["fps"], metadata, limiter=conversions
            )
        except FileNotFoundError:
            raise _not_found() from None
        headers = {"Content-Disposition": f'inline; filename="{job.id}.{kind}"', "Cache-Control": "private, no-cache"}
        return _Content(path, media_type=CONTENT_TYPES[kind], headers=headers)


def _add_others(application: FastAPI, service: Service) -> None:
    @application.get("/v1/models", response_model=ModelList, summary="The bundles, and what their arguments may be")
    def models() -> Response:
        data = [
            model_object(name, renderer.pipe, service.limits, default=name == service.default)
            for name, renderer in service.renderers.items()
        ]
        return JSONResponse({"object": "list", "data": data})

    @application.get("/healthz", response_model=Health, summary="Does the process work?")
    async def healthy() -> Response:
        dead = [name for name, renderer in service.renderers.items() if not renderer.alive]
        if dead:
            raise RequestError(503, "server_error", f"{', '.join(dead)} makes no more videos; restart the server")
        return JSONResponse({"status": "ok"})

    @application.get("/readyz", response_model=Health, summary="Can it take a job now?")
    async def ready() -> Response:
        await anyio.to_thread.run_sync(require_room, service)
        await anyio.to_thread.run_sync(service.store.require_writable)
        return await healthy()

    @application.get("/metrics", summary="For Prometheus", response_class=Response)
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @application.get("/", include_in_schema=False)
    def shown_page() -> Response:
        return page()

    for path, answer in (("/", shown_page), ("/healthz", healthy), ("/readyz", ready)):
        application.head(path, include_in_schema=False)(answer)  # as balancers ask


class _Content(FileResponse):
    """A file that may be removed before it is opened."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except RuntimeError:  # what FileResponse makes of a file that does not exist, before it sends anything
            if await anyio.Path(self.path).exists():
                raise
            await error_response(_not_found())(scope, receive, send)


async def _described(service: Service, job: Job) -> dict[str, Any]:
    return await anyio.to_thread.run_sync(describe, service, job)


def _job(service: Service, job_id: str) -> Job:
    job = service.store.get(job_id)
    if job is None:
        raise _not_found()
    return job


def _of_query(field: str, found: Mapping[str, Any]) -> RequestError:
    """What to say of a parameter of an address, from what pydantic found."""
    wanted = found.get("ctx", {})
    limit = {short: wanted[name] for name, short in (("ge", "min"), ("le", "max")) if name in wanted}
    return RequestError(400, "invalid_request", f"{field}: {found['msg'].lower()}", field=field, limit=limit or None)


def _not_found() -> RequestError:
    return RequestError(404, "not_found", "there is no video of this id; it was removed, or never was")
