"""Results that are kept: claims, figures and tables of finished runs, a folder and a page for each paper, and over all
of them the scoreboard.

    results/README.md                      every claim of every paper
    results/<paper>/README.md              a page that reads by itself; claims.json: its rows
    results/<paper>/<profile>/             claims.json, parameters.json, manifest.json, tables/, figures/,
                                           and digests.json: what all of these were when they were published together
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from layerlab.base.errors import LayerlabError, LayerlabWarning
from layerlab.base.files import write_atomically, write_json
from layerlab.contract.claims import ClaimResult
from layerlab.contract.paper import load_paper, readable_papers
from layerlab.contract.rows import merged
from layerlab.reporting.pages import kept_profiles, paper_page, scoreboard_page, with_papers
from layerlab.runs import tracking
from layerlab.runs.manifest import read_manifest
from layerlab.runs.record import MANIFEST, PARAMETERS, PARTS, RESULTS, read_results

DIGESTS = "digests.json"
# Of a run at this profile no more is said than that the notebook runs.
UNPUBLISHED = "quick"


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
    from layerlab.contract.registry import strategies

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
            read_manifest(folder)
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
        for name in (PARAMETERS, MANIFEST):
            write_json(new / name, json.loads((run / name).read_text()))
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


def _write_pages(target: Path) -> list[Path]:
    """Write each paper's page and rows, the page of all papers, and the table in the README beside `target`, from what
    is kept; gives the pages."""
    written = []

    def write(page: Path, text: str) -> None:
        write_atomically(page, lambda stream: stream.write(text.encode()))
        written.append(page)

    for paper in readable_papers():
        folder = target / paper.strategy
        if profiles := kept_profiles(folder, paper):
            write_json(folder / RESULTS, [row.model_dump() for row in merged(chain.from_iterable(profiles.values()))])
            write(folder / "README.md", paper_page(folder, paper))
    write(target / "README.md", scoreboard_page(target))
    readme = target.resolve().parent / "README.md"
    if readme.exists() and (new := with_papers(readme.read_text(encoding="utf-8"), target)) is not None:
        write(readme, new)
    return written
