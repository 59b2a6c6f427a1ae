"""``svd-trt serve``."""

from __future__ import annotations

import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import click
import platformdirs

from svd_trt.cli.console import log_to, stderr
from svd_trt.cli.provider_log import end_log_of
from svd_trt.cli.sizes import ByteSize
from svd_trt.errors import ArgumentError, MissingDependencyError
from svd_trt.runtime.backends import PROVIDERS, RUN_BACKENDS, Provider, RunBackend
from svd_trt.runtime.pipeline import VideoPipeline
from svd_trt.serve.addresses import LOOPBACK

__all__ = ["command"]

_KEY = "SVD_TRT_API_KEY"
_UNITS = {"m": 60, "h": 3600, "d": 86400}


class _Seconds(click.FloatRange):
    """A time from one second to 30 days."""

    def __init__(self) -> None:
        super().__init__(1, 30 * 86400)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if math.isnan(found):
            self.fail(f"{value!r} is no time; give seconds, such as 60", param, ctx)
        return found


class _Replicas(click.ParamType):  # type: ignore[type-arg]
    """A number, or the least and the most: ``2``, ``1:4``."""

    name = "replicas"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = re.fullmatch(r"([1-9]\d{0,3})(?::([1-9]\d{0,3}))?", str(value))
        if found is None or (found[2] and int(found[2]) < int(found[1])):
            self.fail(f"{value!r} is not a number of replicas or a range of it, such as 2 or 1:4", param, ctx)
        return (int(found[1]), int(found[2])) if found[2] else int(found[1])


class _Keep(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """An age, bytes, or both: ``7d``, ``20GB``, ``7d,20GB``; ``forever`` is neither."""

    name = "keep"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        seconds: float | None = None
        nbytes: int | None = None
        for part in (piece.strip() for piece in value.split(",")):
            if part == "forever":
                continue
            if found := re.fullmatch(r"(\d{1,6})([mhd])", part):
                seconds = float(int(found[1]) * _UNITS[found[2]])
            elif re.fullmatch(r"[\d.]+\s*[kKMGT]i?B?", part):
                nbytes = ByteSize().convert(part, param, ctx)
            else:
                self.fail(f"{value!r} is not an age, a size or both, such as 7d, 12h, 20GB or 7d,20GB", param, ctx)
        return seconds, nbytes


@click.command(
    "serve",
    short_help="Serve bundles over HTTP, with a page to try them on.",
    help="""Serve each bundle BUNDLE over HTTP: a queue of videos, progress, and a page to try it on.

    \b
    Examples:
        svd-trt serve svd-xt                         then open http://localhost:8000
        svd-trt serve svd-xt svd --port 9000 --data /srv/videos --keep 2d,100GB
        SVD_TRT_API_KEY=... svd-trt serve svd-xt --host 0.0.0.0

    \b
        curl -F image=@picture.png -F seed=42 localhost:8000/v1/videos
        curl localhost:8000/v1/videos/ID
        curl -o video.mp4 localhost:8000/v1/videos/ID/content

    The name of a bundle's folder is the name of its model; the first one is the default. Jobs are kept in the folder of
    --data, and what was accepted is finished after a restart.
    """,
)
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve at; 0.0.0.0 is all of them.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for jobs and videos; one server at a time uses it.  [default: a folder of this user]",
)
@click.option(
    "--keep", type=_Keep(), default="7d,20GB", show_default=True, help="Age and size from which videos are removed."
)
@click.option("--queue", type=click.IntRange(1, 10_000), default=32, show_default=True, help="Jobs that may wait.")
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Videos of equal arguments made together, if bundles were built for it.",
)
@click.option("--max-upload", type=ByteSize(), default="20MB", show_default=True, help="Bytes of a request.")
@click.option(
    "--max-pixels", type=click.IntRange(1), default=40_000_000, show_default=True, help="Pixels of a picture."
)
@click.option("--max-upload-seconds", type=_Seconds(), default=60, show_default=True, help="Time to send it.")
@click.option(
    "--max-stall-seconds",
    type=_Seconds(),
    default=60,
    show_default=True,
    help="Time in which a client must take something of an answer.",
)
@click.option("--max-steps", type=click.IntRange(1), default=100, show_default=True, help="Steps of a video.")
@click.option("--max-frames", type=click.IntRange(1), default=250, show_default=True, help="Frames of a video.")
@click.option("--max-seconds", type=_Seconds(), default=3600, show_default=True, help="Time of a video.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"File with a key that requests must show; so does the variable {_KEY}.  [default: no key]",
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Name in requests that the server answers, as of a proxy; it answers no others then.  [default: localhost; "
    "any name with a --host for other machines]",
)
@click.option("--backend", type=click.Choice(RUN_BACKENDS), default="auto", show_default=True, help="As of infer.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, or cuda:1 for the second GPU.  [default: a GPU if any]")
@click.option("--provider", type=click.Choice(PROVIDERS), help="Provider of ONNX Runtime.  [default: cpu]")
@click.option("--vram-budget", type=ByteSize(), help="Most device memory of each bundle, such as 8GB.")
@click.option(
    "--ray",
    "cluster",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Serve with Ray Serve: on the cluster at ADDRESS, or on one of this machine. Write it after the bundles.",
)
@click.option("--replicas", type=_Replicas(), help="Servers of --ray, such as 2, or 1:4 by load.  [default: all GPUs]")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    data: Path | None,
    keep: tuple[float | None, int | None],
    queue: int,
    batch: int,
    max_upload: int,
    max_pixels: int,
    max_upload_seconds: float,
    max_stall_seconds: float,
    max_steps: int,
    max_frames: int,
    max_seconds: float,
    api_key_file: Path | None,
    allow_host: tuple[str, ...],
    backend: RunBackend,
    device: str | None,
    provider: Provider | None,
    vram_budget: int | None,
    cluster: str | None,
    replicas: int | tuple[int, int] | None,
    quiet: bool,
) -> None:
    """Serve until a signal; the help text is in the decorator."""
    try:
        from svd_trt.serve.application import build_application
        from svd_trt.serve.limits import Limits
        from svd_trt.serve.models import named_bundles, open_models
        from svd_trt.serve.server import Ended, bind, run_server
        from svd_trt.serve.service import Keep, open_service
        from svd_trt.serve.store import Store
    except ImportError as error:
        raise MissingDependencyError("svd-trt serve", "serve") from error

    def open_bundle(path: Path) -> VideoPipeline:
        return VideoPipeline.open(path, backend=backend, device=device, provider=provider, vram_budget=vram_budget)

    console = stderr(quiet=quiet)
    end_log_of(provider)
    if replicas is not None and cluster is None:
        raise click.UsageError("--replicas is for --ray; give both, or neither.")
    key, names, named = _api_key(api_key_file), _names(host, allow_host), named_bundles(bundles)
    limits = Limits(queue, max_upload, max_pixels, max_steps, max_frames, max_seconds, max_upload_seconds)
    folder = data or platformdirs.user_data_path("svd-trt") / "serve"

    def serving(place: str) -> str:
        if host not in LOOPBACK and key is None:
            console.print(_warning(host), style="bold yellow")
        return f"serving {', '.join(named)} at {place}; jobs are kept in {folder}"

    if cluster is not None:
        from svd_trt.cli.serve_ray import serve_on_ray

        if cluster == "local" or port == 0:  # on another cluster Ray Serve may be there already
            with bind(host, port, max_stall_seconds) as opened:
                port = opened.getsockname()[1]
        arguments = {"bundles": bundles, "data": folder, "limits": limits, "keep": Keep(*keep), "api_key": key}
        arguments |= {"names": names, "batch": batch, "replicas": replicas, "backend": backend, "device": device}
        arguments |= {"provider": provider, "vram_budget": vram_budget}
        place = _address(host, port)
        other = "the place that Ray Serve of the cluster had, not that of --host and --port"

        def starting() -> None:
            console.print("starting Ray Serve, which takes about half a minute", style="dim")

        def ready(had: bool) -> None:
            console.print(serving(other if had else place))

        serve_on_ray(cluster, (host, port), arguments, starting, ready)
        return
    ended = Ended()
    with bind(host, port, max_stall_seconds) as opened, log_to(console, style="dim"):
        logging.getLogger("svd_trt").setLevel(logging.INFO)
        store = Store(folder)
        try:
            pipes = open_models(named, open_bundle, batch)
            store.recover(pipes)
            service = open_service(
                store,
                pipes,
                named,
                open_bundle,
                limits=limits,
                keep=Keep(*keep),
                api_key=key,
                names=names,
                on_failure=ended.say,
                batch=batch,
            )
            application, said = build_application(service), serving(_address(host, opened.getsockname()[1]))
            run_server(application, service.hub, opened, ended, lambda: console.print(said))
        finally:
            store.close()


