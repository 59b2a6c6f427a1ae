"""``svd-trt serve --ray`` without Ray: what an operator mistypes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from svd_trt.cli.serve_ray import _environment
from tests.cli.conftest import assert_refused, invoke

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
TOKEN = {"RAY_AUTH_MODE": "token"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0", "is not a number of replicas or a range of it"),
        ("4:2", "is not a number of replicas or a range of it"),
        ("2", "--replicas is for --ray"),
    ],
)
def test_replicas_that_are_malformed_or_without_ray_are_refused(value: str, words: str) -> None:
    assert_refused(invoke("serve", "b", "--replicas", value), words, code=2)


def test_ray_is_an_extra_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ("serve", "b", "--port", 0, "--data", tmp_path / "d", "--ray")
    assert_refused(invoke(*arguments), "pip install 'svd-trt[serve,ray]'")
    (tmp_path / "bundle").mkdir()
    assert_refused(invoke(*arguments, tmp_path / "bundle"), "write --ray after the bundles")


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "head", "http://head:6379", ":6379"])
def test_an_address_that_is_none(address: str, tmp_path: Path) -> None:
    assert_refused(invoke("serve", "b", "--data", tmp_path, "--ray", address), f"--ray {address} is no HOST:PORT")


@pytest.mark.parametrize(
    ("cluster", "variables", "saved", "expected"),
    [
        ("local", {}, False, {"RAY_USAGE_STATS_ENABLED": "0"} | LOOPBACK),
        ("10.0.0.1:6379", {}, False, {}),
        ("10.0.0.1:6379", {}, True, TOKEN),
        ("127.0.0.1:6379", {}, True, LOOPBACK | TOKEN),
        ("[::1]:6379", {}, False, LOOPBACK),
        ("head:6379", {"RAY_AUTH_TOKEN": "x"}, False, TOKEN),
        ("head:6379", {"RAY_AUTH_TOKEN": ""}, False, {}),
        ("head:6379", {"RAY_AUTH_TOKEN_PATH": "/x"}, False, TOKEN),
        ("head:6379", {"RAY_AUTH_MODE": "disabled"}, True, {}),
    ],
)
def test_a_token_is_shown_if_there_is_one(
    cluster: str,
    variables: dict[str, str],
    saved: bool,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if saved:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("x")
    assert _environment(cluster) == expected
