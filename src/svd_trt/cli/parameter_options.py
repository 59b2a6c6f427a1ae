"""The options of a generation, one for every field of `Parameters`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from typing import Any, cast

import click

from svd_trt.runtime.parameters import Parameters
from svd_trt.units import shorten

__all__ = ["parameter_options", "parse_options"]


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """Numbers separated by commas."""

    name = "numbers"

    def __init__(self, example: str) -> None:
        self._example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{shorten(value)!r} is not a list of numbers such as {self._example}", param, ctx)


class _Choice(click.Choice):  # type: ignore[type-arg]  # generic from click 8.2 on
    """One of several words, which may be written with underscores."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value.replace("_", "-") if isinstance(value, str) else value, param, ctx)


class _Seeds(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """A seed, or several separated by commas."""

    name = "integers"

    def __init__(self, low: int, high: int) -> None:
        self._one = click.IntRange(low, high)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, ...]:
        if not isinstance(value, str):
            return cast("int | tuple[int, ...]", value)
        seeds = tuple(self._one.convert(cast("Any", part), param, ctx) for part in value.split(","))
        return seeds[0] if len(seeds) == 1 else seeds


def parameter_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every field of `Parameters`, with its default, limits and help."""
    for name, spec in reversed(list(Parameters.fields().items())):
        low, high = spec.metadata.get("min"), spec.metadata.get("max")
        kind: Any
        if "numbers" in spec.metadata:
            kind = _Numbers(spec.metadata["numbers"])
        elif name == "seed":
            kind = _Seeds(low, high)
        elif "choices" in spec.metadata:
            kind = _Choice(spec.metadata["choices"])
        elif "metavar" in spec.metadata:
            kind = click.STRING
        elif isinstance(spec.default, float):
            kind = click.FloatRange(low, high)
        else:
            kind = click.IntRange(low, high)
        flag = f"--{name.replace('_', '-')}"
        shown = spec.default is not None
        option = click.option(
            flag,
            name,
            type=kind,
            metavar=spec.metadata.get("metavar"),
            default=spec.default,
            show_default=shown,
            help=spec.metadata["help"],
        )
        function = option(function)
    return function


def parse_options(text: str, option: str, without: Collection[str] = ()) -> dict[str, Any]:
    """The arguments that ``text`` gives, such as ``--num-inference-steps 8 --sampler euler``.

    Args:
        text: options of ``svd-trt infer``, as in a shell.
        option: where it was given, for messages.
        without: names of `Parameters` that it may not give.

    Raises:
        UsageError: it is not such options, or no bundle takes their values.
    """
    command = parameter_options(click.command(option)(lambda **_: None))
    assert isinstance(command, click.Command)
    command.params = [parameter for parameter in command.params if parameter.name not in without]
    try:
        context = command.make_context(option, shlex.split(text))
        given = click.core.ParameterSource.COMMANDLINE
        found = {name: value for name, value in context.params.items() if context.get_parameter_source(name) == given}
        Parameters(**found)  # which checks the values, before the work
    except (ValueError, click.UsageError) as error:  # the first also of shlex and of `Parameters`
        message = error.format_message() if isinstance(error, click.UsageError) else str(error)
        raise click.UsageError(f"{option} {shorten(text)!r}: {message}") from error
    return found
