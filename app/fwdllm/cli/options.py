"""Command line options made from the settings of configuration classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

import typer

from fwdllm.cli.console import parse_layers
from fwdllm.engine.settings import Setting, settings_of, types_of

Command = TypeVar("Command", bound=Callable[..., Any])


def takes(*configs: type) -> Callable[[Command], Command]:
    """A decorator that gives a command an option for every setting of ``configs``.

    The command receives all of them in its ``**settings``, by the settings' names; an option that
    is not on the command line is None. ``given`` picks the settings of one configuration.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        before = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        at = next(i for i, p in enumerate(before) if p.kind is p.KEYWORD_ONLY)
        made = [_parameter(config, name) for config in configs for name in settings_of(config)]
        parameters = [*before[:at], *made, *before[at:]]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def given(config: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that were given on the command line."""
    found = {}
    for name in settings_of(config):
        value = settings[name]
        if value is not None:
            found[name] = _parsed(name, value) if types_of(config)[name][0] is tuple else value
    return found


def _parameter(config: type, name: str) -> inspect.Parameter:
    known, (kind, _) = settings_of(config)[name], types_of(config)[name]
    option = typer.Option(
        *(known.flags or [f"--{name.replace('_', '-')}"]),
        help=known.help,
        show_default=_shown(known, config, name),
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[(str if kind is tuple else kind) | None, option],
    )


def _shown(known: Setting, config: type, name: str) -> str | bool:
    if known.shown is not None:
        return known.shown
    default = getattr(config, name, None)
    if isinstance(default, float):
        return f"{default:g}"
    return str(default) if isinstance(default, (int, str)) and default is not False else False


def _parsed(name: str, text: str) -> Iterable[Any] | None:
    """A list as people write it: numbers of layers, or names."""
    return parse_layers(text) if name == "layers" else tuple(text.split(","))
