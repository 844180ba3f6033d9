"""`layerlab …`: the command line."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import click

from layerlab.base.errors import Diverged, LayerlabError, LayerlabWarning, refusal
from layerlab.base.screen import printable, visible
from layerlab.cli import completion
from layerlab.cli.batches import NOTHING_INSTALLED, batch, reproduce, table
from layerlab.cli.own import pays
from layerlab.cli.servers import lab, ui
from layerlab.cli.showing import show, shows, wants_json
from layerlab.cli.values import pairs
from layerlab.show.table import Cell, Table, Tone

FORMS = ("text", "markdown", "html", "csv", "latex", "json")


class _WholeHelp(click.Group):
    """Lists its commands with their whole first sentences; click cuts them to a line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.get_short_help_str(limit=1000)) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class _Group(_WholeHelp):
    """Bad input ends with one sentence on standard error and exit status 2, a training that diverged with 1.

    So does what the system refuses: a disk that is full, say.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except LayerlabError as error:
            _say_error(str(error))
            ctx.exit(1 if isinstance(error, Diverged) else 2)
        except OSError as error:
            refused = refusal(error)
            if not refused:
                raise
            _say_error(f"{refused}, and run the same command again.")
            ctx.exit(2)


def _say_error(sentence: str) -> None:
    click.echo(f"{click.style('Error:', fg='red')} {visible(sentence)}", err=True)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings as sentences, without the line of code that they come from."""
    if issubclass(category, LayerlabWarning):
        click.echo(f"{click.style('Warning:', fg='yellow')} {visible(str(message))}", err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="layerlab")
def main() -> None:
    """Check what papers on layer-wise efficient training claim, on your machine and your network."""


for _command in (reproduce, batch, table, pays, lab, ui):
    main.add_command(_command)


@main.command("list")
@shows
def list_() -> None:
    """List the installed strategies and their papers."""
    from layerlab.contract.catalogue import BROKEN, NO_PAPER, plugin_row
    from layerlab.contract.plugin_probe import import_errors
    from layerlab.contract.registry import strategies

    plugins = strategies.every()
    rows: list[list[str | Cell]] = []
    for plugin, broken in zip(plugins, import_errors(plugins), strict=True):
        name, owner, text = plugin_row(plugin, broken)
        tone: Tone = ""
        if text.startswith(BROKEN):
            tone = "bad"
        elif text.startswith(NO_PAPER):
            tone = "warning"
        rows.append([Cell(name, "strong"), owner, Cell(text, tone)])
    if rows or wants_json():
        show(Table(("strategy", "installed by", "paper"), rows))
    else:
        click.echo(NOTHING_INSTALLED)


@main.command()
@click.argument("name", shell_complete=completion.strategy_names)
@shows
def describe(name: str) -> None:
    """Show a strategy: its paper, settings, profiles and claims."""
    from layerlab.contract.paper import load_paper, paper_table
    from layerlab.contract.plugin_probe import settings_of
    from layerlab.contract.registry import strategies

    plugin = strategies[name]
    known, paper = settings_of(plugin), load_paper(plugin)
    about = f"{paper.authors}. {paper.venue}, {paper.year}."
    settings = [[setting.name, setting.default, setting.meaning] for setting in known]
    profiles: list[list[str | Cell]] = []
    for profile, content in paper.profiles.items():
        profiles.append([Cell(profile, "strong"), content.description])
        profiles += [["", parameter, repr(value)] for parameter, value in content.parameters.items()]
    tables = [
        Table(("",), [[Cell(paper.title, "strong")], [about], [""], [paper.summary]]),
        Table(("setting", "default", "meaning"), settings, notes=() if settings else ("It has no settings.",)),
        Table(("profile", "parameter", "value"), profiles),
        replace(paper_table(paper), caption="", notes=()),
    ]
    notebook = f"Notebook: {paper.notebook_file}"
    if wants_json():
        tables[0] = replace(tables[0], notes=(notebook,))
    show(*tables)
    if not wants_json():
        # Whole, so that it can be copied.
        click.echo(f"\n{notebook}")


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]…", shell_complete=completion.strategy_names)
@click.option("--format", "form", type=click.Choice(FORMS), default="text", show_default=True,
              help="The form of the table; text, markdown and html list the runs, too.")
@click.option("--output", type=click.Path(path_type=Path), help="Write to a file.")
@shows
def scoreboard(names: tuple[str, ...], form: str, output: Path | None) -> None:
    """Show a sentence for each installed paper, and every claim with what was measured of it.

    It takes each profile's newest run in MLflow; of profiles that have none there, what results/ has published.

    csv, latex and json have a row for each run of a claim; in the other forms a claim is one line, with its runs beside
    each other.
    """
    from layerlab.base.files import write_atomically
    from layerlab.reporting.scoreboard import all_rows, board, collected, page, scoreboard_table

    if wants_json():
        form = "json"
    found = collected(names)
    if form == "html":
        text = page(found)
    elif form in ("markdown", "text"):
        # A file has no colours; click leaves them out of what goes there.
        text = board(found, form == "markdown", colour=not output) + "\n"
    else:
        text = getattr(scoreboard_table(all_rows(found)), form)() + "\n"
    if output:
        write_atomically(output, lambda stream: stream.write(text.encode()))
        click.echo(output)
    else:
        click.echo(text, nl=False)


