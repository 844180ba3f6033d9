"""Results that are kept: claims, figures and tables of finished runs, a folder and a page for each paper, and over all
of them the scoreboard.

    results/README.md                      every claim of every paper
    results/<paper>/README.md              a page that reads by itself; claims.json: its rows
    results/<paper>/<profile>/             claims.json, parameters.json, tables/, figures/, and
                                           digests.json: what all of these were when they were published together
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from layerlab import tracking
from layerlab.errors import LayerlabError, LayerlabWarning
from layerlab.files import write_atomically, write_json
from layerlab.measure import versions_text
from layerlab.papers import ClaimResult, Paper, Verdict, load_paper, readable_papers
from layerlab.parameters import reproduce_command
from layerlab.scoreboard import completed, counts, markdown_table, merged, scoreboard_markdown
from layerlab.study import PARAMETERS, PARTS, RESULTS, read_results

DIGESTS = "digests.json"
# Of a run at this profile no more is said than that the notebook runs.
UNPUBLISHED = "quick"
SUMMARY = ("<!-- papers -->", "<!-- /papers -->")


def publish(what: Sequence[str | Path], target: Path) -> list[Path]:
    """Keep finished runs under `target/<paper>/<profile>/`, and write the pages of all that is kept anew.

    A README.md beside `target` that holds the two marks of `SUMMARY` gets the table of papers between them.

    Args:
        what: output folders of `layerlab reproduce`, or names of strategies, whose newest finished runs are taken from
            MLflow, all profiles but `quick`; none: every installed strategy of which there are such runs. A profile
            that is kept already is replaced.
        target: the folder of all results.

    Returns:
        The pages written.

    Raises:
        LayerlabError: a folder without a finished run, an unknown strategy, one without such runs in MLflow (nothing is
            written then).
    """
    from layerlab import strategies

    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(each) for each in what if Path(each).is_dir() or str(each) not in strategies]
        names = [str(each) for each in what if Path(each) not in folders]
        loaded = [(folder, read_results(folder)) for folder in folders]
        for name in names or ([] if what else [paper.strategy for paper in readable_papers()]):
            found = list(_from_mlflow(name, Path(temporary) / name))
            if not found and names:
                raise LayerlabError(
                    f"MLflow holds no finished run of {name!r} beyond `{UNPUBLISHED}`; run `layerlab reproduce {name} "
                    "--profile cpu` first."
                )
            loaded += found
        for folder, results in loaded:
            if not results:
                raise LayerlabError(f"{folder} holds a run without any claim; list some in its plugin's paper.toml.")
            if not (folder / PARAMETERS).exists():
                raise LayerlabError(f"{folder} lacks its {PARAMETERS}; run `layerlab reproduce` again, with --rerun.")
        for folder, results in loaded:
            _keep(folder, results, target / results[0].paper / results[0].profile)
    return _write_pages(target)


def _from_mlflow(name: str, folder: Path) -> Iterator[tuple[Path, list[ClaimResult]]]:
    """The newest finished runs of a paper, each profile's in a folder like the one that the run itself wrote, with its
    claims."""
    paper = load_paper(name)
    seen = {UNPUBLISHED}
    for run in tracking.notebook_runs(name):
        profile = run.data.tags.get("profile", "")
        if profile in paper.profiles and profile not in seen:
            seen.add(profile)
            place = folder / profile
            place.mkdir(parents=True)
            tracking.client().download_artifacts(run.info.run_id, "", str(place))
            try:
                results = read_results(place)
            except LayerlabError as error:
                warnings.warn(f"A run of {name} is left out: {error}", LayerlabWarning, stacklevel=3)
                continue
            if results:
                yield place, results


def _keep(run: Path, results: Sequence[ClaimResult], folder: Path) -> None:
    """Put what is kept of a run into its place, all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        for part in PARTS:
            if (run / part).is_dir():
                shutil.copytree(run / part, new / part)
        write_json(new / PARAMETERS, json.loads((run / PARAMETERS).read_text()))
        paper = load_paper(results[0].paper)
        write_json(new / RESULTS, [paper.judged(result).model_dump() for result in results])
        write_json(new / DIGESTS, digests(new))
        with contextlib.suppress(FileNotFoundError):
            folder.rename(Path(temporary) / "old")
        new.rename(folder)


