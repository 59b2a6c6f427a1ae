"""``svd-trt serve --ray`` and deploy/ray-serve.yaml on real clusters, with replicas that are killed and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from svd_trt import Bundle
from svd_trt.errors import LockedError
from svd_trt.serve.store import Store
from tests.cli.conftest import invoke
from tests.serve.conftest import FAST, Served, error_of, events_of, frames_of, start_server
from tests.serve.environments import ROOT
from tests.serve.ray_environment import environment

pytestmark = pytest.mark.slow

ENVIRONMENT = {"PYTHONPATH": str(ROOT / "src")}
LOCAL = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
LONG = {"num_frames": 4, "extend": 200, "num_inference_steps": 4}
Alone = Callable[..., Any]


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config) -> Path:
    return environment(pytestconfig.cache.mkdir("ray"))


@pytest.fixture(scope="module")
def cluster(python: Path, tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two replicas, for whom 40 jobs may wait."""
    data = tmp_path_factory.mktemp("ray") / "data"
    options = ("--ray", "--replicas", "2", "--queue", "40")
    server = start_server(tiny_bundle.path, data, *options, python=python, **ENVIRONMENT)
    yield server
    if server.process.poll() is None:
        server.stop()
    assert replicas_of(server.process.pid) == []


def replicas_of(pid: int) -> list[psutil.Process]:
    """Processes of replicas of a cluster that a process started."""
    return processes_of(pid, "ServeReplica:")