@main.command()
@click.argument("first", metavar="RUN")
@click.argument("second", metavar="RUN")
@shows
def diff(first: str, second: str) -> None:
    """Show what differed between two runs of a paper, and which claims moved.

    RUN is an output folder, a published profile's folder, or the id of a result or of a run in MLflow.
    """
    from layerlab.reporting.diff import diff as tables

    show(*tables(first, second))


@main.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE…")
@shows
def import_(files: tuple[Path, ...]) -> None:
    """Bring runs made elsewhere into this workbook's MLflow: a copied mlflow.db, or a claims.json.

    What is left behind is listed, with the reason; the exit status is 1 if any of it belongs to the runs.
    """
    from layerlab.runs.tracking.import_runs import import_file

    lost, rows = False, []
    for file in files:
        found = import_file(file)
        left = +found.lost + found.ignored
        rows.append([str(file), *map(str, (found.new, found.files, found.nested, found.known)),
                     "; ".join(f"{count} × {text}" for text, count in left.items())])
        if not wants_json():
            click.echo(f"{printable(str(file))}: {found.new} run{'s' * (found.new != 1)} brought in, with "
                       f"{found.files} artifact{'s' * (found.files != 1)} and {found.nested} nested; {found.known} "
                       "here already")
            for text, count in left.items():
                click.echo(f"  left behind: {count} × {visible(text)}", err=text in found.lost)
        lost = lost or bool(+found.lost)
    if wants_json():
        show(Table(("file", "runs", "artifacts", "nested", "here already", "left behind"), rows))
    if lost:
        raise SystemExit(1)


@main.group(cls=_WholeHelp, invoke_without_command=True)
@click.option("--root", type=click.Path(path_type=Path), help="Where datasets lie (default: $LAYERLAB_DATA).")
@shows
@click.pass_context
def data(context: click.Context, root: Path | None) -> None:
    """List the known datasets and which of them are here, or check a folder of your own."""
    if context.invoked_subcommand is not None:
        return
    from layerlab.workload.places import DATASETS, available

    rows: list[list[str | Cell]] = []
    for name in DATASETS:
        place = available(name, root)
        mark = Cell("here", "good") if place else Cell("missing", "warning")
        rows.append([name, mark, str(place or "set LAYERLAB_DATA to the folder that holds it")])
    show(Table(("dataset", "", "where"), rows))


@data.command("check")
@click.argument("folder", type=click.Path(path_type=Path))
@shows
def check_data(folder: Path) -> None:
    """Look at every image of a FOLDER once: layout, class counts, and what is broken, doubled, turned or leaking.

    Ends with exit status 1 where an image cannot be used, is in two halves, or has two labels.
    """
    from layerlab.workload.inspection import inspect_images

    found = inspect_images(folder)
    said = ("The data are sound." if found.sound else
            "Before you train, mend what cannot be used, is in two halves or has two labels.")
    show(found.layout, found.classes, replace(found.table, notes=(*found.table.notes, "", said)))
    if not found.sound:
        raise SystemExit(1)


@main.command()
@shows
def doctor() -> None:
    """Show signs of health on one page, to paste into a report: versions, room, locks, leftovers, tracking, ports."""
    from layerlab.reporting.doctor import health

    show(health())


@main.command()
@click.argument("name", shell_complete=completion.strategy_names)
@click.option("-p", "settings", multiple=True, callback=pairs, metavar="KEY=VALUE",
              shell_complete=completion.settings, help="A setting of the strategy; values are YAML.")
@shows
def check(name: str, settings: dict[str, Any]) -> None:
    """Check an installed strategy against the contract, some seconds for each check, and its paper, notebook and card.

    Where all checks hold, the last line is a badge for the plugin's README.md.
    """
    from layerlab.contract.registry import strategies
    from layerlab.show.progress import Bar, Bars
    from layerlab.testing.checks import CHECKS
    from layerlab.testing.kit import check_strategy
    from layerlab.testing.plugin_checks import PLUGIN_CHECKS, badge, check_plugin
    from layerlab.training.watch import VARIABLE

    # A hook that never comes back fails its check, and the checks are small.
    os.environ.setdefault(VARIABLE, "120")
    strategy = strategies(name, **settings)
    results: list[dict[str, Any]] = []
    whole = False
    bars = Bars()

    def tell(result: dict[str, Any]) -> None:
        results.append(result)
        share = len(results) / (len(CHECKS) + len(PLUGIN_CHECKS))
        bars.show({"": Bar("checks", share, f"{result['check_name']} is done")})

    try:
        check_plugin(name, tell)
        check_strategy(strategy, on_fail=None, callback=tell)
        whole = True
    finally:
        bars.close()
        failed = sum(result["status"] == "failed" for result in results)
        said = ([f"{len(results) - failed} of {len(results)} checks hold."] if failed else
                ["The contract holds. For the plugin's README.md:", badge(results)])
        # Where the checks were broken off, the last word is the error's.
        show(Table(("result", "check", "finding"), [_check_row(result) for result in results],
                   notes=said if whole else ()))
    if failed:
        raise SystemExit(1)


