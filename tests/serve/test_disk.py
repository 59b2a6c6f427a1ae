"""A disk that is full, or a folder that is gone, while a server runs."""

from __future__ import annotations

import shutil
from pathlib import Path

from svd_trt import Bundle
from tests.faults.conftest import small_disk
from tests.serve.conftest import FAST, error_of, start_server


def test_a_full_disk_refuses_jobs_until_there_is_room(tiny_bundle: Bundle, png: bytes, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 4 << 20):
        server = start_server(tiny_bundle.path, disk / "data")
        first, second = (server.accepted(png, **FAST)["id"] for _ in range(2))
        assert {server.wait(job_id)["status"] for job_id in (first, second)} == {"completed"}
        running = server.accepted(png, num_inference_steps=40)["id"]
        server.wait(running, "in_progress")
        fill(disk / "filler")
        refused = server.post(png, **FAST)
        assert "the server cannot keep jobs: " in error_of(refused, 503, "server_error")["message"]
        assert refused.headers["retry-after"] == "60"
        error_of(server.client.get("/readyz"), 503, "server_error")
        assert server.client.get("/healthz").status_code == 200
        assert len(list((server.data / "pictures").iterdir())) == 1, "that of the running one"
        server.client.delete(f"/v1/videos/{first}")
        assert not list((server.data / "videos").glob(f"{first}*")), "a removal makes room"
        (disk / "filler").unlink()
        assert server.wait(running)["status"] in ("completed", "failed"), "it is reported, and the queue goes on"
        assert server.wait(server.accepted(png, **FAST)["id"])["status"] == "completed"
        assert server.content(second, "mkv")
        assert server.client.get("/readyz").status_code == 200
        assert server.stop() == 143


def test_a_folder_that_is_gone_is_said(tiny_bundle: Bundle, png: bytes, tmp_path: Path) -> None:
    server = start_server(tiny_bundle.path, tmp_path / "data")
    shutil.rmtree(server.data)
    for answer in (server.post(png, **FAST), server.client.get("/readyz")):
        message = error_of(answer, 503, "server_error")["message"]
        assert "the server cannot keep jobs: No such file or directory" in message
        assert str(tmp_path) not in message
    assert server.stop() == 143
    assert "Traceback" not in "".join(server.said)


def fill(path: Path) -> None:
    """Write until there is no room for a byte."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
