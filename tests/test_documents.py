"""The documents stay short, and every file and test that they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("benchmarks", "docs", "engine", "examples", "export", "runtime", "src", "tests")
# In code, such as `tests/runtime/test_video.py::test_reads_back`, or as the target of a link.
NAMED = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)(?:::(\w+))?`")
LINKED = re.compile(r'(?:\]\(|src=")([^)"#:]+)')


def test_the_readme_has_at_most_900_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_how_it_works_fits_90_lines_and_has_one_diagram() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    assert len(text.splitlines()) <= 90
    assert text.count("![") == 1


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    for path, function in NAMED.findall(text):
        assert (ROOT / path).exists(), path
        assert not function or f"def {function}(" in (ROOT / path).read_text(), function
    for link in LINKED.findall(text):
        assert (document.parent / link).exists(), link
