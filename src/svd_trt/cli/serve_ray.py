"""``svd-trt serve --ray``: the application on a cluster of Ray, from its start to a signal."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from svd_trt.cli.signals import end_by_exceptions
from svd_trt.engine.bundle import Bundle
from svd_trt.errors import ArgumentError, LockedError, MissingDependencyError, SvdTrtError, first_line
from svd_trt.serve.addresses import LOOPBACK
from svd_trt.serve.store import Store

__all__ = ["serve_on_ray"]

_LOCAL = "local"
_NAME = "svd-trt"
_LOOK = 2.0  # seconds between two looks at the application
_REACH = 10.0  # seconds for a cluster to answer
_END = 10.0  # seconds for the processes of a local cluster to end
_AT_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # or Ray takes the loopback address for that of a network
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d{1,5}")
_TOKEN_PATH = Path("~", ".ray", "auth_token")  # of Ray's own, which its first local cluster makes


def serve_on_ray(
    cluster: str,
    place: tuple[str, int],
    arguments: Mapping[str, Any],
    starting: Callable[[], object],
    ready: Callable[[bool], object],
) -> None:
    """Serve until a signal.

    Args:
        cluster: the address of one, or ``local``.
        place: address and port to serve at.
        arguments: of `svd_trt.serve.ray_deployment.Arguments`; None for ``replicas`` is one for each GPU.
        starting: called when nothing was found wrong, before Ray is started, which takes half a minute.
        ready: called when the application answers, with whether Ray Serve of the cluster was running before and has a
            place of its own.

    Raises:
        MissingDependencyError: Ray is not installed.
        ArgumentError: there is no such cluster, or a local one has too few GPUs.
        SvdTrtError: the application does not start, or ends.
    """
    if cluster != _LOCAL and Path(cluster).is_dir():
        raise ArgumentError(f"--ray {cluster} names a folder, and takes an address; write --ray after the bundles")
    if cluster != _LOCAL and not _ADDRESS.fullmatch(cluster):
        raise ArgumentError(f"--ray {cluster} is no HOST:PORT, such as the one that `ray start` prints")
    os.environ.update(_environment(cluster))
    try:
        import ray
        from ray import serve

        from svd_trt.serve.ray_deployment import Arguments, build_app, gpus_of_a_replica
    except ImportError as error:
        raise MissingDependencyError("svd-trt serve --ray", "serve,ray") from error

    data = Path(arguments["data"])
    asked: int | tuple[int, int] | None = arguments["replicas"]
    _check(cluster, data, arguments["bundles"])
    starting()
    with _joined(ray, cluster, data, asked):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        replicas = asked or max(gpus, 1)
        bundles = [path.absolute() for path in arguments["bundles"]]
        changed = {"bundles": bundles, "data": data.absolute(), "replicas": replicas}
        asked_for = Arguments(**{**arguments, **changed})
        running = bool(serve.status().proxies)
        if cluster == _LOCAL:
            _require_gpus(gpus_of_a_replica(asked_for), replicas, gpus)
        serve.start(http_options={"host": place[0], "port": place[1]})
        try:
            serve.run(build_app(asked_for), name=_NAME, route_prefix="/")
            ready(running)
            # Ray Serve heals what is unhealthy.
            while (status := serve.status().applications[_NAME]).status != "DEPLOY_FAILED":
                time.sleep(_LOOK)
            raise SvdTrtError(_reason(status.message))
        except (RuntimeError, KeyError) as error:
            raise SvdTrtError(_reason(_message(serve) or str(error))) from error
        finally:
            if cluster != _LOCAL:
                with contextlib.suppress(Exception):
                    serve.delete(_NAME, _blocking=False)


def _environment(cluster: str) -> dict[str, str]:
    """What Ray reads while it is imported."""
    if cluster == _LOCAL:
        return {"RAY_USAGE_STATS_ENABLED": "0"} | _AT_LOOPBACK
    host = cluster.rpartition(":")[0].strip("[]")
    changes = dict(_AT_LOOPBACK) if host in LOOPBACK else {}
    # `ray start` asks for a token if there is one, and a program that joins must be told to show it.
    shown = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if "RAY_AUTH_MODE" not in os.environ and (shown or _TOKEN_PATH.expanduser().exists()):
        changes["RAY_AUTH_MODE"] = "token"
    return changes


def _check(cluster: str, data: Path, bundles: Sequence[Path]) -> None:
    """Find what is wrong before Ray starts, which takes long."""
    if cluster == _LOCAL:
        for path in bundles:
            Bundle.open(path, verify=False)
        Store(data).close()
    else:
        _require_reachable(cluster)


@contextlib.contextmanager
def _joined(ray: Any, cluster: str, data: Path, replicas: int | tuple[int, int] | None) -> Iterator[None]:
    """Start or join a cluster, and end or leave it. What a local one was making waits again."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options: dict[str, Any] = {"address": cluster, "log_to_driver": False, "logging_level": logging.ERROR}
    if cluster == _LOCAL:
        most = replicas[1] if isinstance(replicas, tuple) else replicas or 1
        options |= {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, most)}  # each takes one
    try:
        _init(ray, cluster, options)
        yield
    finally:
        ray.shutdown()
        if cluster == _LOCAL:
            _put_back(data)


def _init(ray: Any, cluster: str, options: Mapping[str, Any]) -> None:
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ArgumentError(f"cannot join a cluster of Ray at {cluster}: {first_line(error)}; check --ray") from error
    except SystemExit:  # by the handler of SIGTERM that Ray has set, whose code is another
        sys.exit(128 + signal.SIGTERM)
    end_by_exceptions()  # instead of Ray's


def _require_reachable(cluster: str) -> None:
    """Look for a cluster at ``HOST:PORT``, which Ray would wait for over a minute."""
    host, _, port = cluster.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH).close()
    except (OSError, OverflowError) as error:
        raise ArgumentError(f"cannot reach a cluster of Ray at {cluster}: {first_line(error)}; check --ray") from error


def _put_back(data: Path) -> None:
    """Let what a cluster was making wait again, as soon as its processes have left the folder."""
    until = time.monotonic() + _END
    while True:
        try:
            store = Store(data)
            break
        except LockedError:
            if time.monotonic() > until:
                return
            time.sleep(0.1)
    for job in store.unfinished():
        store.put_back(job)
    store.close()


def _require_gpus(each: float, replicas: int | tuple[int, int], gpus: int) -> None:
    least = replicas if isinstance(replicas, int) else replicas[0]
    if least * each > gpus:
        raise ArgumentError(
            f"{least} replicas need {least} GPUs, and this machine has {gpus}; ask for fewer --replicas"
        )


def _message(serve: Any) -> str:
    """What Ray Serve says of the application, if it knows it."""
    with contextlib.suppress(Exception):
        return str(serve.status().applications[_NAME].deployments["Videos"].message)
    return ""


def _reason(message: str) -> str:
    """The error of svd-trt in a message with tracebacks of replicas; otherwise the last line of it."""
    found = re.findall(r"svd_trt\.errors\.\w+: (.+)", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return found[-1] if found else f"Ray Serve ended the application: {lines[-1] if lines else 'without a reason'}"
