"""Whether a video can be written to a path, checked before the long work starts."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svd_trt.errors import ArgumentError, OutputError
from svd_trt.runtime.video import check_output, numbered, open_writer


def save(path: Path | str, count: int = 1) -> None:
    with open_writer(path, height=8, width=8, fps=7, metadata={}) as writer:
        writer.write(np.zeros((count, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("name", ["a.mp4", "A.MP4", "a.gif", "a.webp", "a.npy", "a", "a/", "a.b/", ".a"])
def test_writable(tmp_path: Path, name: str) -> None:
    check_output(f"{tmp_path}/{name}")
    assert not list(tmp_path.iterdir()), "the check leaves no file"
    save(f"{tmp_path}/{name}")
    assert [entry.name for entry in tmp_path.iterdir()] == [name.rstrip("/")]
    check_output(f"{tmp_path}/{name}")  # an earlier video may be replaced


@pytest.mark.parametrize("name", ["a.avi", "a.mp", "dir.x/a.b"])
def test_unknown_suffix_lists_the_known(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"use \.mp4, \.mov, .*, \.apng, \.npy, or .*/ for a folder"):
        check_output(tmp_path / name)


@pytest.mark.parametrize("path", ["", ".", "..", "/", "some/.."])
def test_nameless(path: str) -> None:
    with pytest.raises(OutputError, match="name a file"):
        check_output(path)


def test_missing_parent(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; create it first"):
        check_output(tmp_path / "missing" / "a.mp4")


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a folder"):
        check_output(tmp_path / "file" / "a.mp4")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no file system here that refuses even root")
def test_file_system_that_refuses() -> None:
    with pytest.raises(OutputError, match="cannot write"):
        check_output("/proc/a.mp4")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="permissions do not bind root")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="choose a folder that you may write to"):
            check_output(tmp_path / "a.mp4")
    finally:
        tmp_path.chmod(0o700)


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path / "a.mp4")


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(OutputError, match="is a file, not a folder"):
        check_output(tmp_path / "a")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_instead_of_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(OutputError, match="pipe"):
        check_output(tmp_path / "a.mp4")


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs a mount point")
def test_mount_point() -> None:
    with pytest.raises(OutputError, match="mount point"):
        check_output("/proc")


def test_folder_with_other_files(tmp_path: Path) -> None:
    save(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").touch()
    with pytest.raises(OutputError, match=r"holds notes\.txt"):
        check_output(tmp_path / "a")


def test_folder_with_frames_of_others(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "frame_0000.png")
    with pytest.raises(OutputError, match=r"holds frame_0000\.png"):
        check_output(tmp_path / "a")


def test_folder_with_a_damaged_frame(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "frame_0000.png").write_bytes(b"not a picture")
    with pytest.raises(OutputError, match=r"holds frame_0000\.png"):
        check_output(tmp_path / "a")


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save(tmp_path / "a")
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["frame_0000.png"]


def test_shorter_video_leaves_no_old_frames(tmp_path: Path) -> None:
    save(tmp_path / "a", count=5)
    save(tmp_path / "a", count=2)
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == ["frame_0000.png", "frame_0001.png"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["a.npy", "a"])
def test_links_are_written_through(tmp_path: Path, name: str) -> None:
    (tmp_path / "disk").mkdir()
    save(tmp_path / "disk" / name, count=1)
    (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    save(tmp_path / name, count=3)
    assert (tmp_path / name).is_symlink()
    assert [entry.name for entry in (tmp_path / "disk").iterdir()] == [name]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_system_that_cannot_exchange_folders(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder is moved aside and back if the new one cannot take its place."""
    save(tmp_path / "a", count=5)
    monkeypatch.setattr("svd_trt.engine.swap.swap", lambda *_: False)
    rename = Path.rename

    def refuse_new(path: Path, to: Path) -> Path:
        if fails and not (path / "frame_0002.png").exists():
            raise OSError(13, "Permission denied")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OutputError, match="Permission denied") if fails else contextlib.nullcontext():
        save(tmp_path / "a", count=2)
    assert len(list((tmp_path / "a").iterdir())) == (5 if fails else 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(OutputError, match="cannot write"):
        save(tmp_path / "a")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_longest_name(tmp_path: Path) -> None:
    name = "n" * 251 + ".npy"
    save(tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    with pytest.raises(OutputError, match="cannot write"):
        check_output(tmp_path / f"n{name}")


@pytest.mark.parametrize("name", ["a.mp4", "a.npy", "a.webp"])
def test_permissions_are_the_usual(tmp_path: Path, name: str) -> None:
    (tmp_path / "usual").touch()
    save(tmp_path / name)
    assert (tmp_path / name).stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_stdout_without_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OutputError, match="takes no bytes"):
        check_output("-")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_stdout_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = os.openpty()
    try:
        with os.fdopen(terminal, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            with pytest.raises(OutputError, match="is a terminal"):
                check_output("-")
            monkeypatch.undo()
    finally:
        os.close(controller)


@pytest.mark.parametrize(
    ("path", "index", "count", "expected"),
    [
        ("out.mp4", 0, 1, "out.mp4"),
        ("out.mp4", 0, 2, "out-0.mp4"),
        ("dir/out.tar.GIF", 9, 10, "dir/out.tar-9.GIF"),
        ("out.webp", 9, 11, "out-09.webp"),
        ("out.webp", 100, 101, "out-100.webp"),
        ("dir/out", 1, 2, "dir/out-1"),
        ("dir/out/", 1, 2, "dir/out-1/"),
        ("out.v2/", 1, 2, "out.v2-1/"),
        ("-", 1, 2, "-"),
    ],
)
def test_numbered(path: str, index: int, count: int, expected: str) -> None:
    assert numbered(path, index, count) == expected


def test_numbered_takes_paths(tmp_path: Path) -> None:
    assert numbered(tmp_path / "a.mp4", 1, 2) == str(tmp_path / "a-1.mp4")


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_numbered_out_of_range(index: int, count: int) -> None:
    with pytest.raises(ArgumentError, match="index"):
        numbered("out.mp4", index, count)
