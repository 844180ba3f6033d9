"""Results that are kept: claims, figures and tables of finished runs, a folder and a page for each paper."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from layerlab.files import write_atomically, write_json
from layerlab.measure import versions_text
from layerlab.papers import load_paper
from layerlab.scoreboard import markdown_table, merged, scoreboard_markdown
from layerlab.study import RESULTS, read_record, read_results


def publish(runs: Sequence[Path], target: Path) -> list[Path]:
    """Keep finished runs under `target/<paper>/<profile>/` and write each paper's page anew.

    Args:
        runs: output folders of `layerlab reproduce`; a profile that is kept already is replaced.
        target: the folder of all results.

    Returns:
        The pages written.

    Raises:
        LayerlabError: a folder without a finished run (nothing is written then).
    """
    loaded = [(run, read_record(run), read_results(run)) for run in runs]
    papers = []
    for run, record, results in loaded:
        paper = results[0].paper
        folder = target / paper / record["profile"]
        shutil.rmtree(folder, ignore_errors=True)
        for part in ("figures", "tables"):
            if (run / part).is_dir():
                shutil.copytree(run / part, folder / part)
        write_json(folder / "parameters.json", record["parameters"])
        write_json(folder / RESULTS, [result.model_dump() for result in results])
        papers.append(paper)
    return [_page(target / paper) for paper in dict.fromkeys(papers)]


def _page(folder: Path) -> Path:
    """Write `README.md` and `claims.json` of a paper's folder."""
    results = merged(row for file in sorted(folder.glob(f"*/{RESULTS}")) for row in read_results(file.parent))
    paper = load_paper(results[0].paper)
    write_json(folder / RESULTS, [result.model_dump() for result in results])
    text = [f"# {paper.title}", f"{paper.authors}. {paper.venue}, {paper.year}.", paper.summary.strip(),
            "## Claims", scoreboard_markdown(results).strip()]
    for record in sorted(folder.glob(f"*/{RESULTS}")):
        profile = record.parent
        some = next((row for row in read_results(profile) if row.machine), None)
        parameters = json.loads((profile / "parameters.json").read_text())
        text += [f"## Profile `{profile.name}`", paper.profile(profile.name).description + "."]
        if some:
            text.append(f"Command: `layerlab reproduce {paper.strategy} --profile {profile.name}`. Machine: "
                        f"{some.machine}. Commit: `{some.commit}`. Versions: {versions_text(some.versions)}.")
        text.append("<details><summary>Parameters</summary>\n\n```json\n"
                    + json.dumps(parameters, indent=1, ensure_ascii=False) + "\n```\n</details>")
        for file in sorted(file for file in (profile / "tables").glob("*.csv") if file.read_text().strip()):
            text.append(f"### Table: {file.stem}\n\n" + _markdown(pd.read_csv(file)))
        for file in sorted((profile / "figures").glob("*.png")):
            text.append(f"![{file.stem}]({file.relative_to(folder).as_posix()})")
    page = folder / "README.md"
    write_atomically(page, lambda stream: stream.write(("\n\n".join(text) + "\n").encode()))
    return page


def _markdown(frame: pd.DataFrame) -> str:
    frame = frame.rename(columns=lambda name: "" if str(name).startswith("Unnamed") else str(name))
    frame = frame.loc[:, frame.notna().any()]

    def cell(value: object) -> object:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:.4g}"
        return value

    return markdown_table(list(frame.columns), [map(cell, row) for row in frame.itertuples(index=False)])
