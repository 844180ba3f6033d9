"""What the shell offers when Tab is pressed: names, profiles and parameters. None of it imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from layerlab.base.errors import LayerlabError


def _begins(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def strategy_names(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Installed strategies."""
    from layerlab.contract.registry import strategies

    return _begins(strategies, incomplete)


def notebooks_too(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Installed strategies, and files: a notebook of one's own is named by its path."""
    return [*strategy_names(context, parameter, incomplete), CompletionItem(incomplete, type="file")]


def dataset_names(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Known datasets, and folders."""
    from layerlab.workload.places import DATASETS

    return [*_begins(DATASETS, incomplete), CompletionItem(incomplete, type="dir")]


def batch_ids(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Batches of this workbook, the newest first."""
    from layerlab.runs.batch.kept import kept_batches

    return _begins(kept_batches(), incomplete)


def _named(context: click.Context) -> list[str]:
    """The strategies or notebooks that the command line names so far."""
    given = context.params.get("names") or context.params.get("name") or ()
    # An option that has no value yet leaves the words before it unread.
    return [*([given] if isinstance(given, str) else given), *context.args]


def profiles(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Profiles of the papers that are named, or of all."""
    from layerlab.contract.paper import load_paper
    from layerlab.contract.registry import strategies

    found: dict[str, None] = {}
    for name in _named(context) or list(strategies):
        with contextlib.suppress(LayerlabError):
            found |= dict.fromkeys(load_paper(name).profiles)
    return _begins(found, incomplete)


def parameters(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`KEY=` of the parameters of the notebook that is named."""
    from layerlab.contract.paper import load_paper
    from layerlab.runs.notebook_file import parameter_names, read_notebook

    found: dict[str, None] = {}
    for name in _named(context):
        with contextlib.suppress(LayerlabError):
            if name.endswith(".ipynb"):
                names = parameter_names(read_notebook(Path(name)))
            else:
                profile = context.params.get("profile") or "quick"
                names = list(load_paper(name).profile(profile).parameters)
            found |= dict.fromkeys(f"{each}=" for each in names)
    return _begins(found, incomplete)


def settings(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`KEY=` of the settings of the strategy that is named."""
    from layerlab.contract.plugin_probe import settings_of
    from layerlab.contract.registry import strategies

    found: list[str] = []
    for name in _named(context):
        with contextlib.suppress(LayerlabError):
            found += [f"{setting.name}=" for setting in settings_of(strategies[name])]
    return _begins(found, incomplete)