def processes_of(pid: int, name: str) -> list[psutil.Process]:
    """Processes that have ``name`` in their command line, of those that a process started."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process)
    return found


def replica_names(server: Served) -> set[str]:
    """The replicas that answer, by their label in the metrics."""
    names = set()
    for _ in range(40):
        text = server.client.get("/metrics").text
        names |= {line.split('replica="')[1].split('"')[0] for line in text.splitlines() if 'replica="' in line}
    return names


class Client:
    """One of many: it sends a picture until it is accepted, waits, and fetches the video."""

    def __init__(self, server: Served, png: bytes) -> None:
        self.server, self.png = server, png
        self.lock = threading.Lock()
        self.refused = self.failed = 0

    def get(self, path: str) -> httpx.Response:
        """An answer of 200; a replica that died under a request is asked again, as any client would."""
        until = time.monotonic() + 60
        while True:
            with suppress(httpx.TransportError):
                answer = self.server.client.get(path)
                if answer.status_code == 200:
                    return answer
                assert answer.status_code >= 500, answer.text
            self.count(failed=1)
            assert time.monotonic() < until
            time.sleep(0.2)

    def count(self, refused: int = 0, failed: int = 0) -> None:
        with self.lock:
            self.refused += refused
            self.failed += failed

    def video(self, seed: int) -> tuple[str, Any]:
        """The id of the job, and the frames of its file."""
        until = time.monotonic() + 300
        while True:
            assert time.monotonic() < until
            try:
                answer = self.server.post(self.png, **FAST, seed=seed)
            except httpx.TransportError:
                self.count(failed=1)
                time.sleep(0.2)
                continue
            if answer.status_code == 202:
                break
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                self.count(refused=1)
            else:
                assert answer.status_code >= 500, answer.text
                self.count(failed=1)
            time.sleep(0.2)
        job = answer.json()["id"]
        while (now := self.get(f"/v1/videos/{job}").json())["status"] not in ("completed", "failed", "cancelled"):
            assert time.monotonic() < until, now
            time.sleep(0.2)
        assert now["status"] == "completed", now
        return job, frames_of(self.get(f"/v1/videos/{job}/content?format=mkv").content)


def require_equal(videos: list[tuple[str, Any]], alone: Alone) -> None:
    for seed, (_, frames) in enumerate(videos):
        np.testing.assert_array_equal(frames, alone(seed=seed, num_frames=2, num_inference_steps=1))
    assert len({job for job, _ in videos}) == len(videos)


def test_two_hundred_requests_at_concurrency_sixteen(
    cluster: Served, png: bytes, alone: Alone, tiny_bundle: Bundle, tmp_path: Path, record_property: Any
) -> None:
    client = Client(cluster, png)
    began = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        videos = list(pool.map(client.video, range(200)))
    record_property("seconds", round(time.monotonic() - began, 1))
    record_property("refused_by_a_full_queue", client.refused)
    assert client.failed == 0
    require_equal(videos, alone)
    # `alone` is what `svd-trt infer` makes.
    (tmp_path / "p.png").write_bytes(png)
    options = ["--num-frames", "2", "--num-inference-steps", "1", "--seed", "7", "-o", tmp_path / "v.npy", "-q"]
    assert invoke("infer", tiny_bundle.path, tmp_path / "p.png", *options).returncode == 0
    np.testing.assert_array_equal(videos[7][1], np.load(tmp_path / "v.npy"))
    # Both replicas made videos, and each opened the bundle once: there are as many processes as before.
    assert len(replica_names(cluster)) == len(replicas_of(cluster.process.pid)) == 2
    listed = cluster.client.get("/v1/videos", params={"limit": 100}).json()
    assert {job["status"] for job in listed["data"]} == {"completed"}
    with contextlib.closing(sqlite3.connect(f"file:{cluster.data / 'jobs.sqlite3'}?mode=ro", uri=True)) as table:
        assert table.execute("SELECT max(attempts) FROM jobs").fetchone() == (1,), "a video was made twice"
    assert list(cluster.data.glob("pictures/*")) == []


def test_clients_watch_and_cancel_whichever_replica_they_reach(cluster: Served, png: bytes) -> None:
    for _ in range(4):
        job = cluster.accepted(png, **FAST | {"num_frames": 8, "num_inference_steps": 8})["id"]
        with cluster.client.stream("GET", f"/v1/videos/{job}/events") as answer:
            events = list(events_of(answer.iter_lines()))
        assert events[-1][1]["status"] == "completed"
        assert [name for name, _ in events if name == "step"]
        running = cluster.accepted(png, **LONG)["id"]
        while cluster.wait(running, "in_progress")["progress"] == 0:
            time.sleep(0.1)
        assert cluster.client.delete(f"/v1/videos/{running}").json()["status"] == "cancelled"
    done = cluster.wait(cluster.accepted(png, **FAST)["id"])
    assert done["status"] == "completed"
    assert time.time() - done["created_at"] < 60, "a cancelled video was made to its end"


@pytest.mark.parametrize("begun", [True, False], ids=["after its first frame", "before its first frame"])
def test_a_client_of_a_stream_that_leaves_cancels_its_video(cluster: Served, png: bytes, begun: bool) -> None:
    url = f"{cluster.client.base_url}/v1/videos?stream=true"
    fields = {name: str(value) for name, value in (LONG if begun else {"num_inference_steps": 100}).items()}
    with suppress(httpx.ReadTimeout):
        with httpx.stream("POST", url, files={"image": png}, data=fields, timeout=60 if begun else 1.0) as answer:
            next(answer.iter_bytes())
        assert begun
    newest = cluster.client.get("/v1/videos", params={"limit": 1}).json()["data"][0]
    assert cluster.wait(newest["id"])["status"] == "cancelled"


def test_a_stream_has_the_frames_of_the_pipeline(cluster: Served, png: bytes, alone: Alone) -> None:
    answer = cluster.post(png, seed=3, num_frames=4, num_inference_steps=2, stream="true", format="mkv")
    assert answer.status_code == 200
    np.testing.assert_array_equal(frames_of(answer.content), alone(seed=3, num_frames=4, num_inference_steps=2))
    error_of(cluster.post(png, stream="true", fps=0), 400, "invalid_request")


def test_a_full_queue_says_when_to_come_again(cluster: Served, png: bytes) -> None:
    running = [cluster.accepted(png, **LONG)["id"] for _ in range(2)]
    for job in running:
        cluster.wait(job, "in_progress")
    waiting = [cluster.accepted(png, **FAST)["id"] for _ in range(40)]
    answer = cluster.post(png, **FAST)
    assert error_of(answer, 429, "queue_full")["limit"] == 40
    assert int(answer.headers["retry-after"]) >= 1
    error_of(cluster.client.get("/readyz"), 429, "queue_full")
    for job in (*waiting, *running):
        cluster.client.delete(f"/v1/videos/{job}")
    assert cluster.client.get("/readyz").status_code == 200


def test_a_replica_that_is_killed_loses_no_job(cluster: Served, png: bytes, alone: Alone, record_property: Any) -> None:
    """Two of them, one after the other: whatever each was making is made by the other, or by its successor."""
    client, began = Client(cluster, png), time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        videos = [pool.submit(client.video, seed) for seed in range(120)]
        for after in (20, 70):
            while sum(video.done() for video in videos) < after:
                time.sleep(0.05)
            replicas_of(cluster.process.pid)[0].kill()
        require_equal([video.result() for video in videos], alone)
    record_property("seconds", round(time.monotonic() - began, 1))
    record_property("requests_sent_again", client.failed)
    until = time.monotonic() + 60
    while len(replicas_of(cluster.process.pid)) < 2:
        assert time.monotonic() < until
        time.sleep(0.5)


def test_a_table_of_jobs_that_is_killed_comes_back(cluster: Served, png: bytes, record_property: Any) -> None:
    """What is being made meanwhile is not made again, and requests wait."""
    running = cluster.accepted(png, **LONG)["id"]
    cluster.wait(running, "in_progress")
    (actor,) = processes_of(cluster.process.pid, "ray::_Jobs")
    actor.kill()
    began = time.monotonic()
    after = cluster.accepted(png, **FAST)["id"]
    record_property("seconds", round(time.monotonic() - began, 1))
    assert cluster.wait(after)["status"] == "completed"
    assert cluster.wait(running)["status"] == "completed"
    with contextlib.closing(sqlite3.connect(f"file:{cluster.data / 'jobs.sqlite3'}?mode=ro", uri=True)) as table:
        assert table.execute("SELECT attempts FROM jobs WHERE id = ?", (running,)).fetchone() == (1,)


def test_ctrl_c_ends_every_process_and_a_single_server_goes_on(
    cluster: Served, tiny_bundle: Bundle, png: bytes, alone: Alone, record_property: Any
) -> None:
    """The last test of the cluster."""
    fields = {"seed": 9, "num_frames": 8, "num_inference_steps": 60}
    jobs = [cluster.accepted(png, **fields)["id"] for _ in range(3)]
    cluster.wait(jobs[0], "in_progress")
    processes = psutil.Process(cluster.process.pid).children(recursive=True)
    began = time.monotonic()
    assert cluster.stop(signal.SIGINT) == 130
    record_property("seconds", round(time.monotonic() - began, 1))
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    assert "Traceback" not in "".join(cluster.said)
    again = start_server(tiny_bundle.path, cluster.data)
    try:
        for job in jobs:
            assert again.wait(job)["status"] == "completed"
            np.testing.assert_array_equal(frames_of(again.content(job, "mkv")), alone(**fields))
    finally:
        again.stop()


@pytest.fixture
def head(python: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a cluster that others started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | ENVIRONMENT | LOCAL
    command = [python.with_name("ray"), "start", "--head", "--block", "--port", port, "--num-cpus", "2"]
    command += ["--include-dashboard", "false", "--disable-usage-stats", "--node-ip-address", "127.0.0.1"]
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 90
        while "Ray runtime started" not in (tmp_path / "head.log").read_text():
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < until, (tmp_path / "head.log").read_text()
            time.sleep(0.5)
        yield f"127.0.0.1:{port}"
    finally:
        end(process)


def test_replicas_of_a_cluster_finish_their_videos_when_the_command_ends(
    head: str, python: Path, tiny_bundle: Bundle, tmp_path: Path, png: bytes, record_property: Any
) -> None:
    """A replica that is stopped makes what it has begun, and no more; then the table of jobs is left to others."""
    options = ("--ray", head, "--replicas", "1")
    server = start_server(tiny_bundle.path, tmp_path / "data", *options, python=python, **ENVIRONMENT | LOCAL)
    running, waiting = (server.accepted(png, **LONG)["id"] for _ in range(2))
    server.wait(running, "in_progress")
    began = time.monotonic()
    assert server.stop(signal.SIGINT) == 130
    record_property("seconds_to_leave", round(time.monotonic() - began, 1))

    def status(job_id: str) -> str:
        table = sqlite3.connect(f"file:{tmp_path / 'data' / 'jobs.sqlite3'}?mode=ro", uri=True)
        with contextlib.closing(table):
            return str(table.execute("SELECT status FROM jobs WHERE id = ?", (job_id,)).fetchone()[0])

    while status(running) == "in_progress":
        assert time.monotonic() < began + 200
        time.sleep(0.5)
    assert (status(running), status(waiting)) == ("completed", "queued")
    record_property("seconds_to_finish", round(time.monotonic() - began, 1))
    while True:  # until the actor of the jobs has seen for a minute that no replica is left
        try:
            Store(tmp_path / "data").close()
            break
        except LockedError:
            assert time.monotonic() < began + 400
            time.sleep(1)
    record_property("seconds_to_free_the_folder", round(time.monotonic() - began, 1))


def test_what_an_operator_mistypes_ends_the_start_with_one_line(
    python: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    def refused(*arguments: Any) -> str:
        command = [python, "-m", "svd_trt.cli", "serve", "--port", "0", "--data", tmp_path / "d", *arguments]
        done = subprocess.run(
            list(map(str, command)), env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=180
        )
        assert done.returncode in (1, 2), done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "write --ray after the bundles" in refused("--ray", tiny_bundle.path, tiny_bundle.path)
    assert "there is no bundle at" in refused(tmp_path / "none", "--ray")
    assert "cannot reach a cluster of Ray at 127.0.0.1:1" in refused(tiny_bundle.path, "--ray", "127.0.0.1:1")


@pytest.fixture
def configured(python: Path, tiny_bundle: Bundle, tmp_path: Path) -> Iterator[tuple[int, httpx.Client]]:
    """deploy/ray-serve.yaml, with another bundle, folder and port, no GPU and short delays."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (ROOT / "deploy" / "ray-serve.yaml").read_text()
    for old, new in (
        ("/srv/svd-xt", str(tiny_bundle.path)),
        ("/srv/svd-trt-data", str(tmp_path / "data")),
        ("port: 8000", f"port: {port}"),
        ("gpus: 1", "gpus: 0"),
        ("upscale_delay_s: 10", "upscale_delay_s: 1"),
        ("downscale_delay_s: 300", "downscale_delay_s: 3"),
        ("max_replicas: 4", "max_replicas: 2"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "serve.yaml").write_text(text)
    env = os.environ | ENVIRONMENT | LOCAL | {"RAY_ADDRESS": "local"}  # and not a cluster that was there before
    command = [python.with_name("serve"), "run", tmp_path / "serve.yaml"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            until = time.monotonic() + 120
            while True:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                with suppress(httpx.TransportError):
                    if client.get("/readyz").status_code == 200:
                        break
                time.sleep(0.5)
            yield process.pid, client
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command of Ray's, and what it leaves: it may wait for a cluster that it has ended."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    process.kill()
    for child in psutil.wait_procs(children, timeout=20)[1]:
        child.kill()
    process.wait()


def test_the_configuration_scales_up_and_down_by_the_jobs_that_wait(
    configured: tuple[int, httpx.Client], png: bytes, record_property: Any
) -> None:
    pid, client = configured
    assert client.get("/v1/models").json()["data"][0]["limits"]["num_inference_steps"]["max"] == 50
    assert len(replicas_of(pid)) == 1
    fields = {"num_frames": "8", "extend": "24", "num_inference_steps": "10"}
    jobs = [client.post("/v1/videos", files={"image": png}, data=fields).json()["id"] for _ in range(16)]
    counts, began = [1], time.monotonic()

    def watch(done: Callable[[], bool]) -> None:
        while not done():
            assert time.monotonic() < began + 300, counts
            if (count := len(replicas_of(pid))) != counts[-1]:
                counts.append(count)
            time.sleep(0.2)

    def ended() -> bool:
        found = client.get("/v1/videos", params={"limit": 100}).json()["data"]
        return [job["status"] for job in found].count("completed") == len(jobs)

    watch(ended)
    watch(lambda: counts[-1] == 1 and 2 in counts)
    assert counts == [1, 2, 1]
    record_property("seconds_of_1_2_1", round(time.monotonic() - began, 1))
    assert client.get("/readyz").status_code == 200


def test_the_schema_of_ray_serve_takes_the_configuration(python: Path) -> None:
    program = (
        "import sys, yaml, json; from ray.serve.schema import ServeDeploySchema\n"
        "read = ServeDeploySchema.model_validate(yaml.safe_load(open(sys.argv[1])))\n"
        "from svd_trt.serve.ray_deployment import Arguments\n"
        "print(json.dumps([read.applications[0].import_path, Arguments(**read.applications[0].args).limits.queue]))"
    )
    done = subprocess.run(
        [python, "-c", program, ROOT / "deploy" / "ray-serve.yaml"],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["svd_trt.serve.ray_deployment:build_app", 64]
