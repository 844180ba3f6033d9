"""A notebook's session: its runs, tables and figures in one place; with a paper under a profile, its claims, too."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil

from layerlab.base import usage
from layerlab.base.digests import package_digests
from layerlab.base.errors import LayerlabError
from layerlab.base.files import write_atomically, write_json
from layerlab.base.folder_lock import AtWork, keep_locked
from layerlab.base.names import file_name
from layerlab.base.provenance import machine_name, provenance
from layerlab.base.text import as_json, assigned
from layerlab.contract.claims import ClaimResult
from layerlab.contract.identity import Identity, identity_of
from layerlab.contract.paper import Paper, load_paper
from layerlab.contract.rows import scoreboard, sentence
from layerlab.runs import tracking
from layerlab.runs.answer import (
    ANSWERS,
    ANSWERS_FILE,
    PAGE,
    Against,
    Answer,
    against_baseline,
    answer_metrics,
    append_answer,
)
from layerlab.runs.basis import paper_basis
from layerlab.runs.description import answer_tags
from layerlab.runs.manifest import Kind, Manifest
from layerlab.runs.measured import measured
from layerlab.runs.own_folder import OwnFolder
from layerlab.runs.record import (
    DIFFERS,
    IDENTITY,
    MANIFEST,
    OUTPUT,
    PARAMETERS,
    RECORD,
    RERUN,
    RESULTS,
    default_folder,
    read_record,
)
from layerlab.show.interval import Estimate, mean_interval
from layerlab.show.stamp import stamped

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from layerlab.show.figures import Picture
    from layerlab.training.results import Comparison

# Seconds that the kernel of a killed run may live on.
LINGERS = 10.0


def _enter(folder: Path) -> None:
    """Keep other processes out of a session's folder for as long as this one lives.

    Raises:
        LayerlabError: another process stays in it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        keep_locked(folder, LINGERS)
    except OSError as error:
        raise LayerlabError(
            f"The output folder {folder} cannot be written ({error.strerror}); choose another."
        ) from None
    _wait_for_end(folder)


def _wait_for_end(folder: Path) -> None:
    """Wait for the process of the session before: the kernel of a run that was killed outlives it by a moment.

    Raises:
        AtWork: it stays.
    """
    number, started = read_record(folder).get("process") or (0, 0.0)
    if number in (0, os.getpid()):
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(number)
        # Numbers are given out again; the time of its start tells another process apart.
        if process.create_time() != started:
            return
        try:
            process.wait(LINGERS)
        except psutil.TimeoutExpired:
            raise AtWork(f"Process {number} is at work in {folder}; wait for it, or choose another folder.") from None


def seeds_at_once() -> int:
    """How many seeds a notebook trains at a time: `$LAYERLAB_SEEDS_AT_ONCE`, or 1.

    Raises:
        LayerlabError: it is no such number.
    """
    given = os.environ.get("LAYERLAB_SEEDS_AT_ONCE") or "1"
    if not given.isdecimal() or int(given) < 1:
        raise LayerlabError(f"LAYERLAB_SEEDS_AT_ONCE is {given!r}; give a whole number of seeds, at least 1.")
    return int(given)


def _differing() -> dict[str, Any]:
    """The parameters in which this notebook differs from the others of its batch, as whoever runs it says."""
    return dict(json.loads(os.environ.get(DIFFERS) or "{}"))


