"""The files of deploy/: linted, and their commands run against the real server. No container is built here."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from svd_trt import Bundle
from tests.serve.conftest import start_server

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile", "triton.Dockerfile")
UNIT = DEPLOY / "svd-trt.service"
INSTALLED = "/opt/svd-trt/bin/svd-trt"


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined: ``("USER", "10001:10001")``."""
    lines = [line for line in (DEPLOY / name).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def last(name: str, word: str) -> str:
    return [rest for found, rest in instructions(name) if found == word][-1]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DEPLOY / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_hadolint_looks(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM nvidia/cuda\nRUN cd /tmp && pip install numpy\n")
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DL3006" in done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_run_as_a_user_who_is_not_root(name: str) -> None:
    words = [word for word, _ in instructions(name)]
    assert last(name, "USER") == "10001:10001"
    assert "RUN" not in words[words.index("USER") :], "what runs later would lack the rights of root"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_get_every_file_of_the_package(name: str) -> None:
    """Docker sends what .dockerignore lets through; the wheel is built of it."""
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied: set[str] = set()
    for word, rest in instructions(name):
        if word == "COPY":
            *sources, target = rest.split()
            copied |= {source for source in sources if target.endswith(("/", f"/{source}"))}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied == folders | files == sent
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.parametrize(("name", "extras"), [("Dockerfile", "serve,rtx"), ("triton.Dockerfile", "rtx")])
def test_images_install_extras_that_exist(name: str, extras: str) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"EXTRAS={extras}" in [rest for word, rest in instructions(name) if word == "ARG"]
    assert set(extras.split(",")) <= set(known)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(INSTALLED, shutil.which("true") or "/bin/true"))
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    # 1.7 of 10; what is left is the network, the GPU's nodes, and code that the driver compiles.
    security = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit]
    exposed = subprocess.run(security, capture_output=True, text=True, check=False)
    assert exposed.returncode == 0, exposed.stdout


def test_the_commands_of_the_unit_and_of_the_image_serve(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """With another bundle, folder and port. The image's health check sees whether the server is there."""
    (line,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    unit = shlex.split(line)
    image = [*json.loads(last("Dockerfile", "ENTRYPOINT")), *json.loads(last("Dockerfile", "CMD"))]
    assert unit[:3] == [INSTALLED, "serve", "/srv/svd-xt"]
    assert image[:3] == ["svd-trt", "serve", "/bundle"]
    check = json.loads(last("Dockerfile", "HEALTHCHECK").partition(" CMD ")[2])
    for number, words in enumerate((unit[3:], image[3:])):
        data = tmp_path / str(number)
        options = [word for word in words if word not in ("--data", "/var/lib/svd-trt", "/data")]
        assert len(options) == len(words) - 2
        if "--port" in options:
            at = options.index("--port")
            assert options[at + 1] == "8000"
            del options[at : at + 2]
        server = start_server(tiny_bundle.path, data, *options)
        try:
            port = str(server.client.base_url.port)
            asked = [sys.executable, *(word.replace("127.0.0.1:8000", f"127.0.0.1:{port}") for word in check[1:])]
            assert port in asked[-1]
            assert subprocess.run(asked, check=False).returncode == 0
        finally:
            code = server.stop()
        assert subprocess.run(asked, stderr=subprocess.DEVNULL, check=False).returncode == 1
        allowed = re.findall(r"^SuccessExitStatus=(\d+)$", UNIT.read_text(), re.MULTILINE)
        assert str(code) in ["0", *allowed], "a service that was stopped is not a failed one"