def _check_row(result: dict[str, Any]) -> list[str | Cell]:
    from layerlab.testing.kit import finding

    marks: dict[str, Cell] = {"passed": Cell("passed", "good"), "failed": Cell("FAILED", "bad"),
                              "xfail": Cell("known", "warning"), "skipped": Cell("skipped", "warning")}
    text = finding(result["exception"]) if result["exception"] else ""
    if result["status"] == "xfail":
        text = f"{result['expected_to_fail_reason']} ({text})"
    elif result["expected_to_fail"]:
        text = "is expected to fail and does not; take it off expected_failed_checks"
    return [marks[result["status"]], result["check_name"], text]


@main.command()
@click.argument("name", metavar="STRATEGY", shell_complete=completion.strategy_names)
@click.argument("network")
@click.option("--classes", type=click.IntRange(1), default=10, show_default=True, help="Logits of the network.")
@click.option("--size", type=click.IntRange(1), default=32, show_default=True, help="Side of the images, in pixels.")
@click.option("--channels", type=click.IntRange(1), default=3, show_default=True, help="Of the images.")
@click.option("-p", "settings", multiple=True, callback=pairs, metavar="KEY=VALUE",
              shell_complete=completion.settings, help="A setting of the strategy; values are YAML.")
@shows
def preflight(
    name: str, network: str, classes: int, size: int, channels: int, settings: dict[str, Any]
) -> None:
    """Show what a STRATEGY can do with a NETWORK, before any training.

    NETWORK is a name such as resnet18, or your own: file.py:function or module:function.
    """
    import torch

    from layerlab.contract.registry import strategies
    from layerlab.workload.builders import network_builder

    strategy = strategies(name, **settings)
    build = network_builder(network, classes, (channels, size, size))
    show(strategy.preflight(build(), torch.randn(2, channels, size, size)).table)


@main.command()
@click.argument("what", nargs=-1, metavar="[NAME|FOLDER]…")
@click.option("--to", "target", type=click.Path(path_type=Path), default=Path("results"), show_default=True,
              help="The folder of results.")
@click.option("--check", is_flag=True, help="Publish nothing; list what is kept that older code made.")
@shows
def publish(what: tuple[str, ...], target: Path, check: bool) -> None:
    """Keep finished runs among the results, one page a paper, and write the scoreboard of all of them.

    A NAME stands for a strategy's newest runs in MLflow, all profiles but quick; without any, all strategies are taken.
    A FOLDER is one that `layerlab reproduce` wrote. With --check the exit status is 1 where older code made something.
    """
    from layerlab.contract.paper import load_paper, readable_papers
    from layerlab.reporting.freshness import TODAY, kept_ages
    from layerlab.reporting.publish import publish as keep

    if not check:
        show(Table(("page written",), [[str(page)] for page in keep(what, target)]))
        return
    ages = kept_ages(target, [load_paper(name) for name in what] or readable_papers())
    older = [each for each in ages if each.state != TODAY]
    rows: list[list[str | Cell]] = []
    for each in ages:
        tone: Tone = "good" if each.state == TODAY else "warning"
        rows.append([each.paper, each.profile, Cell(each.state, tone), each.why])
    show(Table(("paper", "profile", "made by", "why"), rows,
               notes=[f"{len(older)} of {len(ages)} kept profiles wait for a new run."]))
    if older:
        raise SystemExit(1)


@main.command()
@click.argument("name")
@click.option("--title", default="", help="Of the paper; default: the name in words.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(), help="Where to put it (default: here).")
def new(name: str, title: str, folder: Path) -> None:
    """Write a plugin to start from, called NAME: it installs, runs and passes its tests as it stands."""
    from layerlab.cli.scaffold import new_plugin

    made = new_plugin(name, folder, title)
    click.echo(f"{made} is a plugin that works as it stands:\n"
               f"  pip install -e {made}            # then `layerlab list` shows it\n"
               f"  layerlab check {name}            # the contract\n"
               f"  layerlab reproduce {name}        # its notebook, at the quick profile\n"
               "What to replace by your method says so in its files; plugins/README.md goes through them.")
