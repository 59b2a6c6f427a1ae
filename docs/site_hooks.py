"""What the build of the site adds to MkDocs: links that also work in the repository, and the help of every command.

Documents link to files by their place in the repository, such as ``../benchmarks/results/mid.json``. MkDocs only knows
``docs/``, so the build rewrites those links: the documents in `PAGES` become pages of the site, and other files outside
``docs/`` are copied to it. A link to a file that does not exist stays as it is, and the strict build fails on it.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from svd_trt.cli.main import cli

ROOT = Path(__file__).parent.parent
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/tiny/README.md": "miniature.md",
}
COPIES = "repository"
HELP = "<!-- the help of every command -->"
HELP_WIDTH = 100

_LINK = re.compile(r'(\]\(|src="|href=")([^)"#?:\s]+)')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents in `PAGES`, and every other file that a document links to."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=os.fspath(ROOT / source)))
    linked = {path for file in files.documentation_pages() for path in _linked(file)}
    for path in sorted(linked):
        if path not in PAGES and not path.startswith("docs/"):
            files.append(File.generated(config, f"{COPIES}/{path}", abs_src_path=os.fspath(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Put the help of the commands where `HELP` is, and rewrite links from places in the repository to the site's."""
    if HELP in markdown:
        markdown = markdown.replace(HELP, "\n\n".join(_help(cli, None, "svd-trt")))
    file = page.file

    def rewritten(match: re.Match[str]) -> str:
        path = _resolve(file, match[2])
        if path is None:
            return match[0]
        target = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIES}/{path}")
        return match[1] + posixpath.relpath(target, posixpath.dirname(file.src_uri) or ".")

    return _LINK.sub(rewritten, markdown)


def _linked(file: File) -> set[str]:
    links = _LINK.findall(file.content_string)
    return {path for _, link in links if (path := _resolve(file, link)) is not None}


def _resolve(file: File, link: str) -> str | None:
    """The path in the repository of the file that ``link`` names; None if there is no such file."""
    assert file.abs_src_path is not None
    path = Path(os.path.normpath(Path(file.abs_src_path).parent / link))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) and path.is_file() else None


def _help(command: click.Command, parent: click.Context | None, name: str) -> Iterator[str]:
    """A section with the output of ``--help`` for ``command`` and for each of its subcommands."""
    context = click.Context(
        command, parent=parent, info_name=name, terminal_width=HELP_WIDTH, help_option_names=["-h", "--help"]
    )
    level = "#" * min(2 + context.command_path.count(" "), 3)
    yield f"{level} {context.command_path} {{ data-toc-label='{name}' }}\n\n```text\n{command.get_help(context)}\n```"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from _help(found, context, child)
