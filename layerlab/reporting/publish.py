"""Results that are kept: claims, figures and tables of finished runs, a folder and a page for each paper, and over all
of them the scoreboard.

    results/README.md                      a sentence for every paper, and every claim
    results/overview.png                   the figure of all papers; overview.csv: its numbers
    results/<paper>/README.md              a page that reads by itself; claims.json: its rows
    results/<paper>/<profile>/             claims.json, parameters.json, identity.json, manifest.json, tables/,
                                           figures/, answers.json where arms were compared; digests.json: what all of
                                           these were when they were published together

A run's folder may come from anybody: no link in it is followed. Nothing is replaced or deleted that was not written
here: a page is known by its first line, a profile's folder by the files that its digests.json lists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from layerlab.base.errors import LayerlabError, LayerlabWarning
from layerlab.base.files import is_plain, plain_file, swap, write_atomically, write_json
from layerlab.base.folder_lock import folder_lock
from layerlab.contract.claims import ClaimResult, placeholders
from layerlab.contract.paper import load_paper, readable_papers
from layerlab.contract.rows import merged
from layerlab.reporting.findings import run_answers
from layerlab.reporting.freshness import check_age
from layerlab.reporting.kept import kept_profiles, run_rows
from layerlab.reporting.overview import OVERVIEW, keep_overview, overview
from layerlab.reporting.pages import MARK, paper_page, run_part, scoreboard_page, with_results
from layerlab.runs import tracking
from layerlab.runs.answer import ANSWERS_FILE
from layerlab.runs.manifest import read_manifest
from layerlab.runs.record import (
    IDENTITY,
    MANIFEST,
    PARAMETERS,
    RESULTS,
    read_object,
    read_parameters,
    read_results,
)

DIGESTS = "digests.json"
# Of a run at this profile no more is said than that the notebook runs.
UNPUBLISHED = "quick"
# Where a profile's new folder is put together, beside its place.
UNFINISHED = ".new-"


def publish(what: Sequence[str | Path], target: Path) -> list[Path]:
    """Keep finished runs under `target/<paper>/<profile>/`, and write the pages of all that is kept anew.

    A README.md beside `target` gets the papers' sentences between the marks of `SUMMARY`, and the figure of all papers
    between those of `PICTURE`.

    Args:
        what: names of strategies, whose newest finished runs are taken from MLflow, all profiles but `quick`; none:
            every installed strategy of which there are such runs. A profile that is kept already is replaced. Or output
            folders of `layerlab reproduce`, and ids of results or of MLflow's runs: what is asked for so is kept with
            whatever parameters, in a folder of its own where they are not the profile's.
        target: the folder of all results.

    Returns:
        The pages written.

    Raises:
        LayerlabError: a folder without a finished run, or with links in the place of files; an unknown strategy, one
            without such runs in MLflow; a run that other code made than its plugin has today; something in `target`
            that would be replaced and was not written here. Nothing is written then.
    """
    from layerlab.contract.registry import strategies

    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(each) for each in what if Path(each).is_dir() or str(each) not in strategies]
        names = [str(each) for each in what if Path(each) not in folders]
        folders = [each if each.is_dir() else _asked_for(str(each), Path(temporary)) for each in folders]
        loaded = [(folder, _read(folder)) for folder in folders]
        for name in names or ([] if what else [paper.strategy for paper in readable_papers()]):
            found = list(_from_mlflow(name, Path(temporary) / name, bool(names)))
            if not found and names:
                raise LayerlabError(
                    f"MLflow holds no finished run of {name!r} beyond `{UNPUBLISHED}`; run `layerlab reproduce {name} "
                    "--profile cpu` first."
                )
            loaded += found
        for folder, results in loaded:
            _check_run(folder, results)
        papers = {results[0].paper for _, results in loaded}
        for place in _places(target, papers):
            _check_place(place, target)
        for _, results in loaded:
            _check_profile(_place(results, target), target)
        for folder, results in loaded:
            _keep(folder, results, _place(results, target))
    return _write_pages(target)


def _read(folder: Path) -> list[ClaimResult]:
    """The rows of a run's folder, which may come from anybody.

    Raises:
        LayerlabError: there are none; a link or a pipe, say, in the place of a file that is read.
    """
    for name in (RESULTS, PARAMETERS, MANIFEST, IDENTITY):
        if (folder / name).is_symlink() or (folder / name).exists():
            plain_file(folder, name)
    rows = read_results(folder)
    return run_rows(folder, load_paper(rows[0].paper)) if rows else []


def _place(results: Sequence[ClaimResult], target: Path) -> Path:
    """Where a run is kept: its profile's folder, or one of its own where its parameters are not the profile's."""
    first = results[0]
    name = first.profile
    if other := next((row for row in results if row.changed), None):
        text = json.dumps(other.changed, sort_keys=True, default=str)
        name += f"-{other.result or hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
    return target / first.paper / name


def _from_mlflow(name: str, folder: Path, asked: bool) -> Iterator[tuple[Path, list[ClaimResult]]]:
    """The newest finished run of each profile of a paper with exactly the profile's parameters, in a folder like the
    one that the run itself wrote, with its claims. One that older code made is left out, unless the paper is `asked`
    for, so that it is refused."""
    paper = load_paper(name)
    seen = {UNPUBLISHED}
    for run in tracking.notebook_runs(name):
        profile = run.data.tags.get("profile", "")
        parameters = tracking.run_parameters(run)
        own = parameters is None or not paper.differing(profile, parameters)
        if profile in paper.profiles and profile not in seen and own:
            place = folder / run.info.run_id
            place.mkdir(parents=True)
            tracking.download(run.info.run_id, place)
            try:
                results = _read(place)
                if not asked:
                    check_age(place, paper, profile)
            except LayerlabError as error:
                warnings.warn(f"A run of {name} is left out: {error}", LayerlabWarning, stacklevel=3)
                continue
            # One of an older version notes its parameters in its folder alone.
            if results and not any(row.changed for row in results):
                seen.add(profile)
                yield place, results


def _asked_for(name: str, folder: Path) -> Path:
    """The artifacts of a run in MLflow that is asked for by its id or by its result's, whatever its parameters.

    Raises:
        LayerlabError: there is none.
    """
    run = tracking.find_notebook_run(name)
    if run is None:
        raise LayerlabError(f"{name} is no folder of a finished run, no strategy, and no id of a result or a run in "
                            "MLflow; `layerlab scoreboard` lists them.")
    place = folder / run.info.run_id
    place.mkdir(exist_ok=True)
    tracking.download(run.info.run_id, place)
    return place


def _check_run(folder: Path, results: Sequence[ClaimResult]) -> None:
    """Raises: LayerlabError: a folder that cannot be published, with what it lacks."""
    if not results:
        raise LayerlabError(f"{folder} holds a run without any claim; list some in its plugin's paper.toml.")
    first = results[0]
    if any((row.paper, row.profile) != (first.paper, first.profile) for row in results):
        raise LayerlabError(f"{folder / RESULTS} holds rows of several papers or profiles, which no run writes; "
                            "publish each run's own folder.")
    paper = load_paper(first.paper)
    paper.profile(first.profile)
    if found := placeholders(paper.model_dump(exclude={"folder"})):
        raise LayerlabError(f"The paper.toml of {first.paper} still holds placeholders ({', '.join(found[:3])}, …), so "
                            f"nothing of it is published; put the paper's own there, and see `layerlab check "
                            f"{first.paper}`.")
    if not (folder / PARAMETERS).exists():
        raise LayerlabError(f"{folder} lacks its {PARAMETERS}; run `layerlab reproduce` again, with --rerun.")
    read_parameters(folder)
    check_age(folder, paper, first.profile)
    for section in read_manifest(folder):
        for shown in section.shows:
            plain_file(folder, shown.file)


def _places(target: Path, papers: set[str]) -> Iterator[Path]:
    """Folders whose README.md and claims.json are written: of all results, and of each paper that is kept."""
    yield target
    for paper in readable_papers():
        folder = target / paper.strategy
        if paper.strategy in papers or next(folder.glob(f"[!.]*/{RESULTS}"), None):
            yield folder


def _check_place(folder: Path, target: Path) -> None:
    """Raises: LayerlabError: a page, or the rows or the figure beside it, that were not written here."""
    _check_below(folder, target)
    page = folder / "README.md"
    ours = is_plain(page) and page.read_bytes().startswith(MARK.encode())
    for name in ("README.md", RESULTS, f"{OVERVIEW}.png", f"{OVERVIEW}.csv"):
        place = folder / name
        if (place.exists() or place.is_symlink()) and not ours:
            raise LayerlabError(f"{place} would be replaced, and {page} does not begin with the line by which layerlab "
                                f"knows its pages ({MARK}); move it away, or choose another folder with --to.")


def _check_profile(folder: Path, target: Path) -> None:
    """Raises: LayerlabError: a file in a profile's folder that was not published there."""
    _check_below(folder, target)
    if not folder.exists():
        return
    listed: set[str] = set()
    if is_plain(folder / DIGESTS):
        # What is no list of digests is not ours.
        with contextlib.suppress(ValidationError):
            listed = {DIGESTS, *TypeAdapter(dict[str, str]).validate_json((folder / DIGESTS).read_bytes())}
    for root, folders, files in os.walk(folder):
        for name in [*files, *(each for each in folders if (Path(root) / each).is_symlink())]:
            other = (Path(root) / name).relative_to(folder).as_posix()
            if other not in listed:
                raise LayerlabError(f"{folder} holds {other}, which `layerlab publish` did not write there and would "
                                    "delete; move it away, or choose another folder with --to.")


