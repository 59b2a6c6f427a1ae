"""Unfinished files: those of processes that were killed are removed, and those of running processes are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from svd_trt.engine import temporary_files
from svd_trt.engine.swap import swap
from svd_trt.engine.temporary_files import REPLACED, create_file, create_folder, hidden_sibling, remove_leftovers

CREATE = """
import os, signal, sys; from pathlib import Path
from svd_trt.engine.temporary_files import create_file, create_folder
kept = [create_file(Path(sys.argv[1]) / "out.mp4", ".mp4"), create_folder(Path(sys.argv[1]) / "out")]
(kept[1][0] / "frame_0000.png").touch()
print("created", flush=True); sys.stdin.read()
"""


def test_leftovers_are_removed_as_soon_as_their_process_is_dead(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CREATE, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "created\n"
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "they are in use"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_files_stay(tmp_path: Path) -> None:
    """Only names that svd-trt makes; not what it moved aside, which may be the only copy; nothing through a link."""
    (tmp_path / "elsewhere").write_text("precious")
    hidden_sibling(tmp_path / "x", "").symlink_to(tmp_path / "elsewhere")
    hidden_sibling(tmp_path / "x", REPLACED).mkdir()
    for name in (".svd-trt-notes", ".svd-trt-0123456789ab.tar.gz", "svd-trt-0123456789ab", ".svd-trt-0123456789abc"):
        (tmp_path / name).touch()
    before = sorted(tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    remove_leftovers(tmp_path / "missing")


@pytest.mark.parametrize("create", [create_file, create_folder])
def test_a_file_that_is_taken_for_a_leftover_before_it_is_locked_is_made_again(
    create: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may look between the creation and the lock."""
    hold, held = temporary_files._hold, []

    def late(path: Path, descriptor: int) -> bool:
        if not held:
            remove_leftovers(tmp_path)
        held.append(path)
        return hold(path, descriptor)

    monkeypatch.setattr(temporary_files, "_hold", late)
    if create is create_file:
        path, file = create_file(tmp_path / "a", ".gif")
        file.close()
    else:
        path, descriptor = create_folder(tmp_path / "a")
        os.close(descriptor)
    assert len(held) == 2
    assert list(tmp_path.iterdir()) == [path] == held[1:]


def test_folders_are_exchanged(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert swap(tmp_path / "one", tmp_path / "other")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["other"]
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["one"]
    with pytest.raises(FileNotFoundError):
        swap(tmp_path / "one", tmp_path / "missing")
