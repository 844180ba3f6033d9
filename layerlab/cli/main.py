"""`layerlab …`: the command line."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import click

from layerlab.base.errors import Diverged, LayerlabError, LayerlabWarning, refusal
from layerlab.base.screen import printable, visible
from layerlab.show.table import Cell, Table, Tone

FORMS = ("text", "markdown", "html", "csv", "latex", "json")
NOTHING_INSTALLED = "No strategies are installed; install a plugin with pip, such as a folder of plugins/."


class _Group(click.Group):
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


def _print(table: Table) -> None:
    """Print a table; click leaves the colours out where there is no terminal."""
    click.echo(table.text(colour=True))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="layerlab")
def main() -> None:
    """Check what papers on layer-wise efficient training claim, on your machine and your network."""


@main.command("list")
def list_() -> None:
    """List the installed strategies and their papers."""
    from layerlab.contract.catalogue import BROKEN, NO_PAPER, plugin_row
    from layerlab.contract.plugin_probe import import_errors
    from layerlab.contract.registry import strategies

    plugins = strategies.every()
    if not plugins:
        click.echo(NOTHING_INSTALLED)
        return
    rows: list[list[str | Cell]] = []
    for plugin, broken in zip(plugins, import_errors(plugins), strict=True):
        name, owner, text = plugin_row(plugin, broken)
        tone: Tone = ""
        if text.startswith(BROKEN):
            tone = "bad"
        elif text.startswith(NO_PAPER):
            tone = "warning"
        rows.append([Cell(name, "strong"), owner, Cell(text, tone)])
    _print(Table(("strategy", "installed by", "paper"), rows))


@main.command()
@click.argument("name")
def describe(name: str) -> None:
    """Show a strategy: its paper, settings, profiles and claims."""
    from layerlab.contract.paper import load_paper, paper_table
    from layerlab.contract.plugin_probe import settings_of
    from layerlab.contract.registry import strategies

    plugin = strategies[name]
    known, paper = settings_of(plugin), load_paper(plugin)
    about = f"{paper.authors}. {paper.venue}, {paper.year}."
    _print(Table(("",), [[Cell(paper.title, "strong")], [about], [""], [paper.summary]]))
    settings = [[setting.name, setting.default, setting.meaning] for setting in known]
    profiles: list[list[str | Cell]] = []
    for profile, content in paper.profiles.items():
        profiles.append([Cell(profile, "strong"), content.description])
        profiles += [["", parameter, repr(value)] for parameter, value in content.parameters.items()]
    for table in (
        Table(("setting", "default", "meaning"), settings, notes=() if settings else ("It has no settings.",)),
        Table(("profile", "parameter", "value"), profiles),
        replace(paper_table(paper), caption="", notes=()),
    ):
        click.echo()
        _print(table)
    # Whole, so that it can be copied.
    click.echo(f"\nNotebook: {paper.notebook_file}")


def _pairs(_: Any, __: Any, values: tuple[str, ...]) -> dict[str, Any]:
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


def _finite(_: Any, __: Any, value: float | None) -> float | None:
    """Infinity and what is no number pass click's range."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no time; give minutes, or leave it out for no limit.")
    return value


def _batch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `reproduce` and `batch` have in common."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Show what would run, and how long it took last time."),
        click.option("--rerun", is_flag=True, help="Run what is finished, too."),
        click.option("--workers", type=click.IntRange(1), metavar="N",
                     help="Notebooks at once; default: as many as cores, memory and GPUs carry."),
        click.option("--time-limit", type=click.FloatRange(0, min_open=True), metavar="MINUTES", callback=_finite,
                     help="For each notebook."),
        click.option("--retries", type=click.IntRange(0), metavar="N",
                     help="How often a notebook whose kernel died goes on (default: 2)."),
        click.option("--scheduler", metavar="ADDRESS", default="", help="Run on a Dask cluster: tcp://host:8786."),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]…")
@click.option("--profile", default="quick", show_default=True, help="One of the paper's run profiles.")
@click.option("-p", "parameters", multiple=True, callback=_pairs, metavar="KEY=VALUE",
              help="A notebook parameter; values are YAML.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the results (one NAME only).")
