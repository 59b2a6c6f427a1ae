"""The application as a deployment of Ray Serve: replicas with the bundles open, and one actor with the table of jobs.

A configuration of Ray Serve names `build_app` by ``import_path: svd_trt.serve.ray_deployment:build_app``, and has its
`Arguments` as ``args``. Options of the deployment ``Videos`` may be set there as of any other.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio.to_thread
import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError

from svd_trt.errors import OutputError, SvdTrtError
from svd_trt.runtime.backends import Provider, RunBackend
from svd_trt.runtime.pipeline import VideoPipeline
from svd_trt.serve.application import build_application
from svd_trt.serve.limits import Limits
from svd_trt.serve.models import named_bundles, open_models
from svd_trt.serve.service import Keep, open_service
from svd_trt.serve.shared_jobs import SharedJobs, SharedTable
from svd_trt.serve.store import Store

__all__ = ["Arguments", "build_app", "gpus_of_a_replica", "replicas_for"]

_KEY = "SVD_TRT_API_KEY"
_NAMESPACE = "svd-trt"
_ALONE = 60.0  # seconds without a replica, after which the actor of the jobs ends
_AWAY = 60.0  # seconds that a replica waits for the actor to come back
_ONGOING = 200  # requests of a replica; clients who watch a job keep one open
_PER_REPLICA = 2.0  # jobs, waiting or made, for which there should be a replica


class Arguments(BaseModel):
    """Arguments of `build_app`.

    Attributes:
        bundles: folders, which every node of the cluster has; the first is the default.
        data: folder for jobs and videos, which all nodes share.
        limits: of each request and of the queue.
        keep: how long videos are kept.
        api_key: that requests must show; otherwise that of the variable ``SVD_TRT_API_KEY`` of the replicas, if any.
        names: host names that requests may be for; empty allows any.
        batch: the most videos that one call of the pipeline makes.
        backend: as of `VideoPipeline.open`, and so are ``device``, ``provider`` and ``vram_budget``.
        replicas: how many, or the least and the most of them.
        gpus: of a replica; None takes one if the cluster has any, and none for the device ``cpu``.
        drain: seconds that a replica which is stopped has to finish what it makes.
    """

    model_config = ConfigDict(extra="forbid")

    bundles: list[Path] = Field(min_length=1)
    data: Path
    limits: Limits = Limits()
    keep: Keep = Keep()
    api_key: str | None = Field(default=None, repr=False)
    names: frozenset[str] = frozenset()
    batch: int = Field(default=1, ge=1)
    backend: RunBackend = "auto"
    device: str | None = None
    provider: Provider | None = None
    vram_budget: int | None = None
    replicas: int | tuple[int, int] = 1
    gpus: float | None = Field(default=None, ge=0)
    drain: float = Field(default=600.0, ge=0)


def build_app(arguments: Arguments | dict[str, Any]) -> Any:
    """The application of Ray Serve for `serve.run`, or for a configuration that names this function.

    Raises:
        pydantic.ValidationError: a configuration has wrong arguments.
    """
    arguments = Arguments.model_validate(arguments)
    options: dict[str, Any] = {"num_replicas": arguments.replicas}
    if isinstance(arguments.replicas, tuple):
        least, most = arguments.replicas
        policy = {"policy_function": f"{__name__}:{replicas_for.__name__}"}
        scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": _PER_REPLICA}
        options = {"autoscaling_config": scaling | {"policy": policy}}
    deployment = serve.deployment(
        serve.ingress()(Videos),
        name="Videos",
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus_of_a_replica(arguments)},
        max_ongoing_requests=_ONGOING,
        graceful_shutdown_timeout_s=arguments.drain,
        health_check_period_s=5,
        max_constructor_retry_count=3,
        **options,
    )
    return deployment.bind(arguments)


def replicas_for(context: Any) -> tuple[float, dict[str, Any]]:
    """Autoscaling policy: a replica for each two jobs that wait or are made, which Ray Serve takes for no requests."""
    reported = (context.aggregated_metrics or {}).get("jobs", {})
    jobs = max(reported.values(), default=0.0)  # every replica reports those of all
    return math.ceil(jobs / context.config.get_target_ongoing_requests()), {}


class Videos:
    """A replica: the bundles, opened once, and the application over them."""

    def __init__(self, arguments: Arguments) -> None:
        logging.getLogger("svd_trt").setLevel(logging.INFO)
        bundles = named_bundles(arguments.bundles)
        pipes = open_models(bundles, _opener(arguments), arguments.batch)
        self._failed: list[SvdTrtError] = []
        table = SharedTable(_caller(arguments.data.absolute(), list(bundles)))
        if not (arguments.data / "jobs.sqlite3").exists():
            raise OutputError(f"{arguments.data} is another folder on this node; give one that all nodes share")
        self._service = open_service(
            Store(arguments.data, table),
            pipes,
            bundles,
            _opener(arguments),
            limits=arguments.limits,
            keep=arguments.keep,
            api_key=arguments.api_key or os.environ.get(_KEY),
            names=arguments.names,
            on_failure=self._failed.append,
            batch=arguments.batch,
            grace=arguments.drain,
            replica=serve.get_replica_context().replica_id.unique_id,
        )
        table.begin(self._service)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application of this replica."""
        return build_application(self._service)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises.

        Raises:
            SvdTrtError: it makes no more videos.
        """
        if self._failed:
            raise self._failed[0]

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve for `replicas_for`."""
        return {"jobs": float(await anyio.to_thread.run_sync(self._service.store.open))}


def gpus_of_a_replica(arguments: Arguments) -> float:
    """Those that are asked for, or one if the cluster has any and the CPU is not asked for."""
    if arguments.gpus is not None:
        return arguments.gpus
    return 0.0 if arguments.device == "cpu" or not ray.cluster_resources().get("GPU") else 1.0


def _opener(arguments: Arguments) -> Callable[[Path], VideoPipeline]:
    def open_bundle(path: Path) -> VideoPipeline:
        return VideoPipeline.open(
            path,
            backend=arguments.backend,
            device=arguments.device,
            provider=arguments.provider,
            vram_budget=arguments.vram_budget,
        )

    return open_bundle


class _Jobs(SharedJobs):
    """The actor with the table of jobs. It is detached, so that it survives replicas, and ends when all are gone."""

    def __init__(self, folder: Path, models: list[str]) -> None:
        context = ray.get_runtime_context()
        super().__init__(folder, models, first=not context.was_current_actor_reconstructed)
        threading.Thread(target=self._end_alone, args=(_actor_name(folder),), daemon=True).start()

    def _end_alone(self, name: str) -> None:
        while time.monotonic() < self.heard_at + _ALONE:
            time.sleep(1.0)
        ray.kill(ray.get_actor(name, namespace=_NAMESPACE))


def _actor_name(folder: Path) -> str:
    return f"jobs in {folder}"


def _caller(folder: Path, models: list[str]) -> Callable[..., Any]:
    """A function that calls a method of the actor by its name, and waits for an actor that is away."""
    options = {"name": _actor_name(folder), "namespace": _NAMESPACE, "lifetime": "detached", "get_if_exists": True}

    def find() -> Any:
        return ray.remote(_Jobs).options(**options, max_restarts=-1, num_cpus=0).remote(folder, models)

    actor = find()

    def call(method: str, *arguments: Any) -> Any:
        nonlocal actor
        until = time.monotonic() + _AWAY
        while True:
            try:
                return ray.get(getattr(actor, method).remote(*arguments))
            except RayActorError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)
                actor = find()

    call("execute", "SELECT 1")
    return call
