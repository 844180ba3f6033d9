"""`layerlab …`: the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import layerlab
from layerlab.errors import LayerlabError


class _Group(click.Group):
    """Bad input ends with one sentence on standard error and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LayerlabError as error:
            click.echo(f"{click.style('Error:', fg='red')} {error}", err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(layerlab.__version__)
def main() -> None:
    """Check what papers on layer-wise efficient training claim, on your machine and your network."""


@main.command("list")
def list_() -> None:
    """List the installed strategies and their papers."""
    from layerlab import strategies
    from layerlab.papers import load_paper

    rows = []
    for plugin in strategies.every():
        reason = plugin.broken
        if not reason:
            try:
                paper = load_paper(plugin)
                text = f"{paper.title} ({paper.authors.split(',')[0]} et al., {paper.year})"
            except LayerlabError as error:
                text = click.style(f"no paper: {error}", fg="yellow")
        else:
            text = click.style(f"broken: {reason}", fg="red")
        rows.append((plugin.name, f"{plugin.distribution} {plugin.version}", text))
    if not rows:
        click.echo("No strategies are installed; install a plugin with pip, such as plugins/lars-skip.")
        return
    sizes = [max(len(row[i]) for row in rows) for i in (0, 1)]
    for name, owner, text in rows:
        click.echo(f"{click.style(name.ljust(sizes[0]), bold=True)}  {owner.ljust(sizes[1])}  {text}")


@main.command()
@click.argument("name")
def describe(name: str) -> None:
    """Show a strategy: its paper, settings, profiles and claims."""
    from layerlab import strategies
    from layerlab.papers import load_paper

    plugin = strategies[name]
    strategy, paper = plugin.load(), load_paper(plugin)
    bold: Callable[[str], str] = lambda text: click.style(text, bold=True)  # noqa: E731
    click.echo(f"{bold(paper.title)}\n{paper.authors}. {paper.venue}, {paper.year}.\n\n{paper.summary.strip()}\n")
    click.echo(bold("Settings"))
    for field, info in strategy.model_fields.items():
        click.echo(f"  {field} = {info.default!r}")
        click.echo(click.wrap_text(" ".join((info.description or "").split()), 96, "      ", "      "))
    click.echo(bold("\nProfiles"))
    for profile, content in paper.profiles.items():
        click.echo(f"  {profile}: {content.description}")
        for parameter, value in content.parameters.items():
            click.echo(f"      {parameter} = {value!r}")
    click.echo(bold("\nClaims"))
    for claim in paper.claims:
        click.echo(f"  {claim.id}: {claim.statement}: {claim.value:g} {claim.unit} ({claim.where})")
    click.echo(f"\n{bold('Notebook')}  {paper.notebook_file}")


def _pairs(_: Any, __: Any, values: tuple[str, ...]) -> dict[str, Any]:
    import yaml

    parameters = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{value!r} is not of the form key=value, such as -p epochs=3.")
        try:
            parameters[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            parameters[name] = text
    return parameters


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]…")
@click.option("--profile", default="quick", show_default=True, help="One of the paper's run profiles.")
@click.option("-p", "parameters", multiple=True, callback=_pairs, metavar="KEY=VALUE",
              help="A notebook parameter; values are YAML.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the results (one NAME only).")
def reproduce(names: tuple[str, ...], profile: str, parameters: dict[str, Any], output: Path | None) -> None:
    """Run the notebooks of papers (all installed ones by default) and print the scoreboard."""
    from tqdm import tqdm

    from layerlab import strategies
    from layerlab.notebooks import reproduce as run
    from layerlab.papers import scoreboard_text

    broken = {} if names else {plugin.name: plugin.broken for plugin in strategies.every() if plugin.broken}
    for name, reason in broken.items():
        click.echo(f"Left out: {name} is broken ({reason}).", err=True)
    chosen = list(names) or [name for name in strategies if name not in broken]
    if output and len(chosen) != 1:
        raise LayerlabError("--output takes the results of one paper; name just one.")
    if not chosen:
        raise LayerlabError("No strategies are installed; install a plugin with pip, such as plugins/lars-skip.")
    for name in chosen:
        strategies[name].load()
    results, problems = [], []
    with tqdm(total=len(chosen), desc="notebooks", unit="notebook", leave=False, disable=None) as bar:
        for name in chosen:
            try:
                results += run(name, profile, parameters, output, bar=1)
            except LayerlabError as error:
                if len(chosen) == 1:
                    raise
                problems.append(f"{name}: {error}")
            bar.update()
    click.echo("\n" + scoreboard_text(results, min(160, shutil.get_terminal_size((120, 24)).columns)))
    click.echo("\nTables, figures and the executed notebooks are in runs/; `make ui` compares the runs in MLflow.")
    if problems:
        raise LayerlabError(" ".join(problems))


@main.command()
@click.option("--root", type=click.Path(path_type=Path), help="Where datasets lie (default: $LAYERLAB_DATA).")
def data(root: Path | None) -> None:
    """List the known datasets and which of them are here."""
    from layerlab.data import DATASETS, available

    for name in DATASETS:
        place = available(name, root)
        mark = click.style("here   ", fg="green") if place else click.style("missing", fg="yellow")
        click.echo(f"{name:14} {mark}  {place or 'set LAYERLAB_DATA to the folder that holds it'}")


@main.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), required=True)
@click.option("--to", "target", type=click.Path(path_type=Path), default=Path("results"), show_default=True,
              help="The folder of results.")
def publish(runs: tuple[Path, ...], target: Path) -> None:
    """Copy finished runs (their folders) into the results that are kept, one page a paper."""
    from layerlab.results import publish as keep

    for page in keep(runs, target):
        click.echo(page)


if __name__ == "__main__":
    main()
