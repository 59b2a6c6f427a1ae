"""The file of the page, without a browser; tests/browser uses it in one."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from svd_trt.runtime.parameters import Parameters

PAGE = (files("svd_trt.serve") / "page" / "index.html").read_text("utf-8")


def listed(name: str) -> list[str]:
    """The names in a list or an object of the page's script."""
    found = re.search(rf"^const {name} = [\[{{](.*?)[\]}}];$", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return re.findall(r"(\w+): ", found[1]) or re.findall(r'"(\w+)"', found[1])


def test_the_page_is_one_small_file() -> None:
    assert len(PAGE.encode()) < 50_000
    assert set(re.findall(r"https?://[^\s'\"]*", PAGE)) == {"http://www.w3.org/2000/svg"}  # a name, and no address
    assert re.findall(r"<(?:script|style|link)\b[^>]*>", PAGE)[1:] == ["<style>", "<script>"]
    assert re.findall(r'<link\b[^>]*href="(\w+):', PAGE) == ["data"]


def test_the_style_comes_before_what_it_styles() -> None:
    assert PAGE.index("</style>") < PAGE.index("<body>")


def test_the_policy_can_forbid_attributes_that_run() -> None:
    body = PAGE[PAGE.index("<body>") : PAGE.index("<script>")]
    assert re.findall(r"\s(?:on\w+|style)=", body) == []


@pytest.mark.parametrize("name", ["FIRST", "USUAL"])
def test_the_arguments_that_the_page_names_exist(name: str) -> None:
    assert len(listed(name)) >= 7
    assert set(listed(name)) <= set(Parameters.fields())


def test_the_page_has_words_for_every_stage() -> None:
    assert listed("STAGES") == ["encode", "denoise", "decode"]
