"""Jobs: a notebook with its parameters and the folder it writes to."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from layerlab.base.errors import LayerlabError, reason
from layerlab.base.text import as_json, assigned, reproduce_command
from layerlab.contract.paper import Paper, load_paper
from layerlab.contract.plugin_probe import Changes, PluginProbe
from layerlab.contract.registry import strategies
from layerlab.runs.basis import State, notebook_basis, paper_basis, standing
from layerlab.runs.notebook_file import check_parameters, kernel_for, read_notebook
from layerlab.runs.record import RESULTS, default_folder, read_record, workbook_folder
from layerlab.show.progress import say


@dataclass(frozen=True)
class Job:
    """A notebook with its parameters, and where its results go. Plain data, so that it travels to other processes.

    Attributes:
        notebook: the notebook's file.
        folder: the output folder, a job's own.
        strategy, profile: of a paper's notebook; empty for any other.
        changed: the parameters that differ from the profile's, or from the notebook's own, with their values.
        basis: what its outcome rests on, see `layerlab.runs.basis.notebook_basis`.
        cores: threads that it should have; `all` keeps the machine to itself.
        memory_gb: host memory that it may take, in 10⁹ bytes.
        cwd: the folder that the notebook runs in; empty for the present one.
        kernel: name of the kernel that a person chose; empty for what the notebook names.
        problem: why it cannot be run, found before anything started; otherwise empty.
        differs: the parameters in which it differs from the other jobs of its batch, with their values.
    """

    notebook: str
    folder: str
    strategy: str = ""
    profile: str = ""
    changed: dict[str, Any] = field(default_factory=dict)
    basis: dict[str, Any] = field(default_factory=dict)
    cores: int | Literal["all"] = 1
    memory_gb: float = 2.0
    cwd: str = ""
    kernel: str = ""
    problem: str = ""
    differs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The strategy's name, or the notebook's."""
        return self.strategy or Path(self.notebook).stem

    @property
    def label(self) -> str:
        """In a few words: what differs from the other jobs of its batch, then name and profile; without such a batch,
        the parameters that differ from the profile's at the end."""
        if self.differs:
            # What all of them have in common would push the rest out of a line.
            return f"{assigned(self.differs)} · {' '.join(filter(None, (self.name, self.profile)))}"
        return " ".join(part for part in (self.name, self.profile, assigned(self.changed)) if part)

    @property
    def command(self) -> str:
        """What runs this job alone."""
        more: list[str] = []
        if self.strategy and Path(self.folder) != default_folder(
            self.strategy, self.profile, self.changed
        ).resolve():
            more = ["--output", self.folder]
        for option, value in (("--cwd", self.cwd), ("--kernel", self.kernel)):
            more += [option, value] if value else []
        return reproduce_command(self.strategy or self.notebook, self.profile if self.strategy else "",
                                 self.changed, *more)

    @property
    def file(self) -> Path:
        """The executed notebook of a finished job."""
        return Path(self.folder) / f"{self.name}.ipynb"

    @property
    def partial(self) -> Path:
        """The notebook while it runs, and after an interruption."""
        return self.file.with_suffix(".partial.ipynb")

    @property
    def failed(self) -> Path:
        """The notebook of a failed job, with its traceback."""
        return self.file.with_suffix(".failed.ipynb")

    @property
    def last_seconds(self) -> float | None:
        """How long it took when it last finished; the last session alone, if it had been interrupted."""
        return read_record(Path(self.folder)).get("seconds")

    def state(self, rerun: str = "") -> State:
        """Whether the folder holds this very job, finished, by our own record; papermill's word is no proof.

        Args:
            rerun: the id of a batch that does everything anew: what another finished does not count. No time tells
                that, since clocks jump.
        """
        folder = Path(self.folder)
        record = read_record(folder)
        if rerun and record.get("rerun") != rerun:
            return State(False)
        whole = (folder / RESULTS).exists() if self.strategy else self.file.exists()
        return standing(record, self.basis, self.cwd) if whole else State(False)

    def is_done(self, rerun: str = "") -> bool:
        """`state`, without its reason."""
        return self.state(rerun).done

    def rename_partial(self) -> None:
        """Give a done job's notebook its name, if it was killed between the study's last word and that: only the saving
        of the last cell is lost."""
        if not self.file.exists() and self.partial.exists():
            os.replace(self.partial, self.file)


def paper_job(
    strategy: str | Paper, profile: str = "quick", changed: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
) -> Job:
    """The notebook of an installed strategy's paper.

    Args:
        strategy: name of an installed strategy, or its paper, where that is read already.
        profile: one of its paper's.
        changed: notebook parameters that differ from the profile's.
        output: the folder for notebook, tables, figures and claims. Default: `runs/<strategy>/<profile>`.

    The strategy is not imported, so a value that its setting does not take is found by `setting_errors` alone.

    Raises:
        LayerlabError: no such strategy, profile or parameter, or a value of another kind than the profile's.
    """
    paper = load_paper(strategy) if isinstance(strategy, str) else strategy
    chosen = paper.profile(profile)
    merged = paper.parameters(profile, changed or {})
    folder = Path(output) if output else default_folder(paper.strategy, profile, merged.changed)
    return Job(
        str(paper.notebook_file), str(folder.resolve()), paper.strategy, profile, merged.changed,
        paper_basis(paper, merged.in_force), chosen.cores, chosen.memory_gb,
    )


