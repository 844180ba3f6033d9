"""The observer that logs a fit as an MLflow run."""

from __future__ import annotations

import json
import time
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlab.runs.tracking.database import PATIENCE
from layerlab.runs.tracking.outbox import Outbox, ended
from layerlab.runs.tracking.store import NOTEBOOK, common_tags

if TYPE_CHECKING:
    from layerlab.training.loop import Fit
    from layerlab.training.results import FitResult

# Seconds from one writing of a fit's metrics to the next: a call to MLflow takes as long as a small network's epoch.
PAUSE = 1.0


class Tracker:
    """Logs every fit that it observes as an MLflow run of its own.

    What MLflow does not take while a fit trains is kept and sent later: it ends no training.

    Args:
        experiment: MLflow's experiment.
        tags: for every run, such as paper, table and profile.
        parent: id of the notebook's run that they belong to, as a tag.
        folder: of the notebook; keeps what cannot be sent. Default: that of all runs.
    """

    def __init__(
        self, experiment: str, tags: Mapping[str, str] | None = None, parent: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.experiment = experiment
        self.tags = dict(tags or {})
        self.parent = parent
        self.folder = folder
        # Whether MLflow took anything yet: what never did is misspelt rather than away.
        self._reached = parent is not None
        # Weak, so that a long sweep does not keep every network that it has trained.
        self._boxes: weakref.WeakKeyDictionary[Fit, Outbox] = weakref.WeakKeyDictionary()
        # How many epochs are written, and when the last of them was.
        self._written: weakref.WeakKeyDictionary[Fit, tuple[int, float]] = weakref.WeakKeyDictionary()

    def on_fit_start(self, fit: Fit) -> None:
        """Open the fit's run, with settings, tags and dataset, and whatever an earlier process had finished.

        Raises:
            LayerlabError: MLflow takes nothing, and has taken nothing yet.
        """
        from layerlab.training.settings import describe

        attempt = fit.checkpoint.attempt() if fit.checkpoint is not None else uuid.uuid4().hex
        tags = self.tags | common_tags() | {
            "strategy": "+".join(strategy.name for strategy in fit.strategies) or "none",
            "arm": fit.name,
            "seed": str(fit.seed),
            "dataset": fit.data.name,
            "data": fit.data.fingerprint,
        }
        if self.parent:
            tags[NOTEBOOK] = self.parent
        name = f"{fit.name} · {fit.data.name} · seed {fit.seed}"
        box = Outbox(self.folder, self.experiment, name, attempt, tags)
        if not self._reached:
            box.open(PATIENCE)
            self._reached = True
        self._boxes[fit], self._written[fit] = box, (0, 0.0)
        params = describe(fit.settings) | {
            "seed": fit.seed,
            "network": type(fit.run.model).__name__,
            "parameters": sum(p.numel() for p in fit.run.model.parameters()),
            "augment": fit.data.train.augment,
            "train_images": len(fit.data.train),
            "image": "×".join(map(str, fit.data.shape)),
        }
        for strategy in fit.strategies:
            params |= {f"{strategy.name}/{key}": value for key, value in describe(strategy).items()}
        box.add(params={key: str(value) for key, value in params.items()})
        box.add(inputs=[(fit.data.name, fit.data.fingerprint, "local", json.dumps({"uri": fit.data.source}))])
        self._write(fit)

    def on_epoch_end(self, fit: Fit, row: dict[str, Any]) -> None:
        """Log the epoch's metrics, those of quick epochs together."""
        if time.monotonic() - self._written[fit][1] >= PAUSE:
            self._write(fit)

    def on_fit_end(self, fit: Fit, result: FitResult) -> None:
        """Close the run."""
        self._close(fit, "FINISHED")

    def on_exception(self, fit: Fit, error: BaseException) -> None:
        """Close the run as failed, or as killed when a person stopped it."""
        self._close(fit, "FAILED" if isinstance(error, Exception) else "KILLED")

    def _close(self, fit: Fit, status: str) -> None:
        # A fit whose run could not be opened has none.
        if fit in self._boxes:
            self._add(fit)
            self._boxes[fit].add(**ended(status))
            self._boxes[fit].send(last=True)

    def _write(self, fit: Fit) -> None:
        self._add(fit)
        self._boxes[fit].send()

    def _add(self, fit: Fit) -> None:
        """Put the rows of finished epochs that are not written yet into the fit's outbox."""
        done, _ = self._written[fit]
        rows = fit.run.history[done:]
        if rows:
            self._boxes[fit].add(metrics=[
                (name, float(value), row["timestamp"], row["epoch"])
                for row in rows
                for name, value in row.items()
                if name not in ("epoch", "timestamp")
            ])
            self._written[fit] = (done + len(rows), time.monotonic())


def track(experiment: str = "explore", **tags: str) -> Tracker:
    """An observer for `fit` that logs to MLflow: `fit(…, observers=[track("my experiment", idea="a")])`.

    Example:
        >>> from layerlab import build_model, fit, load_dataset, track
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> network = build_model("mlp", num_classes=10, image_size=8, width=16)
        >>> result = fit(network, data, epochs=1, observers=[track("my experiment")], progress=False)
    """
    return Tracker(experiment, tags)