class Session:
    """A notebook at work.

    Everything it makes lies in one folder and in one MLflow run, whose id the training runs carry as a tag. An
    interrupted session that is opened again with the same parameters goes on in both; a finished one is done anew.

    Args:
        experiment: MLflow's.
        title: of its MLflow run.
        folder: of its own.
        parameters: the values in force.
        tags: of its runs.
        notes: what else its record keeps.
        notebook: its file, whose texts the manifest keeps; None where it is unknown.

    Attributes:
        folder: the output folder.
        attempt: an id that survives interruptions.
        run_id: of the notebook's MLflow run.

    Raises:
        LayerlabError: a folder that cannot be written, that another process is at work in, or that holds what layerlab
            did not write and would replace.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import pandas as pd
        >>> from layerlab import Session
        >>> session = Session("my experiment", "a try", Path(tempfile.mkdtemp()), {"lr": 0.1})
        >>> _ = session.table("results", pd.DataFrame({"lr": [0.1], "top-1": [97.2]}))
        >>> session.close()
        >>> (session.folder / "tables" / "results.csv").exists()
        True
    """

    def __init__(
        self, experiment: str, title: str, folder: Path, parameters: Mapping[str, Any],
        tags: Mapping[str, str] | None = None, notes: Mapping[str, Any] | None = None, notebook: Path | None = None,
    ) -> None:
        self.experiment = experiment
        self.folder = folder.resolve()
        self._values = values = as_json(parameters)
        self._usage = usage.recorder()
        # What is known by other means, see `layerlab.runs.basis`, or is made here.
        self._known = [self.folder, *([notebook.resolve()] if notebook else [])]
        _enter(self.folder)
        self._own = OwnFolder(self.folder)
        self._manifest = Manifest(notebook)
        self._opened = time.monotonic()
        differs = _differing()
        self._arms: list[Against] = []
        self._answer = Answer()
        self._claims: Sequence[ClaimResult] = ()
        self._pays: dict[str, str] = {}
        self._trackers: dict[str, tracking.Tracker] = {}
        record = read_record(self.folder)
        if record and not record["finished"] and record.get("parameters") == values and record.get("attempt"):
            self.attempt = record["attempt"]
        else:
            self.attempt = uuid.uuid4().hex
            (self.folder / RESULTS).unlink(missing_ok=True)
            self._own.clear()
            if record and not record["finished"] and "mlflow_run" in record:
                tracking.end_open_runs(experiment, record["mlflow_run"])
        self._record: dict[str, Any] = {
            "attempt": self.attempt, "finished": False, "parameters": values, **(notes or {}),
            "rerun": os.environ.get(RERUN, ""),
            "process": [os.getpid(), psutil.Process().create_time()],
            # How long the last finished one took stays known while the next one runs.
            "seconds": record.get("seconds"),
        }
        write_json(self.folder / RECORD, self._record)
        self._tags = {**(tags or {}), "batch": os.environ.get("LAYERLAB_BATCH", self.attempt)}
        if differs:
            # First, since MLflow's list shows only the beginning of a long name.
            title = f"{assigned(differs)} · {title}"
            self._tags["differs"] = assigned(differs)[:tracking.LONGEST_TAG]
        self._outbox = tracking.Outbox(
            self.folder, experiment, title, self.attempt,
            self._tags | tracking.common_tags() | {"kind": "notebook"} | tracking.parameter_tag(values),
        )
        self.run_id = self._outbox.open(tracking.PATIENCE)
        if differs:
            self._outbox.add(params={name: str(value) for name, value in differs.items()})
        tracking.send_unsent(tracking.unsent_files())
        self._artifacts = tracking.artifact_folder(self.run_id)
        self._record |= {"mlflow_run": self.run_id, "artifacts": self._artifacts}
        write_json(self.folder / RECORD, self._record)
        self._keep_json(PARAMETERS, values)
        self._keep_json(MANIFEST, self._manifest.content())

    @property
    def values(self) -> dict[str, Any]:
        """The parameters in force, as JSON takes them."""
        return dict(self._values)

    def compare(
        self, title: str, *arguments: Any, table: str = "", trial: bool = False, **settings: Any
    ) -> Comparison:
        """`layerlab.compare`, checkpointed in the session's folder and logged with its run's id.

        Args:
            title: names the checkpoints; unique in the notebook.
            table: what this is for, as a tag, such as the table or figure of a paper.
            trial: it only chooses something, so its ratios are no part of the session's answer.
        """
        from layerlab.training.fit import compare

        tracker = self._trackers.setdefault(title, tracking.Tracker(
            self.experiment, self._tags | {"table": table or title}, self.run_id, self.folder,
            f"{self.attempt}/{title}", title))
        checkpoint = self._unfinished / file_name(title)
        settings = {"at_once": seeds_at_once(), **settings}
        found = compare(*arguments, checkpoint=checkpoint, observers=[tracker], **settings)
        if not trial:
            self.compared(title, found)
        return found

    def compared(self, title: str, comparison: Comparison) -> None:
        """Take a comparison for the whole of its title: its ratios belong to the session's answer, and the seeds of
        each arm to one group in MLflow.

        `compare` does it by itself; seeds that were compared one after the other under one title are put together so.
        """
        self._arms = [each for each in self._arms if each.comparison != title]
        self._arms += against_baseline(title, comparison)
        self._trackers[title].log_arms(comparison)

    def measure(
        self, title: str, make: Callable[..., pd.DataFrame], *arguments: Any, **named: Any
    ) -> pd.DataFrame:
        """A table that takes long to measure: `study.measure("times", timed, networks, rounds=7)`.

        It is kept as trainings are: a notebook that goes on where it was interrupted finds it, as long as the
        arguments, the data so far, the code and the machine are the same.

        Args:
            title: unique in the notebook among what it measures.
            make: gives the table.
            arguments, named: what it is called with: numbers, texts, and lists and mappings of them.
        """
        asked = [getattr(make, "__qualname__", ""), as_json(arguments), as_json(named)]
        of = json.dumps([self.identity().id, machine_name(), asked])
        file = self._unfinished / f"{file_name(title)}.parquet"
        return measured(file, of, partial(make, *arguments, **named))

    @property
    def _unfinished(self) -> Path:
        """The folder of what an interrupted session goes on from."""
        return self.folder / "checkpoints" / self.attempt

    def conclude(self, sentence: str, page: str = "", pays: Mapping[str, str] | None = None) -> None:
        """Keep what the session found out in words, to be shown at the end of a batch, by `layerlab table` and in
        MLflow.

        Args:
            sentence: the answer.
            page: an HTML page that shows it; kept as `answer.html`.
            pays: arm → `yes`, `no` or `undecided`, where the conclusion says more than each arm's own interval.
        """
        self._pays = dict(pays or {})
        self._answer = self._answer.model_copy(update={"sentence": sentence})
        if page:
            self._own.take(PAGE)
            self._keep(PAGE, page.encode())
            self._answer = self._answer.model_copy(update={"page": str(self.folder / PAGE)})

    def table(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        """Keep a table, unless it has no rows, as CSV in the folder and in MLflow; gives it back for display."""
        if frame.empty:
            return frame
        import pandas as pd

        # Named in any case: MLflow's preview leaves out a column without a name.
        labels = [name or "row" for name in frame.index.names]
        text = frame.to_csv(index=not isinstance(frame.index, pd.RangeIndex), index_label=labels)
        self._show("table", name, text.encode())
        return frame

    def figure(self, name: str, figure: Figure) -> Picture:
        """Keep a matplotlib figure as PNG in the folder and in MLflow; gives the picture back for display.

        Raises:
            LayerlabError: `$LAYERLAB_CHECK_FIGURES` is set, as in our tests, and something in it cannot be read.
        """
        from layerlab.show.figures import Picture, png
        from layerlab.show.legibility import demand_legible

        if os.environ.get("LAYERLAB_CHECK_FIGURES"):
            demand_legible(name, figure)
        picture = Picture(figure, png(figure, 144), 144)
        self._show("figure", name, picture.content)
        return picture

    def identity(self) -> Identity:
        """What the results come from, as far as is known now."""
        files = self._usage.content(self._known)["files"]
        own = {Path(path).name: digest for path, digest in files.items()}
        return identity_of(self.experiment, "", self._values, self._usage.data, {"used": own})

    def close(self) -> None:
        """The work is done: put its identity on everything, end the MLflow run, and forget the checkpoints.

        What says so is `finished` in the record, written when everything else is.
        """
        identity = self.identity()
        self._keep_json(IDENTITY, {"id": identity.id, **identity.model_dump()})
        for shown in self._manifest.shown("figure"):
            content = (self.folder / shown.file).read_bytes()
            self._keep(shown.file, stamped(content, f"layerlab · {self.experiment} · {identity.id}"))
        arms = [arm.model_copy(update={"pays": self._pays.get(arm.arm, arm.pays)}) for arm in self._arms]
        answer = self._answer.model_copy(update={"arms": arms, "run": self.run_id})
        if arms:
            self._own.take(ANSWERS_FILE)
            self._keep_json(ANSWERS_FILE, [answer.model_dump(exclude={"page"})])
        now = time.time_ns() // 1_000_000
        self._outbox.add(metrics=[(name, value, now, 0) for name, value in answer_metrics(answer).items()])
        if answer.sentence:
            self._outbox.add(tags=answer_tags(answer.sentence, self._claims))
        self._outbox.add(result=identity.id)
        self._outbox.add(**tracking.ended("FINISHED"))
        self._outbox.send(last=True)
        seconds = round(time.monotonic() - self._opened, 1)
        self._record |= {"finished": True, "process": None, "seconds": seconds,
                         "used": self._usage.content(self._known),
                         "answers": [answer.model_dump()]}
        write_json(self.folder / RECORD, self._record)
        if file := os.environ.get(ANSWERS):
            append_answer(Path(file), answer)
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def _show(self, kind: Kind, name: str, content: bytes) -> None:
        shown = self._manifest.add(kind, name)
        self._own.take(shown.file)
        self._keep(shown.file, content)
        self._keep_json(MANIFEST, self._manifest.content())

    def _keep_json(self, name: str, content: Any) -> None:
        self._keep(name, json.dumps(content, indent=2, ensure_ascii=False).encode())

    def _keep(self, name: str, content: bytes) -> None:
        write_atomically(self.folder / name, lambda stream: stream.write(content))
        self._outbox.add(file=name)
        self._outbox.send()


class Study(Session):
    """What a paper's notebook works with: a session that knows the paper.

    Args:
        strategy: name of the installed strategy whose paper this is.
        profile: one of the paper's.
        output: the folder. Default: `$LAYERLAB_OUTPUT`, else `runs/<strategy>/<profile>` in the workbook's folder.
        parameters: the notebook's parameters; those that are None take the profile's value.

    Attributes:
        paper: tables, claims, profiles.
        parameters: the values in force, as attributes.

    Raises:
        LayerlabError: unknown strategy, profile or parameter; a folder that cannot be written.

    Example:
        >>> import tempfile
        >>> from layerlab import Study, strategies
        >>> study = Study(next(iter(strategies)), "quick", output=tempfile.mkdtemp())
        >>> {result.verdict for result in study.results}
        {'not run'}
    """

    def __init__(
        self, strategy: str, profile: str = "quick", output: str | Path | None = None, **parameters: Any
    ) -> None:
        self.paper: Paper = load_paper(strategy)
        self.profile = profile
        merged = self.paper.parameters(profile, parameters)
        self.parameters = SimpleNamespace(**{**self.paper.profile(profile).parameters, **merged.changed})
        values = merged.in_force
        self._results: list[ClaimResult] = []
        super().__init__(
            strategy, f"{strategy} · {profile} · notebook",
            Path(output or os.environ.get(OUTPUT) or default_folder(strategy, profile, merged.changed)),
            vars(self.parameters),
            {"paper": strategy, "profile": profile},
            {"profile": profile, "basis": paper_basis(self.paper, values)},
            self.paper.notebook_file,
        )
        self._known.append(self.paper.folder / "paper.toml")
        # As `finish` does it, so that what cannot be tracked is found before anything is trained.
        tracking.log_tags(self.run_id, tracking.claim_tags(result.model_dump_json() for result in self.results))

    @classmethod
    def of_notebook(cls, strategy: str, variables: Mapping[str, Any]) -> Study:
        """The study of a notebook whose variables hold its parameters: `Study.of_notebook("lars-skip", globals())`.

        Args:
            strategy: name of the installed strategy whose paper this is.
            variables: the notebook's. `profile`, `output` and every parameter of the profile are taken from them.

        Raises:
            LayerlabError: as `Study`; a parameter of the profile that is no variable.
        """
        profile = variables.get("profile", "quick")
        names = load_paper(strategy).profile(profile).parameters
        absent = [name for name in names if name not in variables]
        if absent:
            raise LayerlabError(f"The notebook of {strategy} has no parameter {absent[0]!r}; add it to the cell tagged "
                                "`parameters`.")
        return cls(strategy, profile, variables.get("output"), **{name: variables[name] for name in names})

    def claim(
        self, id: str, values: float | Sequence[float] | Estimate, *, seeds: Sequence[int] = (),
        conditions: Mapping[str, Any] | None = None, observed: Mapping[str, float] | None = None,
        by_model: bool = False,
    ) -> ClaimResult:
        """Set measured values beside a claim.

        Args:
            id: of the claim in paper.toml.
            values: one for each seed, in the claim's unit; not finite where it did not happen.
            seeds: the seeds.
            conditions: what it was measured under, `dataset` and `network` among them.
            observed: the run's own numbers, which the claim's gates read, such as `baseline top-1`.
            by_model: whether a model computed the values.
        """
        claim = self.paper.claim(id)
        if isinstance(values, Estimate):
            values = values.values
        numbers = [float(values)] if isinstance(values, (int, float)) else [float(value) for value in values]
        happened = numbers and all(map(math.isfinite, numbers))
        mean, half = mean_interval(numbers) if happened else (None, None)
        result = self.paper.placed(self.paper.not_run(claim, self.profile).model_copy(update={
            "measured": mean, "interval": half if half is not None and math.isfinite(half) else None,
            "values": [value if math.isfinite(value) else None for value in numbers], "seeds": list(seeds),
            "conditions": dict(conditions or {}), "observed": dict(observed or {}), "by_model": by_model,
            "mlflow_run": self.run_id, **provenance(),
        }), self._values)
        self._results.append(result)
        return result

    @property
    def results(self) -> list[ClaimResult]:
        """Every claim of the paper in its order: what was measured of it, or a row that says `not run`."""
        rows = []
        for claim in self.paper.everything:
            found = [result for result in self._results if result.claim == claim.id]
            # Where the run was made, in any case: it may consist of tables and figures alone.
            rows += found or [self.paper.placed(self.paper.not_run(claim, self.profile), self._values).model_copy(
                update=provenance())]
        return rows

    def identity(self) -> Identity:
        """What the results come from, as far as is known now."""
        return identity_of(self.paper.strategy, self.profile, self._values, self._usage.data,
                           {"plugin": package_digests(self.paper.folder)})

    def finish(self) -> pd.DataFrame:
        """Write the claims' results, close the session, and give the scoreboard for display."""
        identity = self.identity().id
        results = [result.model_copy(update={"result": identity}) for result in self.results]
        now = time.time_ns() // 1_000_000
        self._outbox.add(metrics=[(name, value, now, 0) for name, value in tracking.claim_metrics(results).items()])
        # Each row as a tag, too, so that the database alone holds the scoreboard wherever it is copied to.
        self._outbox.add(tags=tracking.claim_tags(result.model_dump_json() for result in results))
        self._keep_json(RESULTS, [result.model_dump() for result in results])
        self._claims = results
        if not self._answer.sentence:
            self.conclude(sentence(self.paper.strategy, results))
        self.close()
        return scoreboard(results)
