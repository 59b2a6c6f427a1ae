"""The cache of networks and engines: hits, damaged entries, killed writers, and processes that want the same entry."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from svd_trt.engine.manifest import FileEntry, OnnxEntry, PlanEntry
from svd_trt.engine.network_cache import NetworkCache
from svd_trt.engine.staging import Staging
from svd_trt.errors import OutputError
from svd_trt.export.build import _true_reason

KEY = "ab" * 32


def make_network(folder: Path, content: bytes = b"graph") -> OnnxEntry:
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    files = []
    for name in ("denoiser.onnx", "denoiser.onnx.data"):
        (folder / "onnx" / name).write_bytes(content + name.encode())
        files.append(FileEntry.of(folder, folder / "onnx" / name))
    return OnnxEntry(KEY, files[0], (files[1],), nodes=3, parameters=4)


@pytest.fixture
def cache(tmp_path: Path) -> NetworkCache:
    return NetworkCache(tmp_path / "cache")


def test_an_entry_is_taken_as_it_was_stored(cache: NetworkCache, tmp_path: Path) -> None:
    entry = make_network(tmp_path / "made")
    assert cache.take(KEY, OnnxEntry, tmp_path / "taken") is None
    cache.store(entry, tmp_path / "made")
    assert cache.take(KEY, OnnxEntry, tmp_path / "taken") == entry
    assert entry.is_whole(tmp_path / "taken")
    assert cache.take(KEY, PlanEntry, tmp_path / "taken") is None
    assert cache.take("cd" * 32, OnnxEntry, tmp_path / "taken") is None


def test_files_are_independent_of_the_cache(cache: NetworkCache, tmp_path: Path) -> None:
    """Neither a change of a bundle's file nor one of the cache's reaches the other."""
    entry = make_network(tmp_path / "made")
    cache.store(entry, tmp_path / "made")
    cache.take(KEY, OnnxEntry, tmp_path / "taken")
    for folder in ("made", "taken"):
        (tmp_path / folder / entry.files[0].path).write_bytes(b"changed in place")
    assert cache.take(KEY, OnnxEntry, tmp_path / "again") == entry
    (cache.folder / KEY / entry.files[0].path).write_bytes(b"changed in place")
    assert entry.is_whole(tmp_path / "again")


@pytest.mark.parametrize("damage", ["content", "file", "record", "all but the record"])
def test_a_damaged_entry_is_a_miss_and_is_replaced(damage: str, cache: NetworkCache, tmp_path: Path) -> None:
    entry = make_network(tmp_path / "made")
    cache.store(entry, tmp_path / "made")
    folder = cache.folder / KEY
    if damage == "content":
        (folder / entry.files[1].path).write_bytes(b"x" * entry.files[1].size)
    elif damage == "file":
        (folder / entry.files[1].path).unlink()
    elif damage == "record":
        (folder / "entry.json").write_text("{")
    else:
        shutil.rmtree(folder / "onnx")
    assert cache.take(KEY, OnnxEntry, tmp_path / "taken") is None
    cache.store(entry, tmp_path / "made")
    assert cache.take(KEY, OnnxEntry, tmp_path / "taken") == entry


def test_a_writer_that_was_killed_leaves_no_entry(cache: NetworkCache, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.engine.test_network_cache import make_network;"
        "from svd_trt.engine import network_cache; cache = network_cache.NetworkCache(Path(sys.argv[1]));"
        "copy = network_cache._copy;"
        "network_cache._copy = lambda a, b: (copy(a, b), os.kill(os.getpid(), signal.SIGKILL));"
        "made = Path(sys.argv[2]); entry = make_network(made)\n"
        "with cache.locked(entry.key): cache.store(entry, made)"
    )
    command = [sys.executable, "-c", code, str(cache.folder), str(tmp_path / "made")]
    assert subprocess.run(command).returncode == -9
    assert (cache.folder / f"{KEY}.partial").exists()
    assert cache.take(KEY, OnnxEntry, tmp_path / "taken") is None
    entry = make_network(tmp_path / "made")
    with cache.locked(KEY):
        cache.store(entry, tmp_path / "made")
    assert cache.take(KEY, OnnxEntry, tmp_path / "taken") == entry
    assert not (cache.folder / f"{KEY}.partial").exists()


def test_two_builds_make_an_entry_once(cache: NetworkCache, tmp_path: Path) -> None:
    """Both look before either has made it; the one that comes second waits and takes what the first one made."""
    code = (
        "import sys, time; from pathlib import Path; from tests.engine.test_network_cache import KEY, make_network;"
        "from svd_trt.engine.network_cache import NetworkCache; from svd_trt.engine.staging import Staging;"
        "from svd_trt.engine.manifest import OnnxEntry;"
        "cache = NetworkCache(Path(sys.argv[1]))\n"
        "with Staging(Path(sys.argv[2]), cache) as staging:\n"
        "    assert staging.reuse('denoiser', KEY, OnnxEntry) is None\n"
        "    print('missed', flush=True); sys.stdin.readline()\n"
        "    with staging.making(KEY):\n"
        "        found = staging.reuse('denoiser', KEY, OnnxEntry)\n"
        "        if found is None:\n"
        "            time.sleep(0.5); staging.finish('denoiser', make_network(staging.path))\n"
        "    print('made' if found is None else f'from cache: {found[1]}')\n"
    )
    commands = [[sys.executable, "-c", code, str(cache.folder), str(tmp_path / name)] for name in ("one", "two")]
    builds = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for command in commands
    ]
    for build in builds:
        assert build.stdout is not None
        assert build.stdout.readline() == "missed\n"
    for build in builds:
        assert build.stdin is not None
        build.stdin.write("go\n")
        build.stdin.flush()
    assert sorted(build.communicate()[0] for build in builds) == ["from cache: True\n", "made\n"]


WAITING_BUILD = """
import logging, sys
from pathlib import Path
from svd_trt.engine.manifest import OnnxEntry
from svd_trt.engine.staging import Staging
from tests.engine.test_network_cache import KEY, make_network

