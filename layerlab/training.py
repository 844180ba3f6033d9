"""fit(): the one training loop, and compare(): several of them by turns."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from layerlab import tables
from layerlab.checkpoint import Checkpoint, random_state, set_random_state
from layerlab.data import Dataset, Split, resolve_device
from layerlab.errors import LayerlabError, first_line, reason, sentence
from layerlab.measure import Energy, Meter, StepCost, mean_interval, synchronise
from layerlab.progress import Progress, first_process
from layerlab.strategy import Batches, LayerMap, Run, Strategy, check_composition

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Schedules = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class Settings(BaseModel):
    """The settings of `fit`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, arbitrary_types_allowed=True)

    epochs: int = Field(10, ge=1)
    """Passes over the training data."""
    batch_size: int = Field(128, ge=1)
    """Images a step; the uneven rest of each shuffled epoch is left out."""
    optimizer: Literal["sgd", "adam", "adamw"] | Optimizers = "sgd"
    """By name, or a function from parameters to an optimizer."""
    lr: float = Field(0.05, ge=0)
    """Learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD."""
    nesterov: bool = False
    """SGD's momentum in Nesterov's form."""
    weight_decay: float = Field(5e-4, ge=0)
    """On all parameters."""
    schedule: Literal["constant", "cosine", "step"] | Schedules = "constant"
    """Of the learning rate, by name, or a function from the optimizer to a torch schedule."""
    milestones: tuple[int, ...] = ()
    """Schedule `step`: multiply the rate by `gamma` after these many epochs."""
    gamma: float = Field(0.1, gt=0)
    """Schedule `step`: the factor."""
    schedule_each: Literal["epoch", "step"] = "epoch"
    """How often the schedule steps; `milestones` count in the same unit."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Of the cross-entropy."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: forward and loss under autocast; weights and update stay float32."""
    channels_last: bool = False
    """Memory format of images and convolutions."""
    compile: bool | str = False
    """Run the network's blocks through torch.compile; a text names its backend."""
    deterministic: bool = True
    """On a GPU: deterministic algorithms only."""
    measure: bool = True
    """Measure a step whenever the set of learning parameters is a new one."""
    device: str = "auto"
    """`auto`: where the data are."""

    @field_validator("compile")
    @classmethod
    def _known_backend(cls, value: bool | str) -> bool | str:
        if isinstance(value, str) and value not in (known := torch._dynamo.list_backends(exclude_tags=())):
            raise ValueError(f"should be true, false or one of {', '.join(known)}")
        return value


class Observer(Protocol):
    """What follows a fit: tracking, say."""

    def on_fit_start(self, fit: Fit) -> None:
        """Before the first epoch of this process; `fit.run.history` holds what an earlier one finished."""

    def on_epoch_end(self, fit: Fit, row: dict[str, Any]) -> None:
        """After each epoch, when its checkpoint is written."""

    def on_fit_end(self, fit: Fit, result: FitResult) -> None:
        """At the end."""

    def on_exception(self, fit: Fit, error: BaseException) -> None:
        """The fit ends with an error."""


@dataclass(eq=False)
class FitResult:
    """What a fit leaves.

    Attributes:
        model: the trained network, in evaluation mode, as a user deploys it.
        history: one row an epoch; metric names as in MLflow, and `epoch`, `timestamp` (ms).
        seed: the fit's.
        name: of the arm in a comparison, or the strategies' names.
        strategies: the strategy objects as the fit left them.
        settings: the fit's.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    seed: int
    name: str
    strategies: tuple[Strategy, ...]
    settings: Settings

    @property
    def frame(self) -> pd.DataFrame:
        """The history as a table, with `seconds`, the training time up to each epoch's end."""
        frame = pd.DataFrame(self.history).drop(columns="timestamp")
        frame["seconds"] = frame["time/epoch_seconds"].cumsum()
        return frame

    @property
    def final(self) -> dict[str, Any]:
        """The last epoch's row."""
        return self.history[-1]

    @property
    def layer_maps(self) -> dict[str, LayerMap]:
        """The layer × epoch maps of its strategies, as `strategy: title`."""
        return {f"{strategy.name}: {title}": each for strategy in self.strategies
                for title, each in strategy.layer_maps(self.history).items()}

    @property
    def headline(self) -> str:
        """The result in a line."""
        row, seconds = self.final, total(self, "time/epoch_seconds")
        return (
            f"{self.name}, seed {self.seed}: top-1 {row['test/top1']:.2%} after {row['epoch']} epochs "
            f"and {seconds:.1f} s of training"
        )

    def __repr__(self) -> str:
        return self.headline

    def __str__(self) -> str:
        return tables.fit_table(self).text()

    def _repr_html_(self) -> str:
        from layerlab import figures

        maps = self.layer_maps
        drawn = tables.picture(figures.png(figures.layer_maps(maps))) if maps else ""
        return tables.fit_table(self)._repr_html_() + drawn


