"""The commands that run notebooks, and what is shown of them at the end."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerlab.base.errors import LayerlabError
from layerlab.base.files import write_atomically
from layerlab.base.screen import visible
from layerlab.cli import completion
from layerlab.cli.showing import show, shows, wants_json
from layerlab.cli.values import finite, pairs
from layerlab.show.table import Table

if TYPE_CHECKING:
    from layerlab.contract.claims import ClaimResult
    from layerlab.runs.batch.one_job import Outcome
    from layerlab.runs.jobs import Job

    Ended = tuple[Job, Outcome]

NOTHING_INSTALLED = "No strategies are installed; install a plugin with pip, such as a folder of plugins/."


def _batch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `reproduce` and `batch` have in common."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Show what would run, and how long it took last time."),
        click.option("--rerun", is_flag=True, help="Run what is finished, too."),
        click.option("--workers", type=click.IntRange(1), metavar="N",
                     help="Notebooks at once; default: as many as cores, memory and GPUs carry."),
        click.option("--time-limit", type=click.FloatRange(0, min_open=True), metavar="MINUTES", callback=finite,
                     help="For each notebook."),
        click.option("--retries", type=click.IntRange(0), metavar="N",
                     help="How often a notebook whose kernel died goes on (default: 2)."),
        click.option("--scheduler", metavar="ADDRESS", default="", help="Run on a Dask cluster: tcp://host:8786."),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]…", shell_complete=completion.notebooks_too)
@click.option("--profile", default="quick", show_default=True, help="One of the paper's run profiles.",
              shell_complete=completion.profiles)
@click.option("-p", "parameters", multiple=True, callback=pairs, metavar="KEY=VALUE",
              shell_complete=completion.parameters, help="A notebook parameter; values are YAML.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the results (one NAME only).")
@click.option("--cwd", default="", metavar="FOLDER", help="Run a notebook of your own in this folder (default: here).")
@click.option("--kernel", default="", metavar="NAME", help="Run a notebook of your own with this Jupyter kernel.")
@_batch_options
@shows
def reproduce(names: tuple[str, ...], profile: str, parameters: dict[str, Any], output: Path | None, cwd: str,
              kernel: str, **options: Any) -> None:
    """Run the notebooks of papers (all installed ones by default) and say in a sentence what each found.

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


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@_batch_options
@shows
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
    from layerlab.runs.batch.plans import jobs_of

    jobs = jobs_of(plan, beside, output)
    if dry_run:
        show(Table(("notebook", "what happens", "last time"),
                   [[job.label, status, last] for job, status, last in preview(jobs, rerun)]))
        return
    minutes = time_limit or plan.time_limit
    outcomes = run_batch(
        jobs, workers=workers or plan.workers, time_limit=minutes and 60 * minutes,
        retries=plan.retries if retries is None else retries, rerun=rerun, scheduler=scheduler,
    )
    ended = list(zip(jobs, outcomes, strict=True))
    unreadable = _show_ended(ended)
    failed = [each for each in ended if each[1].status in ("failed", "refused")] + unreadable
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


def _show_ended(ended: Sequence[Ended]) -> list[Ended]:
    """Show where the notebooks lie, their answers, the papers' sentences and how to go on; gives those that have ended
    and whose claims cannot be read."""
    from layerlab.reporting.answers import answers_data, answers_table
    from layerlab.reporting.scoreboard import scoreboard_table
    from layerlab.runs.batch.kept import batch_id
    from layerlab.runs.batch.one_job import Outcome
    from layerlab.runs.record import read_results

    done = [job for job, outcome in ended if outcome.status in ("finished", "done before")]
    results: list[tuple[Job, list[ClaimResult]]] = []
    unreadable = []
    for job in done:
        try:
            rows = read_results(Path(job.folder)) if job.strategy else []
            results.append((job, [row for row in rows if row.paper == job.strategy]))
        except LayerlabError as error:
            unreadable.append((job, Outcome("failed", str(error))))
    if wants_json():
        rows = [row for _, those in results for row in those]
        show(*([scoreboard_table(rows)] if rows else []), answers_data([job for job, _ in ended]), _outcomes(ended))
        return unreadable
    if done:
        click.echo()
        show(_files([each for each in ended if each[0] in done]))
    # Of papers as they are, the sentences are the answer.
    if any(job.differs or not job.strategy for job in done):
        click.echo()
        batch = batch_id([job for job, _ in ended if not job.problem])
        show(replace(answers_table(done), caption=f"Batch {batch}"))
    _show_papers([(job, rows) for job, rows in results if rows and not job.differs])
    return unreadable


