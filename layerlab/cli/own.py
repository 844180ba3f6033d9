"""The command for one's own network and data: does any method pay?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from layerlab.base.errors import LayerlabError, unknown
from layerlab.cli import completion
from layerlab.cli.showing import takes_json, wants_json
from layerlab.cli.values import duration, pairs

# What `-p` takes: a field of `Question` → the kinds of its values.
_KINDS: Mapping[str, tuple[type, ...]] = {
    "settings": (dict,), "combinations": (list,), "tolerance": (int, float), "equal": (str,), "validation": (int,),
    "network_options": (dict,), "image_size": (int,), "channels": (int,), "limit": (int,), "augment": (str,),
    "batch_size": (int,),
}


def _parameters(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(f"{name}=") for name in _KINDS if name.startswith(incomplete)]


def _check(parameters: Mapping[str, Any]) -> None:
    """Raises LayerlabError for a parameter that `pays` does not have, or of another kind."""
    for name, value in parameters.items():
        if name not in _KINDS:
            raise unknown("parameter of pays", name, _KINDS)
        if not isinstance(value, _KINDS[name]) or isinstance(value, bool):
            kinds = " or ".join({"dict": "a mapping", "list": "a list", "str": "a text"}.get(kind.__name__, "a number")
                                for kind in _KINDS[name][-1:])
            raise LayerlabError(f"{name} should be {kinds}, got {value!r}.")
        if isinstance(value, int | float) and value <= 0:
            raise LayerlabError(f"{name} should be above 0, got {value!r}.")
    if parameters.get("equal", "flops") not in ("flops", "seconds"):
        raise LayerlabError(f"equal should be flops or seconds, got {parameters['equal']!r}.")


@click.command()
@click.argument("network")
@click.argument("data", shell_complete=completion.dataset_names)
@click.option("--budget", default="20min", show_default=True, callback=duration, metavar="TIME",
              help="How long it may take: 90s, 20min or 1.5h.")
@click.option("-s", "--strategy", "strategies", multiple=True, metavar="NAME",
              shell_complete=completion.strategy_names,
              help="A strategy to try; give it again for several (default: all that are installed).")
@click.option("-p", "parameters", multiple=True, callback=pairs, metavar="KEY=VALUE", shell_complete=_parameters,
              help=f"Any of {', '.join(_KINDS)}; values are YAML.")
@click.option("--output", default=None, metavar="FOLDER", help="Folder for the page (default: below runs/pays).")
@click.option("--rerun", is_flag=True, help="Find it out anew, even where it was finished before.")
@takes_json("Print the answer and the page's file as JSON.")
def pays(network: str, data: str, budget: float, strategies: tuple[str, ...], parameters: dict[str, Any],
         output: str | None, rerun: bool) -> None:
    """Tell whether any method pays for a NETWORK on DATA, within a budget, with one page at the end.

    NETWORK is a name such as resnet18, or your own: file.py:function or module:function. DATA is the name of a dataset
    or the path of a folder of images.

    On held-out training images it finds a rate at which the baseline trains, a sufficient length, and what each
    strategy costs. Those that can pay are compared with plain training of the same cost and with their placebos. Run
    the same command again after an interruption: it goes on.
    """
    _check(parameters)
    from layerlab.reporting.pays import ALL, Question, does_it_pay

    question = Question(network, data, budget, list(strategies) or ALL, output=output, **parameters)
    try:
        found = does_it_pay(question, _tell, rerun=rerun)
    except KeyboardInterrupt:
        click.echo("Stopped; the same command goes on.", err=True)
        raise SystemExit(130) from None
    if wants_json():
        click.echo(json.dumps({"answer": found.sentence, "page": str(found.page)}, ensure_ascii=False, indent=1))
        return
    click.echo(click.wrap_text(found.sentence, 80))
    click.echo(f"\n{_near(found.page)}")


def _tell(line: str) -> None:
    click.echo(click.wrap_text(line, 80, subsequent_indent=" " * 9), err=True)


def _near(page: Path) -> str:
    """A file by its path from here, if it lies below."""
    try:
        return str(page.relative_to(Path.cwd()))
    except ValueError:
        return str(page)