def _api_key(file: Path | None) -> str | None:
    """The key of the file, or of the environment.

    Raises:
        ArgumentError: it cannot be read, or is empty.
    """
    if file is None:
        key = os.environ.get(_KEY)
        key = None if key is None else key.strip()  # files of variables end in a line break
        where = f"the variable {_KEY}"
    else:
        where = str(file)
        try:
            key = file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ArgumentError(f"the key in {file} cannot be read: {reason}; check --api-key-file") from error
    if key is not None and not (key and key.isascii() and key.isprintable()):
        fault = "has a key that is no ASCII" if key else "is empty"
        raise ArgumentError(f"{where} {fault}; write a key there, such as that of `openssl rand -hex 32`")
    return key


def _names(host: str, allowed: tuple[str, ...]) -> frozenset[str]:
    """The host names that requests may be for; none is any.

    Raises:
        ArgumentError: one is no name.
    """
    for name in allowed:
        if re.search(r"[/\s]|:\d+$", name) and not re.fullmatch(r"[0-9a-fA-F:]+", name):
            raise ArgumentError(f"--allow-host takes a name without a port or path, such as video.example, not {name}")
    if host not in LOOPBACK and not allowed:
        return frozenset()
    return LOOPBACK | {host.lower(), *(name.lower().strip("[]") for name in allowed)}


def _warning(host: str) -> str:
    return (
        f"warning: everybody who reaches {host} can make videos and see those of others; set {_KEY} or --api-key-file, "
        "and let a proxy with TLS stand before the server"
    )


def _address(host: str, port: int) -> str:
    name = "localhost" if host in ("0.0.0.0", "::", *LOOPBACK) else host  # noqa: S104
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"
