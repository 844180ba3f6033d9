"""The observer that logs a fit as an MLflow run."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerlab.runs.tracking.store import NOTEBOOK, client, common_tags, log_metrics, log_params, start_run

if TYPE_CHECKING:
    from layerlab.training.loop import Fit
    from layerlab.training.results import FitResult

# Seconds from one writing of a fit's metrics to the next: a call to MLflow takes as long as a small network's epoch.
PAUSE = 1.0


class Tracker:
    """Logs every fit that it observes as an MLflow run of its own.

    Args:
        experiment: MLflow's experiment.
        tags: for every run, such as paper, table and profile.
        parent: id of the notebook's run that they belong to, as a tag.
    """

    def __init__(self, experiment: str, tags: Mapping[str, str] | None = None, parent: str | None = None) -> None:
        self.experiment = experiment
        self.tags = dict(tags or {})
        self.parent = parent
        # Weak, so that a long sweep does not keep every network that it has trained.
        self._runs: weakref.WeakKeyDictionary[Fit, str] = weakref.WeakKeyDictionary()
        # How many epochs are written, and when the last of them was.
        self._written: weakref.WeakKeyDictionary[Fit, tuple[int, float]] = weakref.WeakKeyDictionary()

    def on_fit_start(self, fit: Fit) -> None:
        """Open the fit's run, with settings, tags and dataset, and whatever an earlier process had finished."""
        from mlflow.entities import Dataset, DatasetInput

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
        run_id = start_run(self.experiment, f"{fit.name} · {fit.data.name} · seed {fit.seed}", attempt, tags)
        self._runs[fit], self._written[fit] = run_id, (0, 0.0)
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
        log_params(run_id, params)
        source = Dataset(fit.data.name, fit.data.fingerprint, "local", json.dumps({"uri": fit.data.source}))
        client().log_inputs(run_id, [DatasetInput(source)])
        self._write(fit)

    def on_epoch_end(self, fit: Fit, row: dict[str, Any]) -> None:
        """Log the epoch's metrics, those of quick epochs together."""
        if time.monotonic() - self._written[fit][1] >= PAUSE:
            self._write(fit)

    def on_fit_end(self, fit: Fit, result: FitResult) -> None:
        """Close the run."""
        self._write(fit)
        client().set_terminated(self._runs[fit], "FINISHED")

    def on_exception(self, fit: Fit, error: BaseException) -> None:
        """Close the run as failed, or as killed when a person stopped it; none is open where that is what failed."""
        if fit not in self._runs:
            return
        # What cannot be written must not hide why the fit ends.
        with contextlib.suppress(Exception):
            self._write(fit)
        with contextlib.suppress(Exception):
            client().set_terminated(self._runs[fit], "FAILED" if isinstance(error, Exception) else "KILLED")

    def _write(self, fit: Fit) -> None:
        from mlflow.entities import Metric

        done, _ = self._written[fit]
        rows = fit.run.history[done:]
        metrics = [
            Metric(name, float(value), row["timestamp"], row["epoch"])
            for row in rows
            for name, value in row.items()
            if name not in ("epoch", "timestamp")
        ]
        if rows:
            log_metrics(self._runs[fit], metrics)
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
