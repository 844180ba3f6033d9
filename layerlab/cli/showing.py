"""How a command shows its tables: as text, or with `--json` as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from layerlab.show.table import Table

# Where a command's context keeps whether JSON is wanted; subcommands share it.
_JSON = "layerlab.json"


def shows(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that prints tables with `show` the option `--json`."""
    return takes_json("Print the tables as JSON: columns, rows, notes; a list where there are several.")(command)


def takes_json(help_text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option `--json`, for a command that asks `wants_json` itself."""
    return click.option("--json", is_flag=True, expose_value=False, callback=_remember, help=help_text)


def _remember(context: click.Context, _: click.Parameter, value: bool) -> None:
    # A group and its subcommand both have the flag; either will do.
    context.meta[_JSON] = context.meta.get(_JSON, False) or value


def wants_json() -> bool:
    """Whether the command at work was called with `--json`."""
    return bool(click.get_current_context().meta.get(_JSON))


def show(*tables: Table) -> None:
    """Print tables in the form that the command was asked for.

    As text they stand one below the other; click leaves the colours out where there is no terminal. As JSON a single
    one is an object as `Table.json` makes it, several are a list of such objects, so that standard output is one
    document in any case.
    """
    if not wants_json():
        for number, table in enumerate(tables):
            if number:
                click.echo()
            click.echo(table.text(colour=True))
        return
    texts = [table.json() for table in tables]
    click.echo(texts[0] if len(texts) == 1 else "[\n" + ",\n".join(texts) + "\n]")
