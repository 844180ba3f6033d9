"""Stop anywhere, go on exactly there: states of fits, read without pickle."""

from __future__ import annotations

import json
import re
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from layerlab.base.errors import LayerlabError, Refused, brief, first_line
from layerlab.base.files import sweep, write_json
from layerlab.base.names import ATTEMPT
from layerlab.contract.run import Run
from layerlab.contract.strategy import Strategy
from layerlab.training.state_file import check_storable, read_state, write_state


class Checkpoint:
    """The state of one fit at the end of its last finished epoch, in a folder of its own.

    Args:
        folder: where `state.pt` and `attempt.json` lie; made when first written.
        fingerprint: of the fit's arguments; a state that belongs to others is refused.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint

    @property
    def file(self) -> Path:
        """The state's file."""
        return self.folder / "state.pt"

    def attempt(self) -> str:
        """An id for this fit that survives interruptions, by which its MLflow run is found again.

        Raises:
            LayerlabError: the file that keeps it holds something else, or cannot be read or written.
        """
        file = self.folder / ATTEMPT
        if not file.exists():
            attempt = uuid.uuid4().hex
            write_json(file, {"attempt": attempt})
            return attempt
        try:
            attempt = json.loads(file.read_text(encoding="utf-8"))["attempt"]
            if re.fullmatch("[0-9a-f]{32}", attempt):
                return attempt
        except (OSError, ValueError, TypeError, KeyError):
            pass
        raise LayerlabError(f"{file} does not say which MLflow run this fit has; delete it, and the fit goes on in a "
                            "new run.")

    def save(self, state: dict[str, Any]) -> None:
        """Replace the stored state.

        Raises:
            LayerlabError: something in it would not come back; no room, or not writable. The previous state is still
                there.
        """
        for name, each in state["strategies"].items():
            check_storable(f"The state of strategy {name!r}", each, "let its state_dict give")
        for owner, part in (("network", "model"), ("optimizer", "optimizer"), ("schedule", "schedule"),
                            ("history", "history")):
            check_storable(f"The state of the {owner}", state[part], "let it be made of")
        try:
            write_state(self.file, {**state, "fingerprint": self.fingerprint})
        except LayerlabError as error:
            if not self.file.exists():
                raise
            raise LayerlabError(f"{error} The last state that was written is still there, and the fit goes on from it "
                                "when it is started again.") from error

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The stored state with tensors on `device`, or None if there is none yet.

        Raises:
            LayerlabError: it is damaged, is none of layerlab's, or belongs to a fit with other arguments.
        """
        sweep(self.file)
        if not self.file.exists():
            return None
        foreign = "move it, or give another folder"
        anew = f"delete the folder {self.folder} to start anew"
        state = read_state(self.file, "The checkpoint", anew, foreign, device)
        if not isinstance(state, dict) or "fingerprint" not in state:
            raise LayerlabError(f"{self.file} is no checkpoint of a fit; {foreign}.")
        if state["fingerprint"] != self.fingerprint:
            raise LayerlabError(
                f"The checkpoint in {self.folder} belongs to a fit with other arguments (settings, strategies, seed, "
                "data, network, loss or versions); give another folder, or delete this one to start anew."
            )
        return state


def checkpoint_folder(given: str | Path | None) -> Path | None:
    """The folder that a user names for checkpoints.

    Raises:
        Refused: an empty text, a file, or what no folder can be called.
    """
    if given is None:
        return None
    if not str(given):
        raise Refused("checkpoint is an empty text; name a folder, or leave it out.")
    folder = Path(given)
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except FileNotFoundError:
        return folder
    except (OSError, ValueError) as error:  # a name that is too long, or has a character that none may have
        raise Refused(f"checkpoint cannot be {brief(str(given))} ({first_line(error)}); name another folder.") from None
    if not is_folder:
        raise Refused(f"checkpoint is {folder}, which is a file; name a folder.")
    return folder


def run_state(run: Run, strategies: Sequence[Strategy]) -> dict[str, Any]:
    """Everything of a run that its strategies, its optimizer or its data changed up to the end of an epoch."""
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    return {
        "model": run.model.state_dict(),
        "held": run.held,
        "kept": {owner: {names[parameter]: each for parameter, each in kept.items()}
                 for owner, kept in run.kept.items()},
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict() if run.scaler is not None else {},
        "strategies": {strategy.name: strategy.state_dict() for strategy in strategies},
        "generator": run.generator.get_state(),
        "generators": {name: each.get_state() for name, each in run.generators.items()},
        "epoch": run.epoch,
        "step": run.step,
        "history": run.history,
    }


def restore_run(run: Run, strategies: Sequence[Strategy], state: dict[str, Any]) -> None:
    """Put a run that has just begun back to where `run_state` was taken."""
    run.epoch, run.step, run.history = state["epoch"], state["step"], state["history"]
    for strategy in strategies:
        strategy.load_state_dict(state["strategies"][strategy.name])
    for strategy in strategies:
        strategy.on_load_checkpoint(run)
    run.model.load_state_dict(state["model"])
    run.hold(state["held"])
    named = dict(run.model.named_parameters())
    run.kept = {owner: {named[name]: each for name, each in kept.items()} for owner, kept in state["kept"].items()}
    run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    if run.scaler is not None:
        run.scaler.load_state_dict(state["scaler"])
    run.generator.set_state(state["generator"].cpu())
    for name, each in state["generators"].items():
        run.generator_for(name).set_state(each.cpu())