def _show_papers(results: Sequence[tuple[Job, list[ClaimResult]]]) -> None:
    """Say in a sentence what each paper's runs found, draw all of them in one figure, and name what to type next."""
    if not results:
        return
    from layerlab.contract.paper import load_paper, readable_papers
    from layerlab.reporting.bottom_line import QUICK, bottom_line
    from layerlab.reporting.findings import outcome
    from layerlab.reporting.scoreboard import wrapped
    from layerlab.runs.record import workbook_folder

    width = shutil.get_terminal_size((80, 24)).columns
    runs: dict[str, dict[Path, list[ClaimResult]]] = {}
    for job, rows in results:
        runs.setdefault(job.strategy, {})[Path(job.folder)] = rows
    papers = [(load_paper(name), folders) for name, folders in runs.items()]
    click.echo()
    for paper, folders in papers:
        line = bottom_line(paper, [outcome(folder, rows) for folder, rows in folders.items()])
        click.echo(wrapped(line, width))
    if len(papers) > 1:
        # It brings pandas, which nobody who has one paper or none waits for.
        from layerlab.reporting.overview import QUICK_NOTE, keep_overview, overview

        quick = all(job.profile == QUICK for job, _ in results)
        folder = workbook_folder() / "runs"
        # All that are installed, so that each has its own colour.
        points = overview((paper, runs.get(paper.strategy, {})) for paper in readable_papers())
        file = keep_overview(folder, points, QUICK_NOTE if quick else "")
        click.echo(f"\nFigure of all papers: {os.path.relpath(file)}")
    # As it was called, where the shell would not find it otherwise.
    program = "layerlab" if shutil.which("layerlab") else os.path.relpath(sys.argv[0])
    first, (paper, _) = results[0][0], papers[0]
    longer = next((name for name in paper.profiles if name != QUICK), None)
    commands = {f"{program} scoreboard": "every claim, published beside measured"}
    if first.profile != QUICK:
        commands[f"{program} publish {os.path.relpath(first.folder)}"] = "its page, among the results"
    elif longer:
        commands[f"{program} reproduce {first.strategy} --profile {longer}"] = paper.profiles[longer].description
    commands[f"{program} pays resnet18 digits --budget 20min"] = "does any method pay for a network and data of yours?"
    click.echo("\nWhat to type next:")
    for command, about in commands.items():
        click.echo(f"  {command}")
        click.echo(textwrap.fill(about, width, initial_indent=" " * 6, subsequent_indent=" " * 6))


def _files(done: Sequence[Ended]) -> Table:
    """Where the notebooks lie that have come to their end."""
    before = [job for job, outcome in done if outcome.status == "done before"]
    rows = [[job.label, os.path.relpath(job.file),
             f"finished before; the same: {outcome.message}" if job in before else ""] for job, outcome in done]
    return Table(("notebook", "file", ""), rows,
                 notes=["--rerun runs again what was finished before."] if before else [])


def _outcomes(ended: Sequence[Ended]) -> Table:
    """How every notebook ended, for a program."""
    return Table(("notebook", "status", "file", "message", "again"), [
        [job.label, outcome.status, str(job.file) if job.folder else "", outcome.message, job.command]
        for job, outcome in ended])


@click.command()
@click.option("--batch", "wanted", default="", metavar="ID", shell_complete=completion.batch_ids,
              help="The batch, by its id or the beginning of it (default: the one that was started last).")
@click.option("--format", "form", type=click.Choice(("text", "markdown", "csv", "latex", "json", "html")),
              default="text", show_default=True,
              help="csv and json have every number in a column of its own; the others are to be read.")
@click.option("--output", type=click.Path(path_type=Path), help="Write to a file.")
@shows
def table(wanted: str, form: str, output: Path | None) -> None:
    """Show the answers of a batch: for each notebook what differs, what was gained and what it cost.

    Differences in points of top-1 and ratios are against the baseline, seed by seed, with 95 % intervals.
    """
    from layerlab.reporting.answers import answers_data, answers_table
    from layerlab.runs.batch.kept import read_batch

    batch, jobs = read_batch(wanted)
    if wants_json():
        form = "json"
    found = answers_data(jobs) if form in ("csv", "json") else answers_table(jobs)
    text = f"Batch {batch}\n{found.text(colour=not output)}" if form == "text" else getattr(found, form)()
    if output:
        write_atomically(output, lambda stream: stream.write(f"{text}\n".encode()))
        click.echo(output)
    else:
        click.echo(text)
