"""`layerlab …`: the command line."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import click

from layerlab.base.errors import LayerlabError, LayerlabWarning

NOTHING_INSTALLED = "No strategies are installed; install a plugin with pip, such as a folder of plugins/."


class _Group(click.Group):
    """Bad input ends with one sentence on standard error and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except LayerlabError as error:
            click.echo(f"{click.style('Error:', fg='red')} {error}", err=True)
            ctx.exit(2)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings as sentences, without the line of code that they come from."""
    if issubclass(category, LayerlabWarning):
        click.echo(f"{click.style('Warning:', fg='yellow')} {message}", err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


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
    rows = [plugin_row(plugin, broken) for plugin, broken in zip(plugins, import_errors(plugins), strict=True)]
    if not rows:
        click.echo(NOTHING_INSTALLED)
        return
    sizes = [max(len(row[i]) for row in rows) for i in (0, 1)]
    for name, owner, text in rows:
        if text.startswith((BROKEN, NO_PAPER)):
            text = click.style(text, fg="red" if text.startswith(BROKEN) else "yellow")
        click.echo(f"{click.style(name.ljust(sizes[0]), bold=True)}  {owner.ljust(sizes[1])}  {text}")


@main.command()
@click.argument("name")
def describe(name: str) -> None:
    """Show a strategy: its paper, settings, profiles and claims."""
    from layerlab.contract.paper import load_paper
    from layerlab.contract.registry import strategies

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

    from layerlab.base.text import from_yaml

    parameters = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{value!r} is not of the form key=value, such as -p epochs=3.")
        try:
            parameters[name] = from_yaml(text)
        except yaml.YAMLError:
            parameters[name] = text
    return parameters


def _batch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `reproduce` and `batch` have in common."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Show what would run, and how long it took last time."),
        click.option("--rerun", is_flag=True, help="Run what is finished, too."),
        click.option("--workers", type=click.IntRange(1), metavar="N",
                     help="Notebooks at once; default: as many as cores, memory and GPUs carry."),
        click.option("--time-limit", type=click.FloatRange(0, min_open=True), metavar="MINUTES",
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
@_batch_options
def reproduce(names: tuple[str, ...], profile: str, parameters: dict[str, Any], output: Path | None,
              **options: Any) -> None:
    """Run the notebooks of papers (all installed ones by default) and print the scoreboard.

    NAME is an installed strategy, or the path of a notebook of your own.
    """
    from layerlab.contract.registry import strategies
    from layerlab.runs.batch.plans import ALL, Entry, Plan

    if not strategies and not names:
        raise LayerlabError(NOTHING_INSTALLED)
    if output and len(names) != 1:
        raise LayerlabError("--output takes the results of one paper; name just one.")
    entries = [
        Entry(notebook=name, parameters=parameters) if name.endswith(".ipynb")
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
        size = max(len(job.label) for job in jobs)
        for job, status, last in preview(jobs, float("inf") if rerun else 0.0):
            click.echo(f"{job.label.ljust(size)}  {status.ljust(11)}  {last}")
        return
    minutes = time_limit or plan.time_limit
    outcomes = run_batch(
        jobs, workers=workers or plan.workers, time_limit=minutes and 60 * minutes,
        retries=plan.retries if retries is None else retries, rerun=rerun, scheduler=scheduler,
    )
    # Not before: it imports pandas, for which the first kernel need not wait.
    from layerlab.reporting.scoreboard import scoreboard_text
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
        width = min(160, shutil.get_terminal_size((120, 24)).columns)
        click.echo("\n" + scoreboard_text(results, width))
    for job, outcome in done:
        again = ", finished before; --rerun runs it again" if outcome.status == "done before" else ""
        click.echo(f"{job.label}: {os.path.relpath(job.file)}{again}")
    failed = [(job, outcome) for job, outcome in ended if outcome.status in ("failed", "refused")] + unreadable
    stopped = [job for job, outcome in ended if outcome.status == "stopped"]
    if stopped:
        click.echo(f"\nStopped: {len(stopped)} of {len(jobs)} notebooks; the same command goes on.", err=True)
    for job, outcome in failed:
        how = "Failed:" if outcome.status == "failed" else "Error:"
        click.echo(f"{click.style(how, fg='red')} {outcome.message}\n  again: {job.command}", err=True)
    if failed or stopped:
        refused = all(outcome.status == "refused" for _, outcome in failed)
        raise SystemExit(130 if stopped else 2 if refused else 1)


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]…")
@click.option("--format", "form", type=click.Choice(["text", "markdown", "html"]), default="text", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write to a file.")
def scoreboard(names: tuple[str, ...], form: str, output: Path | None) -> None:
    """Show every claim of the installed papers with what MLflow holds of it."""
    from layerlab.base.files import write_atomically
    from layerlab.reporting.scoreboard import RUNS, collect, page, run_table, scoreboard_markdown, scoreboard_text
    from layerlab.show.table import markdown_table

    results = collect(names)
    runs = run_table(results)
    if form == "html":
        text = page(results, runs)
    elif form == "markdown":
        text = scoreboard_markdown(results) + "\n" + markdown_table(RUNS, runs.to_numpy()) + "\n"
    else:
        text = scoreboard_text(results, min(160, shutil.get_terminal_size((120, 24)).columns)) + "\n\n"
        text += "".join(f"{row.paper} {row.profile}: {row.machine}; commit {row.commit}\n  {row.run}\n"
                        for row in runs.itertuples())
    if output:
        write_atomically(output, lambda stream: stream.write(text.encode()))
        click.echo(output)
    else:
        click.echo(text, nl=False)


@main.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE…")
def import_(files: tuple[Path, ...]) -> None:
    """Bring runs made elsewhere into this workbook's MLflow: a copied mlflow.db, or a claims.json."""
    from layerlab.runs.tracking.import_runs import import_file

    for file in files:
        new, known = import_file(file)
        click.echo(f"{file}: {new} run{'s' * (new != 1)} brought in, {known} here already")