class Fit:
    """One training run, epoch by epoch; `fit` drives it to its end.

    Making it seeds the run, builds or copies the model, lets the strategies adapt it and, if the checkpoint's folder
    holds a state of the same fit, goes back to the end of its last finished epoch.

    Args: as `fit`.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        data: Dataset,
        strategies: Strategy | Sequence[Strategy] = (),
        *,
        seed: int = 0,
        name: str = "",
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        checkpoint: str | Path | None = None,
        observers: Sequence[Observer] = (),
        **settings: Any,
    ) -> None:
        self.settings = _settings(settings)
        self.strategies = (strategies,) if isinstance(strategies, Strategy) else tuple(strategies)
        check_composition(self.strategies)
        self.seed = seed
        self.name = name or "+".join(strategy.name for strategy in self.strategies) or "baseline"
        self.writes = first_process()
        self.observers = tuple(observers) if self.writes else ()
        self.device = (
            data.train.labels.device if self.settings.device == "auto" else resolve_device(self.settings.device)
        )
        self.data = _on_device(data, self.device)
        if len(data.train) < self.settings.batch_size:
            raise LayerlabError(
                f"batch_size {self.settings.batch_size} is larger than the {len(data.train)} training images of "
                f"{data.name!r}; make it smaller."
            )
        self._own_bytes = 0
        self._rng_state = _seeded(seed, self.device)
        self._costs: dict[str, StepCost] = {}
        self._compiled: list[nn.Module] = []
        self._eager = not self.settings.compile
        self._warm: set[str] = set()
        with self._turn():
            self.run = self._start(model, loss)
            self.run.folder = Path(checkpoint) if checkpoint is not None else None
            self.fingerprint = self._fingerprint()
            for strategy in self.strategies:
                strategy.on_fit_start(self.run)
            self.checkpoint = Checkpoint(Path(checkpoint), self.fingerprint) if checkpoint is not None else None
            state = self.checkpoint.load(self.device) if self.checkpoint else None
            if state is not None:
                self._restore(state)
        if state is not None:
            self._rng_state = [part.cpu() for part in state["rng"]]
        self._announced = False

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.run.epoch >= self.settings.epochs

    def train_epoch(self) -> dict[str, Any]:
        """Train one epoch, evaluate, write the checkpoint, tell the observers; returns the epoch's row."""
        self._announce()
        with self._turn():
            row = self._epoch()
        # First the checkpoint, then the log: what is logged can always be logged again, identically.
        if self.checkpoint is not None and self.writes:
            self.checkpoint.save(self._state())
        for observer in self.observers:
            observer.on_epoch_end(self, row)
        return row

    def fail(self, error: BaseException) -> None:
        """Tell the observers, if they know of this fit, that it ends here."""
        if self._announced:
            for observer in self.observers:
                observer.on_exception(self, error)

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            for observer in self.observers:
                observer.on_fit_start(self)

    def finish(self) -> FitResult:
        """Let the strategies leave the deployable network, thaw everything, tell the observers."""
        self._announce()
        with self._turn():
            for strategy in self.strategies:
                strategy.on_fit_end(self.run)
            for owner in list(self.run._frozen):
                self.run.freeze(owner, ())
            self._uncompile()
            self.run.optimizer.zero_grad(set_to_none=True)
            self.run.model.eval()
        result = FitResult(
            self.run.model, self.run.history, self.seed, self.name, self.strategies, self.settings
        )
        for observer in self.observers:
            observer.on_fit_end(self, result)
        return result

    # ------------------------------------------------------------------------------------ one epoch

    def _epoch(self) -> dict[str, Any]:
        run, settings = self.run, self.settings
        run.epoch += 1
        run.logged = {}
        synchronise(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        energy = Energy(self.device)
        graphs = _graphs()
        start = time.perf_counter()
        run.training_model.train()
        run.apply_freezing()
        run.steps_per_epoch = len(run.data) // settings.batch_size
        self._call("on_epoch_start")
        run.steps_per_epoch = steps = len(run.data) // settings.batch_size
        self._compile_blocks()
        key = self._active()
        # The step that is measured, and the one that compiles, do not belong into the epoch's time.
        measured = min(1, steps - 1) if settings.measure and key not in self._costs else -1
        untimed = {measured} - {-1}
        if self._compiled and key not in self._warm and steps > 2:
            self._warm.add(key)
            untimed.add(0)
        total = torch.zeros((), device=self.device)
        synchronise(self.device)
        before_steps = time.perf_counter() - start
        looped, outside = self._steps(total, key, untimed, measured)
        hooks_start = time.perf_counter()
        self._call("on_epoch_end")
        synchronise(self.device)
        hooks = before_steps + time.perf_counter() - hooks_start
        timed = steps - len(untimed)
        seconds = hooks + ((looped - outside) * steps / timed if timed else looped)
        joules = energy.joules()
        peak = torch.cuda.max_memory_allocated(self.device) - self._other_bytes if self.device.type == "cuda" else None

        if run.schedule_each == "epoch":
            run.schedule.step()
        mean_loss = total.item() / steps
        if not math.isfinite(mean_loss):
            raise LayerlabError(
                f"Training diverged: the loss of {self.name!r} (seed {self.seed}) is {mean_loss} in epoch {run.epoch}; "
                f"lower the learning rate ({settings.lr:g}) or start from other weights."
            )
        row: dict[str, Any] = {"epoch": run.epoch, "timestamp": time.time_ns() // 1_000_000, "train/loss": mean_loss}
        row |= evaluate(run.model, run.test_data, run.loss, autocast=run.autocast, memory_format=self._memory_format)
        self._call("on_validation_end")
        row["time/epoch_seconds"] = seconds
        cost = self._costs.get(key)
        if cost is not None:
            row["cost/forward_flops"] = cost.forward_flops * steps
            row["cost/backward_flops"] = cost.backward_flops * steps
            row["cost/bytes_moved"] = cost.bytes_moved * steps
            if peak is None and cost.peak_memory_bytes is not None:
                # What a strategy keeps in memory to read batches from; a GPU's allocator counts it by itself.
                peak = cost.peak_memory_bytes + getattr(run.data, "resident_bytes", 0)
        if peak is not None:
            row["cost/peak_memory_bytes"] = peak
        if joules is not None:
            row["cost/energy_joules"] = joules
        if self._compiled:
            row["compile/graphs"] = _graphs() - graphs
        row |= run.logged
        run.history.append(row)
        return row

    def _steps(self, total: Tensor, key: str, untimed: set[int], measured: int) -> tuple[float, float]:
        """All steps of an epoch; adds their losses to `total`. Returns seconds: the loop's, its untimed steps'."""
        run, settings = self.run, self.settings
        step = self._step()
        each_step = run.schedule.step if run.schedule_each == "step" else None
        outside = 0.0
        start = time.perf_counter()
        for index, (x, y) in enumerate(run.data.batches(settings.batch_size, run.generator, torch.float32,
                                                        self._memory_format)):
            if index in untimed:
                synchronise(self.device)
                pause = time.perf_counter()
                if index == measured:
                    with Meter(run.model, run.training_model, run.optimizer, *tree_leaves((x, y))) as meter:
                        total += step(x, y)
                    assert meter.cost is not None
                    self._costs[key] = meter.cost
                else:
                    total += step(x, y)
                synchronise(self.device)
                outside += time.perf_counter() - pause
            else:
                total += step(x, y)
            run.step += 1
            if each_step is not None:
                each_step()
        synchronise(self.device)
        return time.perf_counter() - start, outside

    def _step(self) -> Callable[[Tensor | tuple[Tensor, ...], Tensor], Tensor]:
        """One step as a function of a batch that returns its detached loss."""
        run = self.run
        for strategy in self.strategies:
            if strategy.defines("training_step"):
                # Batches of several tensors come from strategies that are not composed with such a one.
                return lambda x, y: strategy.training_step(run, x, y).detach()  # type: ignore[arg-type]
        return lambda x, y: run.plain_step(x, y).detach()

    def _call(self, hook: str) -> None:
        for strategy in self.strategies:
            if strategy.defines(hook):
                getattr(strategy, hook)(self.run)

    def _active(self) -> str:
        """A digest of what learns: names and shapes of the parameters with gradients, and the batch's shape."""
        parts = [f"{name}{tuple(p.shape)}" for name, p in self.run.training_model.named_parameters() if p.requires_grad]
        parts.append(str(getattr(self.run.data, "shape", "")))
        return hashlib.blake2b("|".join(parts).encode(), digest_size=8).hexdigest()

    # ------------------------------------------------------------------------------------ compiling

    def _compile_blocks(self) -> None:
        """Compile each block of the training network on its own, if that is wanted and not done.

        Blocks rather than the whole, because every new pattern of frozen layers compiles anew, and only the blocks at
        its edge change with it.
        """
        run = self.run
        if run.frozen and not self._eager and _TORCH < (2, 12):
            self._eager = True
            self._uncompile()
            warnings.warn(
                "torch before 2.12 gives a compiled layer that was frozen no gradient after it is thawed; going on "
                "eagerly. Install torch 2.12 or later to compile with a strategy that freezes.",
                stacklevel=2,
            )
        blocks = [] if self._eager else _blocks(run.training_model)
        if blocks == self._compiled:
            return
        self._uncompile()
        takes = inspect.signature(torch.compile).parameters
        options: dict[str, Any] = {"dynamic": False}
        if isinstance(self.settings.compile, str):
            options["backend"] = self.settings.compile
        for block in blocks:
            if "isolate_recompiles" in takes:
                options["isolate_recompiles"] = True
            if "recompile_limit" in takes:
                # One graph a pattern of frozen layers, in training and in evaluation.
                options["recompile_limit"] = 2 * len(list(block.modules())) + 8
            block.compile(**options)
        self._compiled = blocks

    def _uncompile(self) -> None:
        for block in self._compiled:
            block._compiled_call_impl = None
        self._compiled = []

    # ------------------------------------------------------------------------------------ start, stop, go on

    def _start(self, model: nn.Module | Callable[[], nn.Module], loss: Any) -> Run:
        settings = self.settings
        network = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        if not isinstance(network, nn.Module):
            raise LayerlabError(f"model must be an nn.Module or a function that builds one, got {type(network)!r}.")
        self._memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        # Both at once is not in torch's stubs.
        network = network.to(self.device, memory_format=self._memory_format)  # type: ignore[call-overload]
        parameters = list(network.parameters())
        if not parameters:
            raise LayerlabError("The network has no parameters, so there is nothing to train.")
        optimizer = _optimizer(settings, parameters)
        run = Run(
            model=network,
            training_model=network,
            optimizer=optimizer,
            schedule=_schedule(settings, optimizer, len(self.data.train) // settings.batch_size),
            data=self.data.train,
            test_data=self.data.test,
            loss=loss or nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing),
            example=next(self.data.test.batches(min(2, len(self.data.test)), memory_format=self._memory_format))[0],
            epochs=settings.epochs,
            device=self.device,
            generator=torch.Generator().manual_seed(self.seed),
            batch_size=settings.batch_size,
            schedule_each=settings.schedule_each,
        )
        if settings.precision == "bfloat16":
            run.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16)
        run.after_backward = [
            strategy.on_after_backward for strategy in self.strategies if strategy.defines("on_after_backward")
        ]
        try:
            with torch.no_grad():
                was = network.training
                network.eval()
                logits = network(run.example)
                network.train(was)
        except (RuntimeError, ValueError, TypeError) as error:
            raise LayerlabError(
                f"The network does not take images of shape {tuple(run.example.shape[1:])} as {self.data.name!r} gives "
                f"them ({first_line(error)}); load the data with another image_size or channels."
            ) from None
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < self.data.classes:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise LayerlabError(
                f"The network gives {shape} for {len(run.example)} images, but {self.data.name!r} has "
                f"{self.data.classes} classes: it must give one logit a class."
            )
        return run

    def _state(self) -> dict[str, Any]:
        run = self.run
        return {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "schedule": run.schedule.state_dict(),
            "strategies": {strategy.name: strategy.state_dict() for strategy in self.strategies},
            "rng": self._rng_state,
            "generator": run.generator.get_state(),
            "epoch": run.epoch,
            "step": run.step,
            "history": run.history,
            "costs": {key: asdict(cost) for key, cost in self._costs.items()},
        }

    def _restore(self, state: dict[str, Any]) -> None:
        run = self.run
        run.epoch, run.step, run.history = state["epoch"], state["step"], state["history"]
        for strategy in self.strategies:
            strategy.load_state_dict(state["strategies"][strategy.name])
        for strategy in self.strategies:
            strategy.on_load_checkpoint(run)
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.schedule.load_state_dict(state["schedule"])
        run.generator.set_state(state["generator"].cpu())
        self._costs = {key: StepCost(**cost) for key, cost in state["costs"].items()}

    def _fingerprint(self) -> str:
        """A digest of everything that decides the outcome: see `Checkpoint`."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in self.run.model.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        train = self.data.train
        digest.update(json.dumps(
            {
                "settings": describe(self.settings),
                "strategies": [[s.name, describe(s), _source(type(s))] for s in self.strategies],
                "seed": self.seed,
                "data": [self.data.name, self.data.fingerprint, train.augment, train.padding],
            },
            sort_keys=True,
        ).encode())
        return digest.hexdigest()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """This run's random state, determinism and memory accounting, so that several runs can take turns."""
        with ExitStack() as stack:
            outside = random_state(self.device)
            set_random_state(self._rng_state, self.device)
            stack.callback(set_random_state, outside, self.device)
            if self.device.type == "cuda":
                if self.settings.deterministic:
                    stack.enter_context(_deterministic())
                before = torch.cuda.memory_allocated(self.device)
                self._other_bytes = before - self._own_bytes
            if self.settings.compile:
                stack.enter_context(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
            yield
            self._rng_state = random_state(self.device)
            if self.device.type == "cuda":
                self._own_bytes += torch.cuda.memory_allocated(self.device) - before


_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def fit(
    model: nn.Module | Callable[[], nn.Module],
    data: Dataset,
    strategies: Strategy | Sequence[Strategy] = (),
    *,
    seed: int | Sequence[int] = 0,
    name: str = "",
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    checkpoint: str | Path | None = None,
    observers: Sequence[Observer] = (),
    progress: bool = True,
    **settings: Any,
) -> Any:
    """Train a network.

    Args:
        model: any `nn.Module` that maps images to logits (it is copied, not changed), or a function without arguments
            that builds one; the function is called under the seed, so that each seed has its own initial weights.
        data: from `load_dataset`.
        strategies: one or several, from `layerlab.strategies` or written by you.
        seed: one, or several to train one after the other.
        name: what to call this in logs and tables. Default: the strategies' names.
        loss: maps (logits, labels) to a scalar. Default: cross-entropy.
        checkpoint: a folder. The state at each epoch's end is kept there; started again with the same arguments after
            an interruption, the fit goes on from there and ends with the same weights as if undisturbed. Of the
            processes of a torchrun job all read it and the first (`RANK` 0) alone writes it.
        observers: told of each epoch; `layerlab.track(…)` gives one that logs to MLflow. In a torchrun job those of the
            first process alone are told.
        progress: show bars.
        settings: any field of `Settings`:

    Returns:
        A `FitResult`; a list of them when several seeds are given.

    Raises:
        LayerlabError: settings that do not validate, strategies that cannot run together, a network that does not
            fit the data, a checkpoint of another fit, a loss that is no longer finite.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    comparison = compare(
        model, data, {name or None: strategies}, seeds=seeds, loss=loss, checkpoint=checkpoint, observers=observers,
        progress=progress, **settings,
    )
    results = list(comparison.results.values())
    return results[0] if isinstance(seed, int) else results


def compare(
    model: nn.Module | Callable[[], nn.Module] | Mapping[Any, nn.Module | Callable[[], nn.Module]],
    data: Dataset,
    arms: Mapping[Any, Strategy | Sequence[Strategy]],
    *,
    seeds: Sequence[int] = (0,),
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    checkpoint: str | Path | None = None,
    observers: Sequence[Observer] = (),
    progress: bool = True,
    keep_going: Collection[str] = (),
    **settings: Any,
) -> Comparison:
    """Train a network with different strategies under the same seeds, epoch by epoch by turns.

    By turns, so that whatever slows the machine for a while slows all arms alike and ratios of seconds stay honest.

    Args:
        model: as `fit`, the same for all arms; or name of an arm → its own.
        arms: name → strategy or strategies; the baseline is an arm with none: `{"conventional": (), "mine": Mine()}`.
        seeds: each arm is trained with each.
        checkpoint: a folder; every run gets a folder of its own in it.
        keep_going: arms that are left out when they refuse the network or fail in whatever way, with the reason in the
            result's `failures`. The error of any other ends the comparison.
        data, loss, observers, progress, settings: as `fit`.

    Returns:
        All results, with tables of them.
    """
    if isinstance(model, Mapping) and (missing := [arm for arm in arms if arm not in model]):
        raise LayerlabError(f"No network is given for arm {missing[0]!r}; give one for each arm.")
    if not seeds:
        raise LayerlabError("seeds is empty; give at least one.")
    checked = _settings(settings)
    bars = Progress(len(arms) * len(seeds) * checked.epochs, progress)
    results: dict[tuple[str, int], FitResult] = {}
    failures: dict[str, str] = {}
    fits: list[Fit] = []

    @contextmanager
    def attempted(arm: str, seed: int) -> Iterator[None]:
        """Whatever an arm does, alone: where `keep_going` says so its failure takes it out and nothing else."""
        try:
            yield
        # A strategy may fail in any way; KeyboardInterrupt is the user's.
        except (Exception, SystemExit) as error:
            if arm not in keep_going:
                raise
            failures[arm] = reason(error)
            bars.total -= (len(seeds) - seeds.index(seed)) * checked.epochs
            for each in [each for each in fits if each.name == arm]:
                bars.total += len(each.run.history)
                fits.remove(each)
                each.fail(error)
            for key in [key for key in results if key[0] == arm]:
                del results[key]

    try:
        for seed in seeds:
            fits.clear()
            for arm, strategies in arms.items():
                if arm in failures:
                    continue
                chosen = (strategies,) if isinstance(strategies, Strategy) else tuple(strategies)
                network = model[arm] if isinstance(model, Mapping) else model
                folder = Path(checkpoint) if checkpoint is not None else None
                if folder is not None and len(arms) * len(seeds) > 1:
                    folder /= f"{arm or 'fit'}-seed{seed}"
                with attempted(arm, seed):
                    fits.append(Fit(
                        network, data, [copy.deepcopy(strategy) for strategy in chosen], seed=seed, name=arm or "",
                        loss=loss, checkpoint=folder, observers=observers, **settings,
                    ))
            bars.done += sum(each.run.epoch for each in fits)
            # Runs that were interrupted at different epochs catch up first.
            while pending := [each for each in fits if not each.finished]:
                first = min(each.run.epoch for each in pending)
                for each in pending:
                    if each.run.epoch == first:
                        with attempted(each.name, seed):
                            each.train_epoch()
                        if each in fits:
                            row = each.run.history[-1]
                            bars.epoch(f"{each.name} seed {seed}", row["epoch"], checked.epochs,
                                       f"loss {row['train/loss']:.3f} top-1 {row['test/top1']:.1%}")
            for each in list(fits):
                with attempted(each.name, seed):
                    results[each.name, seed] = each.finish()
    except BaseException as error:
        for each in fits:
            if (each.name, each.seed) not in results:
                each.fail(error)
        raise
    finally:
        bars.close()
    return Comparison(results, failures)


@dataclass(eq=False)
class Comparison:
    """Results of several arms and seeds.

    Attributes:
        results: (arm, seed) → result.
        failures: arm that was left out of them → why.
    """

    results: dict[tuple[str, int], FitResult]
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """In the order given."""
        return list(dict.fromkeys(arm for arm, _ in self.results))

    @property
    def seeds(self) -> list[int]:
        """In the order given."""
        return list(dict.fromkeys(seed for _, seed in self.results))

    @property
    def frame(self) -> pd.DataFrame:
        """One row an arm, seed and epoch, with `seconds` of training up to the epoch's end."""
        frames = [result.frame.assign(arm=arm, seed=seed) for (arm, seed), result in self.results.items()]
        return pd.concat(frames, ignore_index=True)

    @property
    def runs(self) -> pd.DataFrame:
        """One row an arm and seed: what a run reached and cost, columns as in `SUMMARY`."""
        return pd.DataFrame([{"arm": arm, "seed": seed} | {name: value(result) for name, value in SUMMARY.items()}
                             for (arm, seed), result in self.results.items()])

    def per_seed(self, value: Callable[[FitResult], float], arm: str) -> list[float]:
        """`value` of each seed's result of an arm."""
        return [value(self.results[arm, seed]) for seed in self.seeds]

    @property
    def summary(self) -> pd.DataFrame:
        """One row an arm: mean and 95 % half-width over seeds of accuracy, time, FLOPs and bytes."""
        rows = []
        for arm in self.arms:
            row: dict[str, Any] = {"arm": arm, "seeds": len(self.seeds)}
            for label, value in SUMMARY.items():
                values = self.per_seed(value, arm)
                row[label], row[f"{label} ±"] = mean_interval(values)
            rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return tables.comparison_table(self).text()

    def _repr_html_(self) -> str:
        from layerlab import figures

        drawn = tables.picture(figures.png(figures.curves(self.frame, "test/top1"))) if self.results else ""
        return tables.comparison_table(self)._repr_html_() + drawn


def total(result: FitResult, metric: str) -> float:
    """The sum of a metric over the epochs; NaN where it was not measured."""
    return math.fsum(row.get(metric, math.nan) for row in result.history)


# What is told of a run: name with unit → value.
SUMMARY: dict[str, Callable[[FitResult], float]] = {
    "top-1": lambda result: result.final["test/top1"],
    "top-5": lambda result: result.final["test/top5"],
    "best top-1": lambda result: max(row["test/top1"] for row in result.history),
    "seconds": lambda result: total(result, "time/epoch_seconds"),
    "TFLOP": lambda result: (total(result, "cost/forward_flops") + total(result, "cost/backward_flops")) / 1e12,
    "GB moved": lambda result: total(result, "cost/bytes_moved") / 1e9,
    "peak MB": lambda result: max(row.get("cost/peak_memory_bytes", math.nan) for row in result.history) / 1e6,
}


def evaluate(
    model: nn.Module,
    data: Batches,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch_size: int = 512,
    autocast: Callable[[], Any] = nullcontext,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy (as shares) of a network on a split; leaves the network in evaluation mode.

    Args:
        model: maps images to logits.
        data: a `Split`, or whatever gives batches in its manner, on the network's device.
        loss: maps (logits, labels) to a scalar, the batch's mean. Default: cross-entropy.
        batch_size: images at a time.
        autocast: gives the context of forward and loss.
        memory_format: of the images.

    Returns:
        `test/loss`; `test/top1` and `test/top5`, shares.
    """
    loss = loss or nn.CrossEntropyLoss()
    model.eval()
    sums: Any = 0.0
    with torch.no_grad():
        for x, y in data.batches(batch_size, None, torch.float32, memory_format):
            with autocast():
                logits = model(x)
                value = loss(logits, y)
            best = logits.topk(min(5, logits.shape[1])).indices == y.unsqueeze(1)
            sums = sums + torch.stack([value.float() * len(y), best[:, 0].sum(), best.sum()])
    mean_loss, top1, top5 = (sums / len(data)).tolist()
    return {"test/loss": mean_loss, "test/top1": top1, "test/top5": top5}


def describe(settings: BaseModel) -> dict[str, Any]:
    """Settings as JSON values; functions by their qualified names."""
    def plain(value: Any) -> Any:
        if callable(value):
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return {name: plain(getattr(settings, name)) for name in type(settings).model_fields}


def _settings(settings: Mapping[str, Any]) -> Settings:
    try:
        return Settings(**settings)
    except ValidationError as error:
        raise LayerlabError(sentence(error, "fit")) from None


def _on_device(data: Dataset, device: torch.device) -> Dataset:
    def moved(split: Split) -> Split:
        if split.labels.device == device:
            return split
        images = split.images.to(device) if isinstance(split.images, Tensor) else split.images
        return replace(split, images=images, labels=split.labels.to(device))

    return replace(data, train=moved(data.train), test=moved(data.test))


def _optimizer(settings: Settings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if callable(settings.optimizer):
        return settings.optimizer(parameters)
    shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "foreach": True}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, nesterov=settings.nesterov, **shared)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, **shared)


def _schedule(
    settings: Settings, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if callable(settings.schedule):
        return settings.schedule(optimizer)
    units = settings.epochs * (steps if settings.schedule_each == "step" else 1)
    if settings.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=units)
    milestones = list(settings.milestones) if settings.schedule == "step" else []
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, settings.gamma)


def _graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo.utils" in sys.modules else 0


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that are compiled one by one: children, and what is inside plain lists of blocks."""
    if isinstance(model, fx.GraphModule):
        return [model]  # its graph calls the layers themselves, not the blocks that they came in
    blocks = []
    for child in model.children():
        inner = list(child.children())
        if not inner:
            continue
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and any(list(block.children()) for block in inner):
            blocks += _blocks(child)
        else:
            blocks.append(child)
    return blocks or [model]


def _source(kind: type) -> str:
    """A digest of the module that defines a class, so that a checkpoint of an edited strategy is not taken over."""
    try:
        source = inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):
        return ""
    return hashlib.blake2b(source.encode(), digest_size=8).hexdigest()


def _seeded(seed: int, device: torch.device) -> list[Tensor]:
    """The global random states right after seeding, without disturbing the present ones."""
    outside = random_state(device)
    torch.manual_seed(seed)
    state = random_state(device)
    set_random_state(outside, device)
    return state


@contextmanager
def _deterministic() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    filling: Any = torch.utils.deterministic  # a module that gets its attribute at run time
    fills = filling.fill_uninitialized_memory
    before = (cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled(),
              torch.is_deterministic_algorithms_warn_only_enabled())
    cudnn.deterministic, cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before[0], before[1]
        torch.use_deterministic_algorithms(before[2], warn_only=before[3])
        filling.fill_uninitialized_memory = fills


def _document(function: Any) -> None:
    """Give `fit` its settings as real keyword arguments, in its signature and its text, from their one definition."""
    lines = []
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, item in Settings.model_fields.items():
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=item.default,
                                            annotation=item.annotation))
        lines.append(f"            {name} ({item.default!r}): {item.description}")
    function.__signature__ = inspect.Signature(parameters)
    marker = "any field of `Settings`:\n"
    function.__doc__ = function.__doc__.replace(marker, marker + "\n".join(lines) + "\n")


_document(fit)
