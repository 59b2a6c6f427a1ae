"""``svd-trt serve``: what an operator mistypes ends the start with one line, and what it says when it starts."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from svd_trt import Bundle, OutputError
from svd_trt.serve.events import Hub
from svd_trt.serve.models import named_bundles
from svd_trt.serve.server import Ended, bind, run_server
from svd_trt.serve.store import Store
from tests.cli.conftest import assert_refused, invoke
from tests.serve.conftest import start_server


def test_a_missing_bundle_is_refused(tmp_path: Path) -> None:
    assert_refused(invoke("serve", tmp_path / "none", "--port", 0, "--data", tmp_path / "d"), "there is no bundle at")


def test_two_bundles_of_one_name_are_refused(tmp_path: Path) -> None:
    assert_refused(invoke("serve", tmp_path / "a/b", tmp_path / "c/b"), "are both named b", "rename or link one")


def test_a_link_names_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, link = tmp_path / "a" / "b", tmp_path / "svd"
    bundle.mkdir(parents=True)
    link.symlink_to(bundle)
    monkeypatch.chdir(bundle)
    assert list(named_bundles([link, bundle])) == ["svd", "b"]
    assert list(named_bundles([Path(), Path("..")])) == ["b", "a"]


def test_an_address_that_is_taken_or_unknown_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(invoke("serve", "b", "--port", port, "--data", tmp_path), f"port {port}: Address already in use")
    assert_refused(invoke("serve", "b", "--host", "no.such.host.invalid", "--data", tmp_path), "choose another --host")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--keep", "soon", "is not an age, a size or both"),
        ("--keep", "7d,20", "is not an age, a size or both"),
        ("--queue", "0", "0 is not in the range"),
        ("--batch", "0", "0 is not in the range"),
        ("--max-upload", "much", "is not a size"),
        ("--max-seconds", "nan", "is no time"),
        ("--max-seconds", "inf", "is not in the range"),
        ("--max-stall-seconds", "nan", "is no time"),
        ("--max-upload-seconds", "nan", "is no time"),
        ("--port", "70000", "70000 is not in the range"),
    ],
)
def test_options_that_are_malformed_are_refused(option: str, value: str, words: str) -> None:
    assert_refused(invoke("serve", "b", option, value), words, code=2)


def test_a_batch_that_a_bundle_cannot_make_is_refused(small_bundle: Path, tmp_path: Path) -> None:
    refused = invoke("serve", small_bundle, "--port", 0, "--data", tmp_path / "d", "--batch", 2)
    assert_refused(refused, "--batch 2 is more than small was built for (1 together)", "choose at most 1")


def test_a_key_that_is_empty_or_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(" \n")
    assert_refused(invoke("serve", "b", "--api-key-file", tmp_path / "key"), "is empty", "openssl rand -hex 32")
    assert_refused(invoke("serve", "b", "--api-key-file", tmp_path / "no"), "cannot be read: No such file")
    (tmp_path / "key").write_text("schl\xfcssel")
    assert_refused(invoke("serve", "b", "--api-key-file", tmp_path / "key"), "has a key that is no ASCII")


def test_a_key_in_the_environment_may_end_in_a_line_break(tiny_bundle: Bundle, tmp_path: Path) -> None:
    server = start_server(tiny_bundle.path, tmp_path / "data", SVD_TRT_API_KEY="abc \r\n")
    assert server.client.get("/v1/models", headers={"Authorization": "Bearer abc"}).status_code == 200
    assert server.client.get("/v1/models").status_code == 401
    server.stop()


def test_allowed_hosts_are_names(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for name in ("video.example:8443", "http://video.example", "a b"):
        assert_refused(invoke("serve", "b", "--allow-host", name), "--allow-host takes a name without a port or path")
    server = start_server(tiny_bundle.path, tmp_path / "data", "--host", "0.0.0.0", "--allow-host", "Video.example")
    statuses = {
        host: server.client.get("/v1/models", headers={"Host": host}).status_code
        for host in ("video.example:8443", "localhost", "evil.example")
    }
    assert statuses == {"video.example:8443": 200, "localhost": 200, "evil.example": 403}
    server.stop()


def test_a_port_that_is_taken_after_it_was_bound_is_refused(tmp_path: Path) -> None:
    """Both may bind it, and only one may listen."""
    with bind("127.0.0.1", 0, 60) as opened, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(opened.getsockname())
        other.listen()
        with pytest.raises(OutputError, match=r"Address already in use; choose another --host or --port"):
            run_server(FastAPI(), Hub(), opened, Ended(), lambda: None)


def test_a_folder_of_another_server_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "d")
    assert_refused(invoke("serve", "b", "--port", 0, "--data", tmp_path / "d"), "another server keeps its jobs in")
    store.close()


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "svd_trt.serve.application", None)
    assert_refused(invoke("serve", "b"), "pip install 'svd-trt[serve]'")


def test_a_server_that_others_reach_warns_and_serves_the_page(tiny_bundle: Bundle, tmp_path: Path) -> None:
    server = start_server(tiny_bundle.path, tmp_path / "data", "--host", "0.0.0.0")
    assert "everybody who reaches 0.0.0.0" in "".join(server.said)
    page = server.client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "script-src 'sha256-" in page.headers["content-security-policy"]
    assert httpx.get(f"{server.client.base_url}/readyz", headers={"Host": "videos.example"}).status_code == 200
    assert server.stop() == 143
    assert "Traceback" not in "".join(server.said)
