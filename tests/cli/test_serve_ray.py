"""``svd-trt serve --ray`` without Ray: what an operator mistypes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cli.conftest import assert_refused, invoke


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
