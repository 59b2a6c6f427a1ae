"""Commands that are killed, starved and interrupted; disks that are full; and what must be true after each."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import psutil
import pytest

from svd_trt import Bundle
from svd_trt.engine.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    Manifest,
    OnnxEntry,
    PlanEntry,
    read_manifest,
    write_manifest,
)
from tests.cli.conftest import ENVIRONMENT

# Far above what any command here takes on a loaded machine; a command that takes longer hangs.
LIMIT_S = 240.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of everything random; the variable SVD_TRT_TEST_SEED repeats a run."""
    return int(os.environ.get("SVD_TRT_TEST_SEED") or secrets.randbelow(1 << 32))


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    sys.stdout.write(f"SVD_TRT_TEST_SEED={seed}\n")  # pytest shows it if the test fails
    return random.Random(f"{seed} {request.node.name}")


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    returncode: int
    stdout: bytes
    stderr: str

    def assert_done(self) -> None:
        assert self.returncode == 0, self.stderr

    def assert_refused(self, *words: str, code: int = 1) -> None:
        """One line on standard error, which has one of ``words``, and no traceback."""
        assert self.returncode == code, (self.returncode, self.stderr)
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, self.stderr
        assert not words or any(word in self.stderr for word in words), self.stderr


@dataclass(frozen=True)
class Running:
    """A command that was started."""

    pid: int
    stdout: Path
    stderr: Path
    exit_code: Callable[[], int | None]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Result:
        deadline = time.monotonic() + LIMIT_S
        while (code := self.exit_code()) is None:
            assert time.monotonic() < deadline, f"it hangs: {self.stderr.read_text()}"
            time.sleep(0.005)
        return Result(code, self.stdout.read_bytes(), self.stderr.read_text())


Start: TypeAlias = Callable[..., Running]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """``start("infer", ..., limits={"RLIMIT_NOFILE": 9})`` starts the command in a process of its own."""
    logs = tmp_path_factory.mktemp("logs")
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.forkserver"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | ENVIRONMENT,
        text=True,
    )

    def ask(**request: Any) -> Any:
        assert server.stdin is not None
        assert server.stdout is not None
        if request:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
        return json.loads(server.stdout.readline())

    assert ask() == "ready"

    def begin(*arguments: str | Path, **options: Any) -> Running:
        name = secrets.token_hex(4)
        out, err = (Path(options.pop(kind, logs / f"{name}.{kind}")) for kind in ("stdout", "stderr"))
        limits, variables = options.pop("limits", {}), options.pop("variables", {})
        assert not options
        words = list(map(str, arguments))
        pid = ask(arguments=words, stdout=str(out), stderr=str(err), limits=limits, variables=variables)
        return Running(pid, out, err, lambda: ask(wait=pid))

    yield begin
    server.terminate()
    server.communicate()


def wait_for_orphans(folder: Path) -> None:
    """Wait until no process has ``folder`` in its arguments, such as the exporter of a killed build."""
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()):
                process.wait(LIMIT_S)
        except psutil.Error:
            continue


def entries_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="session")
def warm(once: Any, small_bundle: Path, cache: Path) -> Path:
    """A cache with the networks and engines of ``small_bundle`` alone."""

    def make(path: Path) -> None:
        path.mkdir()
        for key in keys_of(small_bundle):
            shutil.copytree(cache / key, path / key)

    return once("warm", make)


def keys_of(bundle: Path) -> dict[str, str]:
    """The keys of a bundle in the cache, and which network's form each is of."""
    networks = read_manifest(bundle).networks
    plans = {entry.plan.key: f"{name} plan" for name, entry in networks.items() if entry.plan}
    return {entry.onnx.key: f"{name} onnx" for name, entry in networks.items()} | plans


def copy_links(source: Path, to: Path) -> Path:
    """Copy a folder by hard links, which svd-trt never writes through."""
    shutil.copytree(source, to, copy_function=os.link)
    return to


def write_manifest_anew(manifest: Manifest, folder: Path) -> None:
    """Write a manifest into a folder of hard links, whose other names keep their content."""
    for name in (MANIFEST_NAME, CHECKSUM_NAME):
        (folder / name).unlink()
    write_manifest(manifest, folder)


def assert_whole(bundle: Path) -> None:
    """If there is a bundle, all of it is there and unaltered."""
    if bundle.exists():
        Bundle.open(bundle)


def assert_cache_whole(cache: Path, *, tidy: bool) -> None:
    """Every entry of the cache is as it was written, and with ``tidy`` there is nothing else but locks."""
    for path in cache.iterdir():
        if re.fullmatch(r"[0-9a-f]{64}", path.name):
            record = (path / "entry.json").read_bytes()
            kind = OnnxEntry if b'"nodes"' in record else PlanEntry
            entry = msgspec.json.decode(record, type=kind)
            assert entry.is_whole(path), path
        else:
            assert path.suffix == ".lock" or not tidy, path


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[..., None]]:
    """Mount a disk of ``size`` bytes at ``folder``; the function that is returned remounts it with other options."""

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "remount" not in options:
            folder.rmdir()
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr

    folder.mkdir()
    mount(f"size={size}")
    try:
        yield lambda *options: mount("remount", *options)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