class Say(logging.Handler):
    def emit(self, record):
        print("waits", flush=True)

logging.getLogger("svd_trt").addHandler(Say())
with Staging(Path(sys.argv[1])) as staging:
    found = staging.reuse("denoiser", KEY, OnnxEntry)
    print("has the lock", found is not None, flush=True)
    if found is None:
        staging.finish("denoiser", make_network(staging.path))
        sys.stdin.readline()
        print("whole", staging.reuse("denoiser", KEY, OnnxEntry) is not None, flush=True)
"""


def test_a_build_that_waits_removes_nothing_of_the_one_that_runs(tmp_path: Path) -> None:
    """Two real processes that build the same bundle, as two runs of ``svd-trt bench`` do."""
    command = [sys.executable, "-c", WAITING_BUILD, str(tmp_path / "bundle")]
    first, second = (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    assert first.stdin is not None
    assert first.stdout is not None
    assert second.stdin is not None
    assert second.stdout is not None
    lines = {first: first.stdout.readline(), second: second.stdout.readline()}
    (runs,) = (process for process, line in lines.items() if line == "has the lock False\n")
    (waits,) = (process for process, line in lines.items() if line == "waits\n")
    assert runs.communicate("go\n")[0] == "whole True\n"
    assert waits.communicate("")[0] == "has the lock True\n", "it takes what the first one made"
    assert (runs.returncode, waits.returncode) == (0, 0)


def test_a_build_whose_folder_is_removed_says_so(tmp_path: Path) -> None:
    with Staging(tmp_path / "bundle") as staging:
        message = r"\.bundle\.building, in which .* was removed by another program .* again"
        with pytest.raises(FileNotFoundError), _true_reason(staging):
            (staging.path / "no" / "file").write_bytes(b"")
        shutil.rmtree(staging.path)
        with pytest.raises(OutputError, match=message), _true_reason(staging):
            (staging.path / "file").write_bytes(b"")


def test_a_build_that_is_refused_leaves_the_lock_to_others(tmp_path: Path) -> None:
    """The target became something else while the build waited for the lock."""
    target = tmp_path / "bundle"

    class Late(Staging):
        def _acquire(self) -> None:
            super()._acquire()
            target.write_text("another program's")

    late = Late(target)
    with pytest.raises(OutputError, match="exists and is not a bundle"):
        late.__enter__()
    target.unlink()
    with Staging(target, timeout=0):
        pass


def test_staging_prefers_what_it_has(cache: NetworkCache, tmp_path: Path) -> None:
    with Staging(tmp_path / "bundle", cache) as staging:
        entry = make_network(staging.path)
        staging.finish("denoiser", entry)
        assert staging.reuse("denoiser", KEY, OnnxEntry) == (entry, False)
    with Staging(tmp_path / "other", cache) as staging:
        assert staging.reuse("denoiser", KEY, OnnxEntry) == (entry, True)
        assert staging.reuse("denoiser", KEY, OnnxEntry) == (entry, False)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "cache", tmp_path / "file", Path("/proc/cache")):
        with pytest.raises(OutputError, match=r"cannot write to the cache .* choose another folder with --cache"):
            NetworkCache(folder)


def test_what_a_killed_build_was_adding_is_removed_by_any_build(cache: NetworkCache, tmp_path: Path) -> None:
    """Not only by one that wants the same entry; what a running build adds is left alone."""
    entry = make_network(tmp_path / "made")
    cache.store(entry, tmp_path / "made")
    for name in (f"{'cd' * 32}.partial", f"{'ef' * 32}.partial"):
        shutil.copytree(cache.folder / KEY, cache.folder / name)
    with cache.locked("ef" * 32):
        NetworkCache(cache.folder)
    kept = {path.name for path in cache.folder.iterdir() if path.suffix != ".lock"}
    assert kept == {KEY, f"{'ef' * 32}.partial"}


def test_a_record_that_is_not_text_is_a_miss(cache: NetworkCache, tmp_path: Path) -> None:
    entry = make_network(tmp_path / "made")
    cache.store(entry, tmp_path / "made")
    (cache.folder / KEY / "entry.json").write_bytes(b'{"\x80')
    assert cache.take(KEY, OnnxEntry, tmp_path / "taken") is None
