"""An installed C++ runtime: programs find it with CMake and with pkg-config, also after it was moved."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from svd_trt import __version__

PROGRAM = """
#include <svd_trt.hpp>

#include <cstdio>

int main() {
  try {
    svd_trt::Pipeline pipeline("nowhere");
  } catch (const svd_trt::Error &error) {
    std::printf("%s: %s\\n", svd_trt_version(), error.what());
  }
}
"""
PROJECT = """
cmake_minimum_required(VERSION 3.18)
project(host CXX)
find_package(svd_trt REQUIRED)
add_executable(with_shared program.cpp)
target_link_libraries(with_shared PRIVATE svd_trt::shared)
add_executable(with_static program.cpp)
target_link_libraries(with_static PRIVATE svd_trt::static)
"""
SAYS = f"{__version__}: there is no bundle at nowhere; make one with `svd-trt build MODEL -o BUNDLE`\n"


def run(*command: str | Path, **variables: str) -> str:
    environment = os.environ | variables
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of an installation that was moved."""
    folder = tmp_path_factory.mktemp("installed")
    run("cmake", "--install", cpp, "--prefix", folder / "before")
    return shutil.move(folder / "before", folder / "moved")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "program.cpp"
    path.write_text(PROGRAM)
    (path.parent / "CMakeLists.txt").write_text(PROJECT)
    return path


def test_cmake_finds_both_libraries(installed: Path, program: Path, tmp_path: Path) -> None:
    run("cmake", "-S", program.parent, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", tmp_path)
    for name in ("with_shared", "with_static"):
        assert run(tmp_path / name) == SAYS


def test_pkg_config_finds_the_library(installed: Path, program: Path, tmp_path: Path) -> None:
    folder = next(installed.glob("lib*/**/pkgconfig"))
    found = run("pkg-config", "--cflags", "--libs", "svd_trt", PKG_CONFIG_PATH=str(folder)).split()
    run("c++", "-std=c++17", program, *found, "-o", tmp_path / "program")
    assert run(tmp_path / "program", LD_LIBRARY_PATH=str(folder.parent)) == SAYS


def test_the_installed_command_line_finds_the_library(installed: Path) -> None:
    assert run(installed / "bin" / "svd_trt_cli", "--version") == f"{__version__}\n"
