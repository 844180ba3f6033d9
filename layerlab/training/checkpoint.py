"""Stop anywhere, go on exactly there: states of fits, read without pickle."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from layerlab.base.errors import LayerlabError, first_line
from layerlab.base.files import write_atomically, write_json
from layerlab.base.names import ATTEMPT
from layerlab.contract.run import Run
from layerlab.contract.strategy import Strategy


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
        """An id for this fit that survives interruptions, by which its MLflow run is found again."""
        file = self.folder / ATTEMPT
        if file.exists():
            return json.loads(file.read_text())["attempt"]
        attempt = uuid.uuid4().hex
        write_json(file, {"attempt": attempt})
        return attempt

    def save(self, state: dict[str, Any]) -> None:
        """Replace the stored state.

        Raises:
            LayerlabError: no room, or not writable; the previous state is still there.
        """
        write_atomically(self.file, lambda stream: torch.save({**state, "fingerprint": self.fingerprint}, stream))

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The stored state with tensors on `device`, or None if there is none yet.

        Raises:
            LayerlabError: it is damaged, or belongs to a fit with other arguments.
        """
        if not self.file.exists():
            return None
        try:
            state = torch.load(self.file, map_location=device, weights_only=True)
        except Exception as error:  # zip, pickle and runtime errors, depending on the damage
            raise LayerlabError(
                f"The checkpoint {self.file} is damaged ({first_line(error)}); delete the folder "
                f"{self.folder} to start anew."
            ) from None
        if state["fingerprint"] != self.fingerprint:
            raise LayerlabError(
                f"The checkpoint in {self.folder} belongs to a fit with other arguments (settings, strategies, seed, "
                "data, network, loss or versions); give another folder, or delete this one to start anew."
            )
        return state


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
        "strategies": {strategy.name: strategy.state_dict() for strategy in strategies},
        "generator": run.generator.get_state(),
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
    run.generator.set_state(state["generator"].cpu())
