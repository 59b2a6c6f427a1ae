"""Conversations with a child process, and its end: with an error, by a timeout, and with its parent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from svd_trt.engine.child_process import ChildProcess

ECHO = "tests.engine.echo_child"


def gone(*pids: int) -> bool:
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=30)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_requests_and_answers() -> None:
    long = b"x" * 1_000_000
    with ChildProcess(ECHO, {"SVD_TRT_TEST_VARIABLE": "set"}) as child:
        for line in (b"hello", b"", long, b"variable"):
            child.send(line)
        assert [child.receive() for _ in range(4)] == [b"hello", b"", long, b"set"]


def test_a_child_that_fails_is_described(tmp_path: Path) -> None:
    with ChildProcess(ECHO, log=tmp_path / "log") as child:
        child.send(b"fail")
        assert child.receive() is None
        assert child.describe_exit("the child") == "the child's process ended with code 3: last words"
        child.send(b"too late")
        assert child.receive() is None


def test_an_answer_that_is_late() -> None:
    with ChildProcess(ECHO) as child:
        child.send(b"sleep")
        with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
            child.receive(0.1)
    assert gone(child.pid)


def test_processes_of_its_session_end_with_it() -> None:
    with ChildProcess(ECHO, own_session=True) as child:
        child.send(b"start another")
        grandchild = int(child.receive() or 0)
        assert psutil.pid_exists(grandchild)
    assert gone(child.pid, grandchild)


@pytest.mark.parametrize("own_session", [False, True])
def test_it_ends_when_its_parent_is_killed(own_session: bool) -> None:
    """Even while it works and reads no request."""
    code = (
        "import sys, time; from svd_trt.engine.child_process import ChildProcess;"
        f"child = ChildProcess({ECHO!r}, own_session={own_session}); child.send(b'hello'); child.receive();"
        "child.send(b'sleep'); print(child.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    assert gone(child)
