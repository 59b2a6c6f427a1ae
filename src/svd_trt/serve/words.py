"""Messages of the runtime, which speak of options of the command line, in the words of an API."""

from __future__ import annotations

import re

from svd_trt.runtime.parameters import Parameters

__all__ = ["api_words"]

_IN_PYTHON = re.compile(r" \(((?:[a-z_]+='[^']*'(?:, )?)+) in Python\)")
_PAIR = re.compile(r"([a-z_]+)='([^']*)'")
_TWICE = re.compile(r" \(--[a-z-]+\)")  # "extend=3 (--extend)"
_OPTION = re.compile(r"(?<!another )--([a-z]+(?:-[a-z]+)*-?)")


def api_words(text: str) -> str:
    """``text`` with arguments in place of options: ``--resize-mode crop`` becomes ``resize_mode=crop``.

    Options that are no argument of a video, and those of "another --height", are of the build, and stay as they are.
    """
    for found in _IN_PYTHON.finditer(text):
        for name, value in _PAIR.findall(found[1]):
            text = text.replace(f"{_spelt(name)} {value}", f"{name}={value}")
    return _OPTION.sub(_named, _TWICE.sub("", _IN_PYTHON.sub("", text)))


def _spelt(name: str) -> str:
    return "--" + name.replace("_", "-")


def _named(option: re.Match[str]) -> str:
    """The argument of an option; also of the first half of ``--min- to --max-guidance-scale``."""
    name = option[1].replace("-", "_")
    known = any(each == name or (name.endswith("_") and each.startswith(name)) for each in Parameters.fields())
    return name if known else option[0]
