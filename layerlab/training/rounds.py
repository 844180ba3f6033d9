"""Several arms under the same seed, epoch by epoch by turns, and what becomes of an arm that fails."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from uuid import uuid4

from layerlab.base.errors import Refused, reason
from layerlab.base.names import file_name
from layerlab.contract.strategy import Strategy
from layerlab.show.progress import Progress
from layerlab.training.asked import Asked
from layerlab.training.evaluation import Metrics
from layerlab.training.loop import Fit, Observer
from layerlab.training.results import FitResult
from layerlab.training.settings import Settings
from layerlab.training.start import Loss, Network
from layerlab.training.untouched import first_batch_digest, left_alone
from layerlab.workload.own import Data


class Arm(NamedTuple):
    """What is trained under a name: a network, with strategies or without, in its settings."""

    name: str
    network: Network
    strategies: tuple[Strategy, ...]
    settings: Settings


class Rounds:
    """Trains arms, one round for each seed and list of arms: `with Rounds(…) as rounds: rounds.train(seed, arms)`.

    Args:
        data, loss, metrics, observers: as `fit`.
        folder: gives the checkpoint's folder of an arm and seed.
        keep_going: arms whose failure ends them alone.
        progress: counts the epochs; its total is what was planned, and is put right where it turns out otherwise.
        planned: epochs of an arm and seed in that total.

    Attributes:
        results: (arm, seed) → result.
        failures: arm that failed → why; it has no results.
        untouched: arms beside which the first batch, and what torch makes of it, was bit-equal before and after.
    """

    def __init__(
        self, data: Data, loss: Loss | None, metrics: Metrics, folder: Folders, observers: Sequence[Observer],
        keep_going: Collection[str], progress: Progress, planned: int,
    ) -> None:
        self.data = data
        self.loss = loss
        self.metrics = metrics
        self.folder = folder
        self.observers = observers
        self.keep_going = keep_going
        self.progress = progress
        self.planned = planned
        self.results: dict[tuple[str, int], FitResult] = {}
        self.failures: dict[str, str] = {}
        self.untouched: dict[str, None] = {}
        self._digests: dict[tuple[int, int], str] = {}
        self._fits: list[Fit] = []
        self._asked = Asked()

    def __enter__(self) -> Rounds:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for each in self._fits:
                if (each.name, each.seed) not in self.results:
                    each.fail(error)
        self.progress.close()

    def train(self, seed: int, arms: Sequence[Arm]) -> None:
        """Train the arms that have not failed to their end, epoch by epoch by turns."""
        self._fits = []
        turns = uuid4().hex
        self._note_batches(seed, arms)
        for arm in arms:
            self.progress.total -= self.planned
            if arm.name not in self.failures:
                with self.attempted(arm.name):
                    self._fits.append(self._begin(arm, seed))
        self.progress.done += sum(each.run.epoch for each in self._fits)
        # Runs that were interrupted at different epochs catch up first.
        while pending := [each for each in self._fits if not each.finished]:
            first = min(each.run.epoch for each in pending)
            for each in pending:
                if each.run.epoch == first:
                    with self.attempted(each.name), _alone(each):
                        each.train_epoch()
                    self._tell(each)
                    if each.strategies and each.run.epoch == first + 1 and each.name not in self.untouched:
                        self._compare_batches(each)
        for each in list(self._fits):
            # What patience left out.
            self.progress.total -= each.run.epochs - each.run.epoch
            with self.attempted(each.name):
                with _alone(each):
                    result = each.finish()
                self.results[each.name, seed] = replace(result, turns=turns)
            if each.strategies:
                self._compare_batches(each)

    def _note_batches(self, seed: int, arms: Sequence[Arm]) -> None:
        """Look at the baseline's first batch before any strategy is at work."""
        if not any(arm.strategies for arm in arms):
            return
        size = min(arms[0].settings.batch_size, len(self.data.train))
        if size not in [known for known, _ in self._digests]:
            self._digests[size, seed] = first_batch_digest(self.data, size, seed)

    def _compare_batches(self, fit: Fit) -> None:
        """Look at the baseline's first batch again, after a turn of an arm with strategies.

        Raises:
            Refused: it, or what torch makes of it, is another one: nothing that trains beside the arm can be compared.
        """
        for (size, seed), digest in self._digests.items():
            if first_batch_digest(self.data, size, seed) != digest:
                raise Refused(
                    f"Since {fit.name!r} trained, the baseline's first batch is no longer bit-equal to what it was "
                    "before: the strategy changes data or torch itself, so nothing can be compared with it; patch "
                    "modules of `run.model`, never torch's functions and classes."
                )
        self.untouched[fit.name] = None

    @contextmanager
    def attempted(self, arm: str) -> Iterator[None]:
        """Work for one arm: if it fails and `keep_going` has it, it is taken out and nothing else."""
        try:
            yield
        # A strategy may fail in any way; KeyboardInterrupt is the user's.
        except (Exception, SystemExit) as error:
            if arm not in self.keep_going:
                raise
            self.failures[arm] = reason(error)
            for each in [each for each in self._fits if each.name == arm]:
                self.progress.total -= each.run.epochs - len(each.run.history)
                self._fits.remove(each)
                each.fail(error)
            self.forget(arm)

    def forget(self, arm: str) -> None:
        """Drop an arm's results, whatever the seed."""
        for key in [key for key in self.results if key[0] == arm]:
            del self.results[key]

    def _begin(self, arm: Arm, seed: int) -> Fit:
        strategies = [copy.deepcopy(strategy) for strategy in arm.strategies]
        made: list[Fit] = []
        with left_alone(repr(arm.name), lambda: (made[0].shared, made[0].data)) if strategies else nullcontext():
            made.append(Fit(
                arm.network, self.data, strategies, seed=seed, name=arm.name, loss=self.loss, metrics=self.metrics,
                checkpoint=self.folder.of(arm.name, seed), observers=self.observers, asked=self._asked,
                **arm.settings.keywords(),
            ))
        fit = made[0]
        self.progress.total += fit.run.epochs
        return fit

    def _tell(self, fit: Fit) -> None:
        """Report the epoch that a fit has finished; nothing if it has failed in it."""
        if fit in self._fits:
            row = fit.run.history[-1]
            reached = f"top-1 {row['test/top1']:.1%}" if "test/top1" in row else f"test loss {row['test/loss']:.3f}"
            self.progress.epoch(f"{fit.name} seed {fit.seed}", row["epoch"], fit.run.epochs,
                                f"loss {row['train/loss']:.3f} {reached}")


def _alone(fit: Fit) -> AbstractContextManager[None]:
    """A turn of a fit, after which it has left alone what others train with."""
    return left_alone(repr(fit.name), lambda: (fit.shared, fit.data)) if fit.strategies else nullcontext()


class Folders(NamedTuple):
    """Where checkpoints lie: one folder for each arm and seed, or the whole for a single one; None for nowhere."""

    root: Path | None
    single: bool

    def of(self, arm: str, seed: int) -> Path | None:
        """The folder of an arm and seed."""
        if self.root is None or self.single:
            return self.root
        return self.root / f"{file_name(arm or 'fit')}-seed{seed}"
