"""One training run, epoch by epoch."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from layerlab.base.devices import random_state, resolve_device, set_random_state
from layerlab.base.errors import Diverged, LayerlabError, first_line
from layerlab.contract.run import Run
from layerlab.contract.strategy import Strategy, check_composition
from layerlab.measure.clock import Energy, synchronise
from layerlab.measure.cost import Meter, StepCost
from layerlab.show.progress import first_process
from layerlab.training.checkpoint import Checkpoint, source_digest
from layerlab.training.compiling import TORCH, compiled_blocks, graph_count
from layerlab.training.evaluation import evaluate
from layerlab.training.results import FitResult
from layerlab.training.settings import checked_settings, describe, make_optimizer, make_schedule
from layerlab.workload.dataset import Dataset, Split


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
        self.settings = checked_settings(settings)
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
        graphs = graph_count()
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
            raise Diverged(
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
            row["compile/graphs"] = graph_count() - graphs
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
        if run.frozen and not self._eager and TORCH < (2, 12):
            self._eager = True
            self._uncompile()
            warnings.warn(
                "torch before 2.12 gives a compiled layer that was frozen no gradient after it is thawed; going on "
                "eagerly. Install torch 2.12 or later to compile with a strategy that freezes.",
                stacklevel=2,
            )
        blocks = [] if self._eager else compiled_blocks(run.training_model)
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
        optimizer = make_optimizer(settings, parameters)
        run = Run(
            model=network,
            training_model=network,
            optimizer=optimizer,
            schedule=make_schedule(settings, optimizer, len(self.data.train) // settings.batch_size),
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
                "strategies": [[s.name, describe(s), source_digest(type(s))] for s in self.strategies],
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


def _on_device(data: Dataset, device: torch.device) -> Dataset:
    def moved(split: Split) -> Split:
        if split.labels.device == device:
            return split
        images = split.images.to(device) if isinstance(split.images, Tensor) else split.images
        return replace(split, images=images, labels=split.labels.to(device))

    return replace(data, train=moved(data.train), test=moved(data.test))


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
