"""What a batch is to run: a plan, read from YAML and checked as a whole before anything starts."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from layerlab.base.errors import LayerlabError, sentence
from layerlab.base.text import LONGEST, from_yaml
from layerlab.contract.paper import Paper, load_paper
from layerlab.contract.plugin_probe import PluginProbe
from layerlab.contract.registry import strategies
from layerlab.runs.jobs import Job, notebook_job, paper_job, setting_errors, told_apart
from layerlab.runs.notebook_file import parameter_names, read_notebook

ALL = "all"
MOST_JOBS = 10_000
# Name of a paper, or empty for a notebook; profile; parameters.
Combination = tuple[str, str, dict[str, Any]]


class Entry(BaseModel):
    """One line of a plan: papers or a notebook, with every combination of profiles, parameters and seeds.

    Attributes:
        paper: names of installed strategies, or `all`.
        notebook: path of any notebook with a cell tagged `parameters`; relative to the plan.
        profile: profiles of the papers.
        parameters: notebook parameters, the same for all.
        grid: parameter → list of values; every combination is a notebook.
        seeds: a notebook a seed, through the notebook's parameter `seeds` (a list of one) or `seed`.
        cwd: the folder that a notebook runs in; relative to the plan; default: where the batch is started.
        kernel: name of an installed kernel that runs a notebook; default: the one that it names.
    """

    model_config = ConfigDict(extra="forbid")

    paper: list[str] = []
    notebook: str = ""
    profile: list[str] = ["quick"]
    parameters: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    seeds: list[int] | None = Field(None, min_length=1)
    cwd: str = ""
    kernel: str = ""

    @field_validator("paper", "profile", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("grid")
    @classmethod
    def _no_empty_grid(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for name, values in value.items():
            if not values:
                raise ValueError(f"gives {name!r} no value to take; give it some or leave it out")
        return value

    @model_validator(mode="after")
    def _paper_or_notebook(self) -> Entry:
        if bool(self.paper) == bool(self.notebook):
            raise ValueError("needs either a paper or a notebook")
        if self.notebook and "profile" in self.model_fields_set:
            raise ValueError("has a profile, which only papers have; use parameters")
        if self.paper and (self.cwd or self.kernel):
            raise ValueError("has a cwd or a kernel, which a paper's notebook chooses by itself; leave it out")
        return self


class Plan(BaseModel):
    """A batch.

    Attributes:
        jobs: what to run.
        workers: notebooks at once; default: as many as cores, memory and GPUs carry.
        time_limit: minutes a notebook may take; none by default.
        retries: how often a notebook whose kernel died is taken up again.
    """

    model_config = ConfigDict(extra="forbid")

    jobs: list[Entry] = Field(min_length=1)
    workers: int | None = Field(None, ge=1)
    time_limit: float | None = Field(None, gt=0, allow_inf_nan=False)
    retries: int = Field(2, ge=0)


def read_plan(file: Path) -> Plan:
    """Read a plan.

    Raises:
        LayerlabError: no such file, no YAML, or settings that a plan does not have, all of them.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(LONGEST + 1)
    except OSError as error:
        raise LayerlabError(f"The plan {file} cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError as error:
        raise LayerlabError(f"The plan {file} is no YAML ({error}); save it as UTF-8.") from None
    content = from_yaml(text, f"The plan {file}")
    if isinstance(content, list):
        content = {"jobs": content}
    if not isinstance(content, dict):
        raise LayerlabError(f"The plan {file} has no jobs; list them under `jobs:`.")
    try:
        return Plan(**content)
    except (ValidationError, TypeError) as error:
        known = {*Plan.model_fields, *Entry.model_fields}
        text = sentence(error, str(file), known) if isinstance(error, ValidationError) else f"{file}: {error}."
        raise LayerlabError(text) from None


def jobs_of(plan: Plan, beside: Path, output: Path | None = None) -> list[Job]:
    """Every job of a plan, each once, in its order.

    Args:
        beside: the folder that paths of notebooks are relative to.
        output: the folder of the results, where the plan is of a single job.

    Returns:
        Of `paper: all`, also what cannot be run, a broken plugin say, as a job with its problem: the others run.

    Raises:
        LayerlabError: every mistake of the plan at once: unknown papers, notebooks, profiles and parameters; or there
            is nothing that can be run, or more than 10,000 jobs.
    """
    if (size := sum(map(_size, plan.jobs))) > MOST_JOBS:
        raise LayerlabError(f"The plan stands for {size:,} jobs, more than {MOST_JOBS:,}; split it.")
    jobs: dict[str, Job] = {}
    mistakes: list[str] = []
    for number, job, refused in _found(plan, beside, output):
        problem = job.problem or refused
        if problem and plan.jobs[number - 1].paper == [ALL]:
            jobs[f"{number} {job.label}"] = replace(job, problem=f"{job.strategy}: {problem}")
        elif problem:
            mistakes.append(f"job {number}: {problem}")
        elif (other := jobs.setdefault(job.folder, job)).basis != job.basis:
            mistakes.append(f"job {number}: {job.label} would write into the same folder {job.folder} as "
                            f"{other.label}; give one of them another name")
    if jobs and all(job.problem for job in jobs.values()):
        mistakes += [job.problem for job in jobs.values()]
    if mistakes:
        lines = "\n".join(f"  - {mistake}" for mistake in dict.fromkeys(mistakes))
        raise LayerlabError(f"The plan has mistakes, and nothing was run:\n{lines}")
    return told_apart(list(jobs.values()))


def _found(plan: Plan, beside: Path, output: Path | None) -> list[tuple[int, Job, str]]:
    """(number of the entry, job, why its settings are refused or an empty string) of everything in a plan."""
    paper = functools.cache(load_paper)  # of this plan, whose jobs are many
    changes = any(entry.paper and (entry.parameters or entry.grid or entry.seeds) for entry in plan.jobs)
    with PluginProbe() if changes else contextlib.nullcontext() as probe:
        found = [(number, _job(entry, each, paper, beside, output))
                 for number, entry in enumerate(plan.jobs, 1) for each in _combinations(entry)]
        jobs = [job for _, job in found]
        refused = setting_errors(jobs, probe) if probe else [""] * len(jobs)
    return [(number, job, why) for (number, job), why in zip(found, refused, strict=True)]


def _job(
    entry: Entry, combination: Combination, paper: Callable[[str], Paper], beside: Path, output: Path | None
) -> Job:
    """One job of an entry; with its problem, where it cannot be run."""
    source, profile, parameters = combination
    try:
        if not entry.notebook:
            return paper_job(paper(source), profile, parameters, output)
        file = beside / entry.notebook
        given = _seeded(entry, parameters, parameter_names(read_notebook(file)))
        return notebook_job(file, given, output, beside / entry.cwd if entry.cwd else "", entry.kernel)
    except LayerlabError as error:
        return Job("", "", source, profile, parameters, problem=str(error))


def _size(entry: Entry) -> int:
    """How many jobs an entry stands for."""
    lists = [*entry.grid.values(), entry.seeds or [0]]
    if entry.paper:
        lists += [list(strategies) if entry.paper == [ALL] else entry.paper, entry.profile]
    return math.prod(map(len, lists))


def _combinations(entry: Entry) -> Iterator[Combination]:
    sources = list(strategies) if entry.paper == [ALL] else entry.paper or [""]
    grid = dict(entry.grid)
    if entry.seeds is not None:
        grid["seeds"] = [[seed] for seed in entry.seeds]
    for source, profile, *values in itertools.product(sources, entry.profile if entry.paper else [""], *grid.values()):
        yield source, profile, {**entry.parameters, **dict(zip(grid, values, strict=True))}


def _seeded(entry: Entry, parameters: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """A notebook of one's own may call its parameter `seed` and take a number."""
    if entry.seeds is None or "seeds" in known or "seed" not in known:
        return parameters
    return {name: value for name, value in parameters.items() if name != "seeds"} | {"seed": parameters["seeds"][0]}