@click.option("--cwd", default="", metavar="FOLDER", help="Run a notebook of your own in this folder (default: here).")
@click.option("--kernel", default="", metavar="NAME", help="Run a notebook of your own with this Jupyter kernel.")
@_batch_options
def reproduce(names: tuple[str, ...], profile: str, parameters: dict[str, Any], output: Path | None, cwd: str,
              kernel: str, **options: Any) -> None:
    """Run the notebooks of papers (all installed ones by default) and print the scoreboard.

    NAME is an installed strategy, or the path of a notebook of your own.
    """
    from layerlab.contract.registry import strategies
    from layerlab.runs.batch.plans import ALL, Entry, Plan

    if not strategies and not names:
        raise LayerlabError(NOTHING_INSTALLED)
    if output and len(names) != 1:
        raise LayerlabError("--output takes the results of one paper; name just one.")
    if (cwd or kernel) and not all(name.endswith(".ipynb") for name in names or [ALL]):
        raise LayerlabError("--cwd and --kernel are for notebooks of your own; a paper's notebook needs neither.")
    entries = [
        Entry(notebook=name, parameters=parameters, cwd=cwd, kernel=kernel) if name.endswith(".ipynb")
        else Entry(paper=[name], profile=[profile], parameters=parameters)
        for name in names or [ALL]
    ]
    _run(Plan(jobs=entries), Path.cwd(), output, **options)


@main.command()
@click.argument("plan", type=click.Path(path_type=Path))
@_batch_options
def batch(plan: Path, **options: Any) -> None:
    """Run the notebooks that a PLAN (YAML) lists, several at once; what is finished is not run again."""
    from layerlab.runs.batch.plans import read_plan

    _run(read_plan(plan), plan.resolve().parent, None, **options)


