"""The observer that logs a fit as an MLflow run."""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlab.runs.answer import interval_metrics
from layerlab.runs.tracking.database import PATIENCE
from layerlab.runs.tracking.outbox import Outbox, ended
from layerlab.runs.tracking.store import GROUP, NOTEBOOK, common_tags
from layerlab.show.interval import mean_interval

if TYPE_CHECKING:
    from layerlab.training.loop import Fit
    from layerlab.training.results import Comparison, FitResult

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
        comparison: an id of what the fits are trained for, by which the seeds of an arm are found together.
        title: what the fits are trained for, in the names of their runs. Default: the dataset's name.
    """

    def __init__(
        self, experiment: str, tags: Mapping[str, str] | None = None, parent: str | None = None,
        folder: Path | None = None, comparison: str = "", title: str = "",
    ) -> None:
        self.experiment = experiment
        self.tags = dict(tags or {})
        self.parent = parent
        self.folder = folder
        self.comparison = comparison or uuid.uuid4().hex
        self.title = title
        # Arm → the tags that all its seeds share.
        self._arms: dict[str, dict[str, str]] = {}
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
        shared = self.tags | common_tags() | {
            "strategy": "+".join(strategy.name for strategy in fit.strategies) or "none",
            "arm": fit.name,
            "dataset": fit.data.name,
            "data": fit.data.fingerprint,
            GROUP: self._group(fit.name),
        }
        if self.parent:
            shared[NOTEBOOK] = self.parent
        self._arms[fit.name] = shared
        tags = shared | {"seed": str(fit.seed)}
        name = f"{fit.name} · {self.title or fit.data.name} · seed {fit.seed}"
        box = Outbox(self.folder, self.experiment, name, attempt, tags)
        if not self._reached:
            box.open(PATIENCE)
            self._reached = True
        self._boxes[fit], self._written[fit] = box, (0, 0.0)
        params = describe(fit.settings) | {
            "seed": fit.seed,
            "network": type(fit.run.model).__name__,
            "augment": fit.data.train.augment,
            "train_images": len(fit.data.train),
            "image": "×".join(map(str, fit.data.shape)),
        }
        if not fit.run.history:
            # After an interruption a pruned network has fewer; the run keeps those with which it began.
            params["parameters"] = sum(p.numel() for p in fit.run.model.parameters())
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

    def log_arms(self, comparison: Comparison) -> None:
        """Log each arm with several seeds as a run of its own, of the kind `arm`: of each metric of the last epoch and
        of what a run costs the mean, and the ends of its 95 % interval as `METRIC low` and `METRIC high`.

        It has the tag `layerlab.group` of the seeds, by which they are found, and is the same run when it is logged
        again, with more seeds say.
        """
        for arm, tags in self._arms.items():
            if arm not in comparison.arms or len(comparison.seeds) < 2:
                continue
            from layerlab.training.results import SUMMARY  # pandas and torch, which a tracker alone does not need

            results = comparison.of(arm)
            metrics: dict[str, float] = {"seeds": float(len(results))}
            for name in SUMMARY:
                metrics |= _interval(name, comparison.per_seed(name, arm))
            for name in dict.fromkeys(name for result in results for name in result.final):
                if name not in ("epoch", "timestamp"):
                    metrics |= _interval(name, [float(result.final.get(name, math.nan)) for result in results])
            last = max(result.final["timestamp"] for result in results)
            epochs = max(result.final["epoch"] for result in results)
            name = f"mean · {arm} · {self.title or tags['dataset']}"
            box = Outbox(self.folder, self.experiment, name, self._group(arm), tags | {"kind": "arm"})
            box.add(metrics=[(name, value, last, epochs) for name, value in metrics.items()])
            # The run is made now, so that it does not end before it began.
            box.send()
            box.add(**ended("FINISHED"))
            box.send(last=True)

    def _group(self, arm: str) -> str:
        return hashlib.blake2b(f"{self.comparison}/{arm}".encode(), digest_size=16).hexdigest()

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


def _interval(name: str, values: Sequence[float]) -> dict[str, float]:
    return interval_metrics(name, *mean_interval(values)) if all(map(math.isfinite, values)) else {}


def track(experiment: str = "explore", **tags: str) -> Tracker:
    """An observer for `fit` that logs to MLflow: `fit(…, observers=[track("my experiment", idea="a")])`.

    Example:
        >>> from layerlab import build_model, fit, load_dataset, track
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> network = build_model("mlp", num_classes=10, image_size=8, width=16)
        >>> result = fit(network, data, epochs=1, observers=[track("my experiment")], progress=False)
    """
    return Tracker(experiment, tags)
