"""What runs have to tell MLflow: sent at once, or kept in a file of the run's folder until it can be sent.

Every message may be sent again without changing anything (metrics carry their original time stamps), so a process that
dies between sending and forgetting loses nothing and doubles nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerlab.base.errors import LayerlabError, first_line
from layerlab.base.files import write_atomically
from layerlab.base.usage import note_written
from layerlab.runs.record import workbook_folder
from layerlab.runs.tracking import store
from layerlab.runs.tracking.database import QUIET, wait_for_database
from layerlab.runs.tracking.schema import sqlite_file
from layerlab.runs.tracking.writer import is_alive, this_process
from layerlab.show.progress import say

# Folder, in that of a run or of all runs, of what waits to be sent.
UNSENT = "unsent"
# Seconds from one try to the next where MLflow does not take anything: the first time, and at most.
FIRST, LONGEST = 5.0, 60.0
# What MLflow will not take however often it is sent.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")


class Outbox:
    """The messages of one run, in their order.

    Args:
        folder: where what cannot be sent is kept: that of the notebook, or that of all runs.
        experiment, name, attempt, tags: of the run, see `store.start_run`.
        run_id: of a run that exists.
        artifacts: its, see `store.artifact_folder`, where they are known.

    Attributes:
        run_id: MLflow's; empty until the run is there.
        file: holds what is not sent; there is none where all is.
    """

    def __init__(
        self, folder: Path | None, experiment: str, name: str, attempt: str, tags: Mapping[str, str], run_id: str = "",
        artifacts: str | None = None,
    ) -> None:
        self.run_id = run_id
        self.folder = folder or workbook_folder() / "runs"
        self.file = self.folder / UNSENT / f"{attempt}.jsonl"
        self._run: dict[str, Any] = {"experiment": experiment, "name": name, "attempt": attempt, "tags": dict(tags),
                                     "process": this_process()}
        self._messages: list[dict[str, Any]] = []
        self._pause, self._next = FIRST, 0.0
        self._artifacts = artifacts
        if (file := sqlite_file(store.tracking_uri())) is not None:
            note_written(file)

    def open(self, patience: float) -> str:
        """Begin the run, or go on with it, before anything is spent on it; gives its id.

        Args:
            patience: seconds to wait for a locked database.

        Raises:
            LayerlabError: the database or server cannot be used.
        """
        wait_for_database(store.tracking_uri(), patience)
        with store.as_sentence():
            self.run_id = store.start_run(self._run["experiment"], self._run["name"], self._run["attempt"],
                                          self._run["tags"])
        self._forget_file()
        return self.run_id

    def add(self, **message: Any) -> None:
        """Add one message: `params`, `metrics`, `tags`, `inputs`, `file`, `result` or `status`, in plain values."""
        self._messages.append(message)

    def send(self, last: bool = False) -> bool:
        """Send what there is; says whether nothing is left.

        What cannot be sent is kept in the file, and tried again with a later message.

        Args:
            last: try in any case, since nobody will again.
        """
        if not self._messages or (not last and time.monotonic() < self._next):
            self._keep_again()
            return not self._messages
        try:
            with store.quiet(silent=True):
                self._deliver()
        except Exception as error:  # whatever MLflow, SQLAlchemy and the network raise: it must not end a training
            self._wait(error, last)
            return False
        if self._next:
            say(f"MLflow is there again: {self._run['name']} is sent.")
            self._forget_file()
        self._pause, self._next = FIRST, 0.0
        return True

    def _deliver(self) -> None:
        if any("file" not in message for message in self._messages) or not self._artifacts:
            wait_for_database(store.tracking_uri(), QUIET)
        if not self.run_id:
            self.run_id = store.start_run(self._run["experiment"], self._run["name"], self._run["attempt"],
                                          self._run["tags"])
        if self._artifacts is None:
            self._artifacts = store.artifact_folder(self.run_id)
        while self._messages:
            deliver(self.run_id, self._messages[0], self.folder, self._artifacts)
            del self._messages[0]

    def _wait(self, error: Exception, last: bool) -> None:
        """Keep what is not sent, and say so the first time."""
        first = not self._next
        self._next = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST)
        why, kept = first_line(error).rstrip("."), self._keep()
        if first or last:
            where = f"is kept in {self.file}" if kept else "stays in memory, since the disk takes nothing either"
            then = "the next run of this workbook sends it" if last else "the training goes on, and it is sent later"
            say(f"MLflow does not take {self._run['name']} now ({why}); it {where}; {then}.")

    def _keep_again(self) -> None:
        if self._messages and self._next:
            self._keep()

    def _keep(self) -> bool:
        lines = [self._run | {"run_id": self.run_id}, *self._messages]
        text = "".join(json.dumps(line, default=str) + "\n" for line in lines)
        with contextlib.suppress(LayerlabError):
            write_atomically(self.file, lambda stream: stream.write(text.encode()))
            return True
        return False

    def _forget_file(self) -> None:
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)
            self.file.parent.rmdir()


def deliver(run_id: str, message: Mapping[str, Any], folder: Path, artifacts: str) -> None:
    """Send one message of a run; what MLflow refuses for good is said and left out.

    Args:
        folder: that a `file` is named in.
        artifacts: see `store.artifact_folder`.
    """
    from mlflow.entities import Dataset, DatasetInput, Metric

    client = store.client()
    try:
        match message:
            case {"params": params}:
                store.log_params(run_id, params)
            case {"metrics": metrics}:
                store.log_metrics(run_id, [Metric(*metric) for metric in metrics])
            case {"tags": tags}:
                store.log_tags(run_id, tags)
            case {"inputs": inputs}:
                client.log_inputs(run_id, [DatasetInput(Dataset(*each)) for each in inputs])
            case {"file": name}:
                # It is gone where its run was begun anew.
                if (folder / name).is_file():
                    store.log_file(run_id, (folder / name).read_bytes(), name, artifacts)
            case {"result": result}:
                store.tag_results(run_id, result)
            case {"status": status, "ended": ended}:
                client.set_terminated(run_id, status, ended)
    except store.NotTracked as error:
        if error.code not in _REFUSALS:
            raise
        say(f"MLflow refuses {next(iter(message))} of run {run_id} ({first_line(error)}); it goes without.")


def ended(status: str) -> dict[str, Any]:
    """The message that a run has ended, with the time."""
    return {"status": status, "ended": time.time_ns() // 1_000_000}


def unsent_files() -> list[Path]:
    """What waits to be sent in the workbook."""
    runs = workbook_folder() / "runs"
    return sorted([*runs.glob(f"{UNSENT}/*.jsonl"), *runs.glob(f"*/*/{UNSENT}/*.jsonl")])


def send_unsent(files: Sequence[Path]) -> int:
    """Send what processes that have ended left unsent; gives the number of runs.

    A file whose process is alive is left to that one.
    """
    sent = 0
    # A notebook's result is put on the fits that belong to it, so these go first.
    for file in sorted(files, key=lambda file: '"result": ' in file.read_text(errors="replace")):
        try:
            sent += _send_file(file)
        except Exception as error:  # one file that is damaged keeps no other one back
            say(f"{file} cannot be sent to MLflow yet ({first_line(error)}).")
    for folder in {file.parent for file in files}:
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    return sent


def _send_file(file: Path) -> bool:
    """Send one file's messages and remove it; False where its process is alive."""
    run, *messages = [json.loads(line) for line in file.read_text().splitlines()]
    if is_alive(run["process"]) and run["process"] != this_process():
        return False
    run_id = run["run_id"] or store.find_run(run["experiment"], run["attempt"]) or store.create_run(
        run["experiment"], run["name"], run["attempt"], run["tags"], run["process"])
    artifacts = store.artifact_folder(run_id)
    with store.quiet(silent=True):
        for message in messages:
            deliver(run_id, message, file.parent.parent, artifacts)
    file.unlink()
    return True