def told_apart(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, each with the parameters in which it differs from the others of its notebook, as `differs`.

    The only one of its notebook keeps none.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.notebook, []).append(job)
    differing: dict[str, list[str]] = {}
    for notebook, group in groups.items():
        every = dict.fromkeys(name for job in group for name in job.changed)
        differing[notebook] = [name for name in every
                               if len({json.dumps(as_json(_in_force(job, name))) for job in group}) > 1]
    return [replace(job, differs={name: _in_force(job, name) for name in differing[job.notebook]}) for job in jobs]


def _in_force(job: Job, name: str) -> Any:
    """A parameter's value in a job: what was changed, else the profile's, else `default` for the notebook's own."""
    return job.changed.get(name, job.basis.get("parameters", {}).get(name, "default"))


def setting_errors(jobs: Sequence[Job], probe: PluginProbe) -> list[str]:
    """Why the settings of each job's strategy do not take its parameters, or an empty string, in their order.

    Args:
        jobs: any; those without changed parameters are not looked at.
        probe: imports the plugins, in a process of its own.
    """
    changed = [job for job in jobs if job.strategy and job.changed and not job.problem]
    paper = functools.cache(load_paper)
    asked = [Changes(strategies[job.strategy], paper(job.strategy).profile(job.profile).parameters, job.changed)
             for job in changed]
    found = iter(probe.refused_changes(asked))
    return [next(found) if job.strategy and job.changed and not job.problem else "" for job in jobs]


def notebook_job(
    notebook: str | Path, parameters: Mapping[str, Any] | None = None, output: str | Path | None = None,
    cwd: str | Path = "", kernel: str = "",
) -> Job:
    """Any notebook; what takes parameters has a cell tagged `parameters`.

    Args:
        notebook: its file.
        parameters: those that differ from the notebook's own.
        output: the folder of the results. Default: one of its own below `runs/notebooks`.
        cwd: the folder that it runs in; default: the present one. Its own folder is on Python's path in any case.
        kernel: name of an installed one; default: the one that the notebook names, else this Python.

    Raises:
        LayerlabError: no such file, no notebook, no such parameter, kernel or folder.
    """
    file = Path(notebook).resolve()
    given = dict(parameters or {})
    content = read_notebook(file)
    check_parameters(file, content, given)
    kernel_for(file, content, kernel)
    place = str(Path(cwd).resolve()) if cwd else ""
    if place and not Path(place).is_dir():
        raise LayerlabError(f"There is no folder {place} to run {file.name} in; check --cwd.")
    name = file.stem
    if file.parent != workbook_folder() / "notebooks":
        # Several may be called alike.
        name += "-" + hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()
    folder = Path(output) if output else default_folder("notebooks", name, given)
    # A dash is in no parameter's name.
    how = {option: value for option, value in (("--cwd", place), ("--kernel", kernel)) if value}
    return Job(str(file), str(folder.resolve()), changed=given, basis=notebook_basis(file, given | how, place),
               cwd=place, kernel=kernel)


# What is plugged into papermill and broken, a sentence each.
_left_out: list[str] = []


def import_papermill() -> Any:
    """papermill, without what costs each process two seconds and without what is plugged into it and broken.

    It imports jsonschema, which builds a grammar of web addresses if the package that holds it can be imported.
    Notebooks are valid or not without that. And it loads engines of all distributions with nothing around that.

    What is left out is said at each call: the process that imported papermill may have been one that this was forked
    from, and that nobody hears.
    """
    papermill = _imported_papermill()
    for sentence in _left_out:
        say(sentence)
    return papermill


def _imported_papermill() -> Any:
    if "papermill" in sys.modules:
        import papermill

        return papermill
    import entrypoints

    name = "rfc3987_syntax"
    absent = name not in sys.modules
    if absent:
        sys.modules[name] = None  # type: ignore[assignment]
    every = entrypoints.get_group_all
    entrypoints.get_group_all = _sound_points
    try:
        import papermill
    finally:
        entrypoints.get_group_all = every
        if absent:
            del sys.modules[name]
    return papermill


def _sound_points(group: str) -> list[Any]:
    """The entry points of a group that can be loaded; why each of the others cannot is kept."""
    sound = []
    for point in importlib.metadata.entry_points(group=group):
        try:
            point.load()
        except Exception as error:  # whatever somebody's module raises
            owner = point.dist.name if point.dist else "a package"
            _left_out.append(f"What {owner} plugs into papermill ({point.name}) is left out: {reason(error)}.")
        else:
            sound.append(point)
    return sound


@contextlib.contextmanager
def quiet_papermill() -> Iterator[None]:
    """Keep papermill's warnings about parameters out of the output."""
    logger = logging.getLogger("papermill")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
