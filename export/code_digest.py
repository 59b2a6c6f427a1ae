"""Digests of the code that writes graphs and plans: parts of the keys under which both are reused.

Comments, docstrings and layout do not count: the digest is that of the syntax tree, written out again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import svd_trt.engine.spec

__all__ = ["GRAPH_CODE", "PLAN_CODE", "digest_of", "graph_code_digest", "plan_code_digest"]

_EXPORT = Path(__file__).parent
_ENGINE = Path(svd_trt.engine.spec.__file__).parent

GRAPH_CODE = (
    _ENGINE / "spec.py",
    _EXPORT / "denoiser.py",
    _EXPORT / "export_process.py",
    _EXPORT / "folder.py",
    _EXPORT / "networks.py",
    _EXPORT / "onnx_export.py",
    _EXPORT / "presets.py",
    _EXPORT / "random_checkpoint.py",
    _EXPORT / "shallow.py",
    _EXPORT / "single_file.py",
    _EXPORT / "stability_names.py",
    _EXPORT / "tensor_files.py",
    *sorted((_EXPORT / "rewrites").glob("*.py")),
)
"""The modules that decide which weights are loaded and which graph is written for a `svd_trt.export.recipe.Recipe`."""

PLAN_CODE = tuple(
    _ENGINE / f"{name}.py"
    for name in (
        "builder_log",
        "builder_messages",
        "kernel_kinds",
        "kernel_shapes",
        "kernels",
        "profiles",
        "size_expressions",
        "spec",
        "tensorrt_build",
    )
)
"""The modules that decide how an engine is built from a graph, and what its list of kernels says."""


@functools.cache
def graph_code_digest() -> str:
    """The digest of `GRAPH_CODE`."""
    return digest_of(GRAPH_CODE)


@functools.cache
def plan_code_digest() -> str:
    """The digest of `PLAN_CODE`."""
    return digest_of(PLAN_CODE)


def digest_of(paths: Iterable[Path]) -> str:
    """A digest of Python files that depends on their names and on what they do, not on comments and docstrings."""
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.name}\0{_without_docstrings(path.read_text('utf-8'))}\0".encode())
    return total.hexdigest()


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return ast.unparse(tree)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