def _run(
    plan: Any, beside: Path, output: Path | None, dry_run: bool, rerun: bool, workers: int | None,
    time_limit: float | None, retries: int | None, scheduler: str,
) -> None:
    """Run a plan; command-line options go before the plan's own. Ends with exit status 1 if anything failed, 2 if all
    that did was bad input, 130 if it was stopped."""
    from layerlab.runs.batch.local import preview, run_batch
    from layerlab.runs.batch.one_job import Outcome
    from layerlab.runs.batch.plans import jobs_of

    jobs = jobs_of(plan, beside, output)
    if dry_run:
        listed = [[job.label, status, last] for job, status, last in preview(jobs, rerun)]
        _print(Table(("notebook", "what happens", "last time"), listed))
        return
    minutes = time_limit or plan.time_limit
    outcomes = run_batch(
        jobs, workers=workers or plan.workers, time_limit=minutes and 60 * minutes,
        retries=plan.retries if retries is None else retries, rerun=rerun, scheduler=scheduler,
    )
    # Not before: it imports pandas, for which the first kernel need not wait.
    from layerlab.reporting.scoreboard import brief_table, sentences
    from layerlab.runs.record import read_results

    ended = list(zip(jobs, outcomes, strict=True))
    done = [(job, outcome) for job, outcome in ended if outcome.status in ("finished", "done before")]
    results, unreadable = [], []
    for job, _ in done:
        try:
            rows = read_results(Path(job.folder)) if job.strategy else []
            results += [row for row in rows if row.paper == job.strategy]
        except LayerlabError as error:
            unreadable.append((job, Outcome("failed", str(error))))
    if results:
        click.echo()
        _print(brief_table(results))
        click.echo()
        for line in sentences(results):
            click.echo(click.wrap_text(printable(line), 80, subsequent_indent="  "))
    if done:
        click.echo()
        _print(Table(("notebook", "file", ""), [[
            job.label, os.path.relpath(job.file),
            f"finished before; the same: {outcome.message}" if outcome.status == "done before" else "",
        ] for job, outcome in done], notes=["--rerun runs again what was finished before."] if any(
            outcome.status == "done before" for _, outcome in done) else []))
    failed = [(job, outcome) for job, outcome in ended if outcome.status in ("failed", "refused")] + unreadable
    stopped = [job for job, outcome in ended if outcome.status == "stopped"]
    if stopped:
        click.echo(f"\nStopped: {len(stopped)} of {len(jobs)} notebooks; the same command goes on.", err=True)
    for job, outcome in failed:
        how = "Failed:" if outcome.status == "failed" else "Error:"
        said = visible(f"{outcome.message}\n  again: {job.command}")
        click.echo(f"{click.style(how, fg='red')} {said}", err=True)
    if failed or stopped:
        refused = all(outcome.status == "refused" for _, outcome in failed)
        raise SystemExit(130 if stopped else 2 if refused else 1)


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]…")
@click.option("--format", "form", type=click.Choice(FORMS), default="text", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write to a file.")
def scoreboard(names: tuple[str, ...], form: str, output: Path | None) -> None:
    """Show every claim of the installed papers with what MLflow holds of it.

    The runs behind them follow in text, Markdown and HTML.
    """
    from layerlab.base.files import write_atomically
    from layerlab.reporting.scoreboard import collect, page, run_table, scoreboard_table

    results = collect(names)
    claims, runs = scoreboard_table(results), run_table(results)
    if form == "html":
        text = page(results)
    elif form == "markdown":
        text = f"{claims.markdown()}\n\n{runs.markdown()}\n"
    elif form == "text":
        # A file has no colours; click leaves them out of what goes there.
        text = f"{claims.text(colour=not output)}\n\n{runs.text(colour=not output)}\n"
    else:
        text = getattr(claims, form)() + "\n"
    if output:
        write_atomically(output, lambda stream: stream.write(text.encode()))
        click.echo(output)
    else:
        click.echo(text, nl=False)


@main.command()
@click.argument("first", metavar="RUN")
@click.argument("second", metavar="RUN")
def diff(first: str, second: str) -> None:
    """Show what differed between two runs of a paper, and which claims moved.

    RUN is an output folder, a published profile's folder, or the id of a result or of a run in MLflow.
    """
    from layerlab.reporting.diff import diff as tables

    for number, table in enumerate(tables(first, second)):
        if number:
            click.echo()
        _print(table)


@main.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE…")
def import_(files: tuple[Path, ...]) -> None:
    """Bring runs made elsewhere into this workbook's MLflow: a copied mlflow.db, or a claims.json.

    What is left behind is listed, with the reason; the exit status is 1 if any of it belongs to the runs.
    """
    from layerlab.runs.tracking.import_runs import import_file

    lost = False
    for file in files:
        found = import_file(file)
        click.echo(f"{printable(str(file))}: {found.new} run{'s' * (found.new != 1)} brought in, with {found.files} "
                   f"artifact{'s' * (found.files != 1)} and {found.nested} nested; {found.known} here already")
        for text, count in (+found.lost + found.ignored).items():
            click.echo(f"  left behind: {count} × {visible(text)}", err=text in found.lost)
        lost = lost or bool(+found.lost)
    if lost:
        raise SystemExit(1)


@main.group(invoke_without_command=True)
@click.option("--root", type=click.Path(path_type=Path), help="Where datasets lie (default: $LAYERLAB_DATA).")
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
    _print(Table(("dataset", "", "where"), rows))


@data.command("check")
@click.argument("folder", type=click.Path(path_type=Path))
def check_data(folder: Path) -> None:
    """Look at every image of a FOLDER once: layout, class counts, and what is broken, doubled, turned or leaking.

    Ends with exit status 1 where an image cannot be used, is in two halves, or has two labels.
    """
    from layerlab.workload.inspection import inspect_images

    found = inspect_images(folder)
    for table in (found.layout, found.classes, found.table):
        _print(table)
        click.echo()
    if not found.sound:
        click.echo("Before you train, mend what cannot be used, is in two halves or has two labels.")
        raise SystemExit(1)
    click.echo("The data are sound.")


@main.command()
def doctor() -> None:
    """Show signs of health on one page, to paste into a report: versions, room, locks, leftovers, tracking, ports."""
    from layerlab.reporting.doctor import health

    _print(health())


@main.command()
@click.argument("name")
@click.option("-p", "settings", multiple=True, callback=_pairs, metavar="KEY=VALUE",
              help="A setting of the strategy; values are YAML.")
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
    bars = Bars()

    def tell(result: dict[str, Any]) -> None:
        results.append(result)
        share = len(results) / (len(CHECKS) + len(PLUGIN_CHECKS))
        bars.show({"": Bar("checks", share, f"{result['check_name']} is done")})

    try:
        check_plugin(name, tell)
        check_strategy(strategy, on_fail=None, callback=tell)
    finally:
        bars.close()
        _print(Table(("result", "check", "finding"), [_check_row(result) for result in results]))
    failed = sum(result["status"] == "failed" for result in results)
    click.echo(f"{len(results) - failed} of {len(results)} checks hold." if failed else
               f"The contract holds. For the plugin's README.md:\n{badge(results)}")
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
@click.argument("name", metavar="STRATEGY")
@click.argument("network")
@click.option("--classes", type=click.IntRange(1), default=10, show_default=True, help="Logits of the network.")
@click.option("--size", type=click.IntRange(1), default=32, show_default=True, help="Side of the images, in pixels.")
@click.option("--channels", type=click.IntRange(1), default=3, show_default=True, help="Of the images.")
@click.option("-p", "settings", multiple=True, callback=_pairs, metavar="KEY=VALUE",
              help="A setting of the strategy; values are YAML.")
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
    click.echo(strategy.preflight(build(), torch.randn(2, channels, size, size)).table.text())


@main.command()
@click.argument("what", nargs=-1, metavar="[NAME|FOLDER]…")
@click.option("--to", "target", type=click.Path(path_type=Path), default=Path("results"), show_default=True,
              help="The folder of results.")
def publish(what: tuple[str, ...], target: Path) -> None:
    """Keep finished runs among the results, one page a paper, and write the scoreboard of all of them.

    A NAME stands for a strategy's newest runs in MLflow, all profiles but quick; without any, all strategies are taken.
    A FOLDER is one that `layerlab reproduce` wrote.
    """
    from layerlab.reporting.publish import publish as keep
    _print(Table(("page written",), [[str(page)] for page in keep(what, target)]))


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