def digests(folder: Path) -> dict[str, str]:
    """File → digest, of everything published in a profile's folder: whatever changes alone no longer agrees."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != DIGESTS)
    return {
        file.relative_to(folder).as_posix(): hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        for file in files
    }


# ------------------------------------------------------------------------------------------- pages


def _write_pages(target: Path) -> list[Path]:
    """Write each paper's page and rows, the page of all papers, and the table in the README beside `target`, from what
    is kept; gives the pages."""
    written = []

    def write(page: Path, text: str) -> None:
        write_atomically(page, lambda stream: stream.write(text.encode()))
        written.append(page)

    for paper in readable_papers():
        folder = target / paper.strategy
        if profiles := _profiles(folder, paper):
            write_json(folder / RESULTS, [row.model_dump() for row in merged(chain.from_iterable(profiles.values()))])
            write(folder / "README.md", paper_page(folder, paper))
    write(target / "README.md", scoreboard_page(target))
    readme = target.resolve().parent / "README.md"
    if readme.exists() and (new := with_papers(readme.read_text(encoding="utf-8"), target)) is not None:
        write(readme, new)
    return written


def _profiles(folder: Path, paper: Paper) -> dict[Path, list[ClaimResult]]:
    """What is kept of a paper, by the folder of each profile, with the verdicts that the values have today."""
    return {
        file.parent: [paper.judged(row) for row in read_results(file.parent)]
        for file in sorted(folder.glob(f"*/{RESULTS}"))
    }


def kept(target: Path, paper: Paper) -> list[ClaimResult]:
    """A paper's claims in its order: what is kept of each, or a row that says `not run`.

    Raises:
        LayerlabError: what is kept cannot be read.
    """
    folder = target / paper.strategy
    return completed(paper, read_results(folder) if (folder / RESULTS).exists() else ())


def scoreboard_page(target: Path) -> str:
    """Every claim of every installed paper, in Markdown."""
    claims = [(paper, kept(target, paper)) for paper in readable_papers()]
    lines = [[f"[{paper.strategy}](#{paper.strategy})", *counts(rows).values()] for paper, rows in claims]
    about = (
        "Every claim of every paper, published beside measured, as `layerlab publish` takes it from the runs that "
        "MLflow holds. [README.md](../README.md#reproduce-a-paper) says what the verdicts mean; a measured value is "
        "the mean over seeds ± the half-width of its 95 % interval."
    )
    text = ["# Results", about, markdown_table(("paper", *get_args(Verdict)), lines)]
    for paper, rows in claims:
        text += [f"## {paper.strategy}", f"{paper.citation}."]
        if (target / paper.strategy / "README.md").exists():
            text[-1] += f" [Tables and figures]({paper.strategy}/README.md)."
        text.append(scoreboard_markdown(rows).strip())
    return "\n\n".join(text) + "\n"


def with_papers(readme: str, target: Path) -> str | None:
    """A README with the table of papers between its marks anew; None if it has none."""
    before, mark, rest = readme.partition(SUMMARY[0])
    _, end, after = rest.partition(SUMMARY[1])
    if not (mark and end):
        return None
    lines = []
    for paper in readable_papers():
        name, rows = paper.strategy, kept(target, paper)
        card = f"`{name}`"
        if (target.resolve().parent / "plugins" / name / "README.md").exists():
            card = f"[{card}](plugins/{name}/README.md)"
        text = f"{paper.short_authors}, *{paper.title}*, {paper.year}"
        page = target / name / "README.md"
        link = f"[claims and figures]({target.name}/{name}/README.md)" if page.exists() else "`quick` only"
        lines.append([card, text, *counts(rows).values(), link])
    table = markdown_table(("plugin", "paper", *get_args(Verdict), ""), lines)
    return f"{before}{mark}\n{table}\n{end}{after}"


def paper_page(folder: Path, paper: Paper) -> str:
    """A paper's claims, and the tables and figures of each profile that is kept in its folder, in Markdown."""
    profiles = _profiles(folder, paper)
    text = [f"# {paper.title}", f"{paper.authors}. {paper.venue}, {paper.year}.", paper.summary.strip(),
            "## Claims", scoreboard_markdown(merged(chain.from_iterable(profiles.values()))).strip()]
    for profile, rows in profiles.items():
        some = next((row for row in rows if row.machine), None)
        parameters = json.loads((profile / PARAMETERS).read_text())
        text += [f"## Profile `{profile.name}`", paper.profile(profile.name).description + "."]
        if some:
            text.append(f"Command: `{_command(paper, profile.name, parameters)}`. Machine: "
                        f"{some.machine}. Commit: `{some.commit}`. Versions: {versions_text(some.versions)}.")
        text.append("<details><summary>Parameters</summary>\n\n```json\n"
                    + json.dumps(parameters, indent=1, ensure_ascii=False) + "\n```\n</details>")
        for file in sorted(file for file in (profile / "tables").glob("*.csv") if file.read_text().strip()):
            text.append(f"### Table: {file.stem}\n\n" + _markdown(pd.read_csv(file)))
        for file in sorted((profile / "figures").glob("*.png")):
            text.append(f"![{file.stem}]({file.relative_to(folder).as_posix()})")
    return "\n\n".join(text) + "\n"


def _command(paper: Paper, profile: str, parameters: Mapping[str, Any]) -> str:
    usual = json.loads(json.dumps(paper.profile(profile).parameters))
    changed = {name: value for name, value in parameters.items() if name in usual and value != usual[name]}
    return reproduce_command(paper.strategy, profile, changed)


def _markdown(frame: pd.DataFrame) -> str:
    frame = frame.rename(columns=lambda name: "" if str(name).startswith("Unnamed") else str(name))
    frame = frame.loc[:, frame.notna().any()]

    def cell(value: object) -> object:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:.4g}"
        return value

    return markdown_table(list(frame.columns), [map(cell, row) for row in frame.itertuples(index=False)])
