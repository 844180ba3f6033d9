"""One training run, epoch by epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, Unpack, runtime_checkable

import torch
from torch import Tensor

from layerlab.base.devices import resolve_device
from layerlab.base.errors import Diverged, Refused
from layerlab.contract.run import Batches
from layerlab.contract.strategy import Strategy, check_composition, check_needs
from layerlab.show.progress import first_process, say_not_first
from layerlab.training.asked import Asked
from layerlab.training.averaging import Averaging
from layerlab.training.checkpoint import Checkpoint, checkpoint_folder, restore_run, run_state
from layerlab.training.compiling import Compiler, graph_count
from layerlab.training.costs import Costs, learning_key
from layerlab.training.evaluation import Measured, Metrics, evaluate, takes_model
from layerlab.training.fingerprint import fingerprint
from layerlab.training.gauge import Gauge
from layerlab.training.results import FitResult
from layerlab.training.settings import FitSettings, checked_settings, length
from layerlab.training.start import Loss, Network, on_device, prepared, side_of, start
from layerlab.training.stopping import check_patience, waited
from layerlab.training.turns import Turn
from layerlab.training.untouched import lent
from layerlab.training.watch import watched
from layerlab.training.whitening import freeze_bias
from layerlab.workload.dataset import Dataset
from layerlab.workload.own import Given, OwnData, offers, own_data


@runtime_checkable
class Observer(Protocol):
    """An object that follows a fit, such as the one that logs to MLflow.

    Example:
        >>> from layerlab import build_model, fit, load_dataset
        >>> class Counts:
        ...     epochs = 0
        ...     def on_fit_start(self, fit): ...
        ...     def on_epoch_end(self, fit, row): self.epochs += 1
        ...     def on_fit_end(self, fit, result): ...
        ...     def on_exception(self, fit, error): ...
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> counts = Counts()
        >>> network = build_model("mlp", num_classes=10, image_size=8, width=16)
        >>> result = fit(network, data, epochs=2, observers=[counts], progress=False)
        >>> counts.epochs
        2
    """

    def on_fit_start(self, fit: Fit) -> None:
        """Before the first epoch of this process; `fit.run.history` holds what an earlier one finished."""

    def on_epoch_end(self, fit: Fit, row: dict[str, Any]) -> None:
        """After each epoch, when its checkpoint is written."""

    def on_fit_end(self, fit: Fit, result: FitResult) -> None:
        """At the end."""

    def on_exception(self, fit: Fit, error: BaseException) -> None:
        """The fit ends with an error."""


class Fit:
    """One training run, epoch by epoch; `fit` drives it to its end.

    Making it seeds the run, builds or copies the model, lets the strategies adapt it and, if the checkpoint's folder
    holds a state of the same fit, goes back to the end of its last finished epoch.

    Args: as `fit`, and `asked`, the pre-flights that other runs of the same comparison asked for.

    Attributes:
        shared: the data on the run's device, which other arms train with, too.
        data: the same, lent to the strategies: what they write into is copied first.

    Example:
        >>> from layerlab import Fit, build_model, load_dataset
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> training = Fit(build_model("mlp", num_classes=10, image_size=8, width=16), data, epochs=2)
        >>> training.train_epoch()["epoch"]
        1
        >>> training.finished
        False
    """

    def __init__(
        self,
        model: Network,
        data: Given,
        strategies: Strategy | Sequence[Strategy] = (),
        *,
        seed: int = 0,
        name: str = "",
        loss: Loss | None = None,
        metrics: Metrics = MappingProxyType({}),
        checkpoint: str | Path | None = None,
        observers: Sequence[Observer] = (),
        asked: Asked | None = None,
        **settings: Unpack[FitSettings],
    ) -> None:
        data = own_data(data, device=settings.get("device", "auto"))
        self.settings = checked_settings(settings, data.batch_size if isinstance(data, OwnData) else None)
        self.strategies = (strategies,) if isinstance(strategies, Strategy) else tuple(strategies)
        check_composition(self.strategies)
        self.seed = seed
        self.name = name or "+".join(strategy.name for strategy in self.strategies) or "baseline"
        self.writes = first_process()
        self.observers = tuple(observers) if self.writes else ()
        if not self.writes and (observers or checkpoint is not None):
            say_not_first()
        self.device = (
            data.train.device if self.settings.device == "auto" else resolve_device(self.settings.device)
        )
        self.shared = prepared(on_device(data, self.device), self.settings)
        self.data = lent(self.shared) if self.strategies else self.shared
        # What is at work, for whoever waits for it, and how much came back already.
        self._at, self._back = "", 0
        self._turn = Turn(seed, self.device, self.settings)
        self._costs = Costs(every=self.settings.measure == "every")
        self._compiler = Compiler(self.settings.compile)
        self._announced = False
        self._check_step()
        self._metrics = metrics
        Measured(metrics)
        check_patience(self.settings.patience, data.name, data.validation is not None)
        if self.strategies:
            check_needs(self.strategies, data.name, offers(data), loss is not None and takes_model(loss))
        folder = checkpoint_folder(checkpoint)
        with self._turn.taken(), self._watched():
            self.run = start(model, self.data, self.strategies, self.settings, seed, loss, folder, self.writes)
            steps = self._steps_of_data()
            self._averaging = Averaging(self.settings, self.run, self.data.train, length(self.settings, steps)[1])
            state = self._prepare(folder, asked or Asked())
        if state is not None:
            self._turn.random = [part.cpu() for part in state["rng"]]

    def _check_step(self) -> None:
        """Refuse settings of the plain step where a strategy replaces that or acts within its backward.

        Raises:
            Refused: gradients would be neither accumulated nor clipped as they should.
        """
        parts = self.settings.accumulate
        for strategy in self.strategies:
            if parts > 1 and strategy.defines("training_step"):
                raise Refused(f"{strategy.name} replaces the training step, which accumulate={parts} would divide "
                              "into parts; leave accumulate=1.")
            if strategy.acts_in_backward and (parts > 1 or self.settings.clip_norm is not None):
                raise Refused(f"{strategy.name} uses gradients while backward runs, so that they can be neither "
                              "accumulated nor clipped; leave accumulate=1 and clip_norm=None.")
            if strategy.acts_in_backward and self.settings.precision == "float16":
                raise Refused(f"{strategy.name} uses gradients while backward runs, before those of float16 are scaled "
                              "back; take precision='bfloat16'.")

    def _prepare(self, folder: Path | None, asked: Asked) -> dict[str, Any] | None:
        """Let the strategies adapt the run and, where its folder holds a state, go on from it, which is returned."""
        self.run.folder = folder
        self.fingerprint = fingerprint(self.run, self.data, self.strategies, self.settings, self.seed)
        self.run.preflights = asked.of(self.name, self.strategies, self.run)
        self._call("on_fit_start")
        self.checkpoint = Checkpoint(folder, self.fingerprint) if folder is not None else None
        state = self.checkpoint.load(self.device) if self.checkpoint else None
        if state is not None:
            restore_run(self.run, self.strategies, state)
            self._costs.load_state_dict(state["costs"])
        return state

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or as many as `patience` lets it train."""
        limit, patience = self.settings.max_steps, self.settings.patience
        return (self.run.epoch >= self.run.epochs or (limit is not None and self.run.step >= limit)
                or (patience is not None and waited(self.run.history) >= patience))

    def train_epoch(self) -> dict[str, Any]:
        """Train one epoch, evaluate, write the checkpoint, tell the observers; returns the epoch's row."""
        self._announce()
        with self._turn.taken(), self._watched():
            row = self._epoch()
        # First the checkpoint, then the log: what is logged can always be logged again, identically.
        if self.checkpoint is not None and self.writes:
            state = run_state(self.run, self.strategies)
            self.checkpoint.save({**state, "rng": self._turn.random, "costs": self._costs.state_dict()})
        for observer in self.observers:
            observer.on_epoch_end(self, row)
        return row

    def fail(self, error: BaseException) -> None:
        """Tell the observers, if they know of this fit, that it ends here."""
        if self._announced:
            for observer in self.observers:
                observer.on_exception(self, error)

    def finish(self) -> FitResult:
        """Let the strategies leave the deployable network, thaw everything, tell the observers."""
        self._announce()
        run = self.run
        with self._turn.taken(), self._watched():
            self._call("on_fit_end")
            run.thaw()
            self._compiler.release()
            run.optimizer.zero_grad(set_to_none=True)
            run.model.eval()
        result = FitResult(
            run.model, run.history, self.seed, self.name, self.strategies, self.settings, run.step,
            self.data.test.chance, run.preflights
        )
        for observer in self.observers:
            observer.on_fit_end(self, result)
        return result

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """A turn of strategies, from which they come back.

        Raises:
            NeverCameBack: they do not; it says which of them.
        """
        if not self.strategies:
            yield
            return
        with watched(lambda: (self._back, self.run.step if hasattr(self, "run") else 0), lambda: self._at):
            yield

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            for observer in self.observers:
                observer.on_fit_start(self)

    def _epoch(self) -> dict[str, Any]:
        """One epoch and its evaluation; returns its row, which then stands in the history."""
        run = self.run
        run.epoch += 1
        run.logged, run.spent_flops, run.measures_anew = {}, 0.0, False
        moment, done = self.data.train.moment, (run.epoch - 1) / run.epochs
        moment.epoch = run.epoch
        if self.settings.sizes and isinstance(self.data, Dataset):
            moment.side = side_of(self.settings, self.data.test.shape[1], done)
        graphs = graph_count()
        gauge = Gauge(self.device)
        with gauge.hooks():
            key = self._begin()
        self._at = f"A training step of {self.name!r}"
        total = self._steps(gauge, key)
        with gauge.hooks():
            self._call("on_epoch_end")
            settled = self._averaging.on and self.finished
            if settled:
                self._averaging.settle()
        seconds, costs = gauge.seconds(run.steps_per_epoch), self._taken(gauge)
        if run.schedule_each == "epoch":
            run.schedule.step()
        loss = self._finite(total.item() / run.steps_per_epoch)
        row: dict[str, Any] = {"epoch": run.epoch, "timestamp": time.time_ns() // 1_000_000, "train/loss": loss}
        with self._averaging.shown():
            row |= self._evaluate(run.test_data, "test")
            if self.data.validation is not None:
                row |= self._evaluate(self.data.validation, "validation")
            self._call("on_validation_end")
        row["time/epoch_seconds"] = seconds
        row |= costs
        if self._compiler.blocks:
            row["compile/graphs"] = graph_count() - graphs
        row |= run.logged
        run.history.append(row)
        if self.settings.averaging == "ema" and self.finished and not settled:
            # Ended by its patience, which only the evaluation could tell: it showed these averages.
            self._averaging.settle()
        return row

    def _begin(self) -> str:
        """Training mode, the strategies' hooks, the number of steps, compiling; returns the key of what learns."""
        run = self.run
        run.training_model.train()
        run.apply_freezing()
        if self.settings.whitening:
            freeze_bias(run)
        run.steps_per_epoch = self._steps_of_data()
        self._call("on_epoch_start")
        # Again, since a strategy may have put other data there.
        run.steps_per_epoch = self._steps_of_data()
        self._compiler.follow(run)
        return learning_key(run)

    def _steps_of_data(self) -> int:
        """Steps of an epoch of the present data, as far as the limit allows them."""
        steps = len(self.run.data) // self.settings.batch_size
        limit = self.settings.max_steps
        return steps if limit is None else min(steps, limit - self.run.step)

    def _steps(self, gauge: Gauge, key: str) -> Tensor:
        """All steps of an epoch; the sum of their losses, a scalar on the device."""
        run, settings, steps = self.run, self.settings, self.run.steps_per_epoch
        step = self._step()
        each_step = run.schedule.step if run.schedule_each == "step" else None
        # Steps that are measured, and the one that compiles, do not belong into the epoch's time.
        measure, costs = bool(settings.measure), self._costs
        if measure:
            costs.begin(key, steps, 1000 * self.seed + run.epoch, bool(self.strategies))
        compiling = 0 if steps > 2 and self._compiler.warms_up(key) else None
        total = torch.zeros((), device=self.device)
        averaging = self._averaging
        batches = run.data.batches(settings.batch_size, run.generator, torch.float32, run.memory_format)
        if settings.max_steps is not None:
            batches = islice(batches, steps)
        with gauge.loop():
            for index, (x, y) in enumerate(batches):
                if measure and run.measures_anew:
                    run.measures_anew = False
                    costs.anew(index)
                if measure and costs.wants(index):
                    with gauge.aside(), costs.metered(run, x, y):
                        total += step(x, y)
                elif index == compiling:
                    with gauge.aside():
                        total += step(x, y)
                else:
                    total += step(x, y)
                run.step += 1
                if averaging.on:
                    averaging.follow()
                if each_step is not None:
                    each_step()
        return total

    def _step(self) -> Callable[[Any, Any], Tensor]:
        """One step as a function of a batch that returns its detached loss."""
        run = self.run
        step: Callable[..., Tensor] = run.plain_step
        for strategy in self.strategies:
            if strategy.defines("training_step"):
                # Batches of several tensors come from strategies that are not composed with such a one.
                step = partial(strategy.training_step, run)
        hooks = [each.on_train_batch_start for each in self.strategies if each.defines("on_train_batch_start")]
        if not hooks:
            return lambda x, y: step(x, y).detach()

        def with_hooks(x: Any, y: Any) -> Tensor:
            for hook in hooks:
                hook(run)
            return step(x, y).detach()

        return with_hooks

    def _taken(self, gauge: Gauge) -> dict[str, float]:
        """The epoch's `cost/…`, as far as it was measured."""
        run = self.run
        row = self._costs.row() if self.settings.measure else {}
        if "cost/forward_flops" in row:
            row["cost/forward_flops"] += run.spent_flops
        allocated = gauge.allocated()
        if allocated is not None:
            row["cost/peak_memory_bytes"] = allocated - self._turn.others
        elif "cost/peak_memory_bytes" in row:
            # What a strategy keeps in memory to read batches from; a GPU's allocator counts it by itself.
            row["cost/peak_memory_bytes"] += getattr(run.data, "resident_bytes", 0)
            row["cost/peak_memory_bytes"] += sum(each.nbytes for kept in run.kept.values() for each in kept.values())
        joules = gauge.joules()
        if joules is not None:
            row["cost/energy_joules"] = joules
        return row

    def _finite(self, loss: float) -> float:
        """The epoch's mean loss.

        Raises:
            Diverged: it is not finite.
        """
        if math.isfinite(loss):
            return loss
        raise Diverged(
            f"Training diverged: the loss of {self.name!r} (seed {self.seed}) is {loss} in epoch {self.run.epoch}; "
            f"lower the learning rate ({self.settings.lr:g}) or start from other weights.",
            [*self.run.history, {"epoch": self.run.epoch, "train/loss": loss}],
        )

    def _evaluate(self, data: Batches, half: str) -> dict[str, float]:
        """`half/loss`, `half/top1` and `half/top5` of the network that predicts."""
        run, settings = self.run, self.settings
        views = settings.views if run.epoch >= settings.views_from * run.epochs else "plain"
        reached = evaluate(run.model, data, run.loss, autocast=run.autocast, memory_format=run.memory_format,
                           views=views, metrics=self._metrics)
        return {name.replace("test/", f"{half}/"): value for name, value in reached.items()}

    def _call(self, hook: str) -> None:
        for strategy in self.strategies:
            if strategy.defines(hook):
                self._at = f"{hook} of {strategy.name!r}"
                getattr(strategy, hook)(self.run)
                self._back += 1