@main.command()
@click.option("--root", type=click.Path(path_type=Path), help="Where datasets lie (default: $LAYERLAB_DATA).")
def data(root: Path | None) -> None:
    """List the known datasets and which of them are here."""
    from layerlab.workload.loading import DATASETS, available

    for name in DATASETS:
        place = available(name, root)
        mark = click.style("here   ", fg="green") if place else click.style("missing", fg="yellow")
        click.echo(f"{name:14} {mark}  {place or 'set LAYERLAB_DATA to the folder that holds it'}")


@main.command()
@click.argument("name")
@click.option("-p", "settings", multiple=True, callback=_pairs, metavar="KEY=VALUE",
              help="A setting of the strategy; values are YAML.")
def check(name: str, settings: dict[str, Any]) -> None:
    """Check an installed strategy against the contract; some seconds for each check."""
    from layerlab.contract.registry import strategies
    from layerlab.testing.kit import check_strategy, finding

    marks = {"passed": ("passed ", "green"), "failed": ("FAILED ", "red"), "xfail": ("known  ", "yellow"),
             "skipped": ("skipped", "yellow")}

    def tell(result: dict[str, Any]) -> None:
        word, colour = marks[result["status"]]
        text = finding(result["exception"]) if result["exception"] else ""
        if result["status"] == "xfail":
            text = f"{result['expected_to_fail_reason']} ({text})"
        elif result["expected_to_fail"]:
            text = "is expected to fail and does not; take it off expected_failed_checks"
        click.echo(f"{click.style(word, fg=colour)}  {result['check_name']}" + (f": {text}" if text else ""))

    results = check_strategy(strategies(name, **settings), on_fail=None, callback=tell)
    failed = sum(result["status"] == "failed" for result in results)
    click.echo(f"{len(results) - failed} of {len(results)} checks hold." if failed else "The contract holds.")
    if failed:
        raise SystemExit(1)


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

    for page in keep(what, target):
        click.echo(page)


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