def _check_below(folder: Path, target: Path) -> None:
    """Raises: LayerlabError: a link that leads out of the folder of results, or something that is no folder."""
    # As os sees it: pathlib's own gives up on a loop.
    real = Path(os.path.realpath(folder))
    if not real.is_relative_to(os.path.realpath(target)) or (real.exists() and not real.is_dir()):
        raise LayerlabError(f"{folder} leads to {real}, which is no folder below {target}; move it away, or choose "
                            "another folder with --to.")


def _without_folders(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity whose data are called by their names alone, without the folders of the machine that it ran on; its id
    is the same."""
    data: dict[str, Any] = {}
    noted = identity.get("data")
    for source, fingerprint in noted.items() if isinstance(noted, dict) else ():
        name = Path(source).name
        while name in data:
            name += " (another)"
        data[name] = fingerprint
    return identity | {"data": data}


def _keep(run: Path, results: Sequence[ClaimResult], folder: Path) -> None:
    """Put what is kept of a run into its place: a process killed at any moment leaves the old content or the new."""
    with _workplace(folder) as place:
        new = place / "new"
        sections = read_manifest(run)
        for shown in chain.from_iterable(section.shows for section in sections):
            (new / shown.file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plain_file(run, shown.file), new / shown.file, follow_symlinks=False)
        write_json(new / PARAMETERS, read_parameters(run))
        write_json(new / IDENTITY, _without_folders(read_object(run, IDENTITY)))
        if found := run_answers(run):
            write_json(new / ANSWERS_FILE, [each.model_dump(exclude={"page"}) for each in found])
        write_json(new / MANIFEST, [section.model_dump() for section in sections])
        write_json(new / RESULTS, [result.model_dump() for result in results])
        write_json(new / DIGESTS, digests(new))
        # What cannot be shown is found before anything is replaced.
        run_part(new, load_paper(results[0].paper), folder.name, results)
        try:
            swap(new, folder)
        except OSError:
            # There is none yet, or the system cannot exchange two folders; `_recover` sets right what a kill between
            # the two leaves.
            if folder.exists():
                folder.rename(place / "old")
            new.rename(folder)


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """An empty folder beside another one, for one process at a time; it is deleted in the end."""
    place = folder.with_name(f"{UNFINISHED}{folder.name}")
    place.mkdir(parents=True, exist_ok=True)
    with folder_lock(place):
        _recover(place, folder)
        try:
            yield place
        finally:
            _recover(place, folder)
            shutil.rmtree(place)


def _recover(place: Path, folder: Path) -> None:
    """Bring back what was on its way out, and clear away what was never finished."""
    if (place / "old").exists() and not folder.exists():
        (place / "old").rename(folder)
    for name in ("old", "new"):
        shutil.rmtree(place / name, ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """File → digest, of everything published in a profile's folder: whatever changes alone no longer agrees."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != DIGESTS)
    return {
        file.relative_to(folder).as_posix(): hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        for file in files
    }


def _write_pages(target: Path) -> list[Path]:
    """Write each paper's page and rows, the figure and the page of all papers, and their sentences in the README beside
    `target`, from what is kept; gives the pages."""
    written = []

    def write(page: Path, text: str) -> None:
        write_atomically(page, lambda stream: stream.write(text.encode()))
        written.append(page)

    kept = [(paper, kept_profiles(target / paper.strategy, paper)) for paper in readable_papers()]
    for paper, profiles in kept:
        folder = target / paper.strategy
        if profiles:
            # The page first: it says whose the rows beside it are.
            write(folder / "README.md", paper_page(folder, paper))
            write_json(folder / RESULTS, [row.model_dump() for row in merged(chain.from_iterable(profiles.values()))])
        elif is_plain(folder / "README.md") and (folder / "README.md").read_bytes().startswith(MARK.encode()):
            # Of the last profile that was kept, which somebody has removed.
            for name in ("README.md", RESULTS):
                (folder / name).unlink(missing_ok=True)
    keep_overview(target, overview(kept))
    write(target / "README.md", scoreboard_page(target))
    readme = target.resolve().parent / "README.md"
    if readme.exists() and (new := with_results(readme.read_text(encoding="utf-8"), target)) is not None:
        write(readme, new)
    return written
