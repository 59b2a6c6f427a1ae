"""A device that fails: the bundle is opened again, or the server is told that it can make no more videos."""

from __future__ import annotations

import time
from pathlib import Path

from svd_trt import SvdTrtError
from svd_trt.serve.service import Service, accept
from svd_trt.serve.store import new_id
from tests.serve.conftest import ended

FIELDS = {"num_frames": "2", "num_inference_steps": "1"}


def test_after_a_failure_of_the_device_the_bundle_is_opened_again(
    service: Service, failures: list[SvdTrtError], png: bytes, tmp_path: Path
) -> None:
    broken = service.renderers["m"].pipe
    broken.close()  # as a device that fails, every call is a BackendError from now on
    job = service.store.add(
        new_id(), model="m", picture=png, given={"seed": 1}, arguments={}, warnings=[], streamed=False, most=9
    )
    assert job is not None
    service.renderers["m"].wake()
    failed = ended(service, job)
    assert (failed.status, failed.error["type"]) == ("failed", "server_error")  # type: ignore[index]
    until = time.monotonic() + 60
    while service.renderers["m"].pipe is broken and time.monotonic() < until:
        time.sleep(0.02)
    assert ended(service, accept(service, "m", png, FIELDS, streamed=False)[0]).status == "completed"
    assert failures == []
    assert service.renderers["m"].pipe is not broken
    # If that is not possible, the server ends, and jobs that wait are kept for the next start.
    (tmp_path / "bundle").unlink()
    service.renderers["m"].pipe.close()
    for _ in range(2):
        job = service.store.add(
            new_id(), model="m", picture=png, given={"seed": 1}, arguments={}, warnings=[], streamed=False, most=9
        )
    service.renderers["m"].wake()
    while service.renderers["m"].alive and time.monotonic() < until:
        time.sleep(0.02)
    assert [str(error) for error in failures] == [
        f"there is no bundle at {tmp_path / 'bundle'}; make one with `svd-trt build MODEL -o BUNDLE`"
    ]
    assert job is not None
    waiting = service.store.get(job.id)
    assert waiting is not None
    assert waiting.status == "queued"
