"""fit() trains a network; compare() trains several arms by turns."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from layerlab.base.errors import LayerlabError, reason
from layerlab.contract.strategy import Strategy
from layerlab.show.progress import Progress
from layerlab.training.loop import Fit
from layerlab.training.results import Comparison
from layerlab.training.settings import Settings, checked_settings
from layerlab.workload.dataset import Dataset

if TYPE_CHECKING:
    from layerlab.training.loop import Observer
    from layerlab.training.results import FitResult


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
    checked = checked_settings(settings)
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
