"""Values of options: parameters as KEY=VALUE, times."""

from __future__ import annotations

import math
import re
from typing import Any

import click


def pairs(_: Any, __: Any, values: tuple[str, ...]) -> dict[str, Any]:
    """`-p KEY=VALUE` given any number of times, as a dict; values are YAML.

    Raises:
        click.BadParameter: no such form, or a key twice.
    """
    from layerlab.base.text import NoYaml, from_yaml

    parameters: dict[str, Any] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{value!r} is not of the form key=value, such as -p epochs=3.")
        if name in parameters:
            raise click.BadParameter(f"{name!r} is given twice; keep one of them.")
        try:
            parameters[name] = from_yaml(text, f"Parameter {name!r}")
        except NoYaml:
            parameters[name] = text
    return parameters


def finite(_: Any, __: Any, value: float | None) -> float | None:
    """A number of minutes; infinity and what is no number pass click's range.

    Raises:
        click.BadParameter: it is no time.
    """
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no time; give minutes, or leave it out for no limit.")
    return value


_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def duration(_: Any, __: Any, value: str) -> float:
    """A time such as `90s`, `20min` or `1.5h`, in seconds.

    Raises:
        click.BadParameter: it is no such text, or no time at all.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", value.lower())
    if not found or found[2] not in _UNITS or not 0 < float(found[1]) < math.inf:
        raise click.BadParameter(f"{value!r} is no time; write it as 90s, 20min or 1.5h.")
    return float(found[1]) * _UNITS[found[2]]
