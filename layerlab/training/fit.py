"""fit() trains a network; compare() trains several arms by turns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, NamedTuple, Unpack, overload

from pydantic import Field, SkipValidation
from torch import nn

from layerlab.base.arguments import validated
from layerlab.base.errors import Refused, brief
from layerlab.contract.strategy import Strategy
from layerlab.show.progress import Progress, say
from layerlab.training.ahead import Ahead
from layerlab.training.budget import with_memory
from layerlab.training.checkpoint import checkpoint_folder
from layerlab.training.companions import Companions, Equal
from layerlab.training.evaluation import Metrics
from layerlab.training.loop import Observer
from layerlab.training.results import Comparison, FitResult
from layerlab.training.rounds import Arm, Folders, Rounds
from layerlab.training.settings import ARGUMENTS_OF_COMPARE, FitSettings, checked_settings
from layerlab.training.start import Loss, Network
from layerlab.workload.own import Data, Given, OwnData, own_data

Strategies = Strategy | str | Sequence[Strategy | str]


@overload
def fit(
    model: nn.Module | Callable[[], nn.Module],
    data: Given,
    strategies: Strategies = (),
    *,
    seed: int = 0,
    name: str = "",
    loss: Loss | None = None,
    metrics: Metrics = MappingProxyType({}),
    checkpoint: str | Path | None = None,
    observers: Sequence[Observer] = (),
    progress: bool = True,
    memory: int | str | None = None,
    **settings: Unpack[FitSettings],
) -> FitResult: ...


@overload
def fit(
    model: nn.Module | Callable[[], nn.Module],
    data: Given,
    strategies: Strategies = (),
    *,
    seed: Sequence[int],
    name: str = "",
    loss: Loss | None = None,
    metrics: Metrics = MappingProxyType({}),
    checkpoint: str | Path | None = None,
    observers: Sequence[Observer] = (),
    progress: bool = True,
    memory: int | str | None = None,
    **settings: Unpack[FitSettings],
) -> list[FitResult]: ...


@validated
def fit(
    model: nn.Module | Callable[[], nn.Module],
    data: SkipValidation[Given],
    strategies: SkipValidation[Strategies] = (),
    *,
    seed: int | Sequence[int] = 0,
    name: str = "",
    loss: Loss | None = None,
    metrics: Metrics = MappingProxyType({}),
    checkpoint: str | Path | None = None,
    observers: Sequence[Observer] = (),
    progress: bool = True,
    memory: int | str | None = None,
    **settings: Unpack[FitSettings],
) -> FitResult | list[FitResult]:
    # Long because every setting stands in its docstring.
    """Train a network.

    Args:
        model: any `nn.Module` that maps images, or what else the data give, to logits or another output (it is copied,
            not changed), or a function without arguments that builds one; the function is called under the seed, so
            that each seed has its own initial weights.
        data: from `load_dataset`; or your own, (train, test) or a dict of train, validation and test, each a
            DataLoader, a torch or Hugging Face Dataset, or tensors (x, y); see `own_data`.
        strategies: one or several, from `layerlab.strategies` or written by you; or the names of installed ones.
        seed: one, or several to train one after the other.
        name: what to call this in logs and tables. Default: the strategies' names.
        loss: maps (output, target) to a scalar, the batch's mean; or (model, batch), where its first parameter is
            called `model`. Default: cross-entropy.
        metrics: what is told of the test and validation halves besides the loss and, where labels are classes, the
            accuracy: name → function of (output, target), or of (model, batch), or an object of torchmetrics; or
            `perplexity`.
        checkpoint: a folder. The state at each epoch's end is kept there; started again with the same arguments after
            an interruption, the fit goes on from there and ends with the same weights as if undisturbed. Of the
            processes of a torchrun job all read it and the first (`RANK` 0) alone writes it.
        observers: told of each epoch; `layerlab.track(…)` gives one that logs to MLflow. In a torchrun job those of the
            first process alone are told.
        progress: show bars.
        memory: bytes that a training step may allocate at most, weights and the optimizer's state included and the data
            set not: a number, or a text such as "2GB". An installed strategy holds it; the weights stay the same.
        settings: any of these:
            epochs (10): Passes over the training data.
            max_steps (None): Stop after these many steps, within an epoch if need be; a schedule that is named shortens
                with it.
            patience (None): End after so many epochs without a better one by the validation half's accuracy, or loss
                where there are no classes; the weights stay the last epoch's.
            batch_size (128): Images a step; the uneven rest of each shuffled epoch is left out.
            recipe (None): A bundle of settings by name; each that is given beside it counts instead of the bundle's.
            augment (None): Of the training images, as `Split.augment` has it; None leaves the data's own.
            padding (None): Pixels by which `augment` shifts at most; None leaves the data's own.
            sizes (()): Pairs (share of the epochs from which on, share of the images' side), to train with small images
                first.
            whitening (False): Let the first convolution whiten the training images' patches, frozen; its bias learns
                for 0.3 of the epochs.
            optimizer ('sgd'): By name, or a function from parameters to an optimizer.
            lr (0.05): Learning rate.
            bias_scale (1.0): Rate of the parameters of one dimension (biases, scales), in multiples of `lr`; their
                decay a step stays.
            muon_lr (0.05): Muon: learning rate of the hidden matrices and kernels; `lr` is that of the rest, which SGD
                trains.
            muon_norm (False): Muon: scale each hidden weight to a fixed norm before an update; for layers with a
                normalisation behind.
            momentum (0.9): Of SGD and Muon.
            nesterov (False): SGD's momentum in Nesterov's form; Muon's always is.
            weight_decay (0.0005): On all parameters; AdamW and Muon decay the weight itself, by `lr * weight_decay` a
                step.
            schedule ('constant'): Of the learning rate, by name, or a function from the optimizer to a torch schedule.
            warmup (None): Share of the training in which the rate rises to `lr`; None: 0.3 for `triangle` and
                `one-cycle`, 0 for others.
            lr_start (0.04): Where a rise begins, in multiples of `lr`.
            lr_end (0.0): Where `cosine`, `triangle` and `one-cycle` end, in multiples of `lr`.
            milestones (()): Schedule `step`: multiply the rate by `gamma` after these many epochs.
            gamma (0.1): Schedule `step`: the factor.
            schedule_each ('epoch'): How often the schedule steps; `milestones` count in the same unit.
            label_smoothing (0.0): Of the cross-entropy.
            clip_norm (None): Shorten the gradient of all parameters together to at most this norm, after every
                backward.
            accumulate (1): Parts, one after the other, in which a step computes its batch's gradient, to save memory.
            averaging ('none'): Average the weights over steps: `ema` evaluates and returns the average, `lookahead`
                goes on from it.
            averaging_decay (0.9): Share of the old average that stays at an update.
            averaging_every (5): Steps between two updates of the average.
            averaging_power (0.0): The decay is multiplied by the share of the training that is done to this power, so
                that it grows.
            views ('plain'): `mirrored`: evaluate the mean logits of each image and its mirror image; `shifted`: half of
                that, and half of the mean of the same when the image is shifted by a pixel up and to the left, and down
                and to the right (Jordan, arXiv 2404.00498).
            views_from (0.0): Share of the epochs from which on `views` count; the others are evaluated plainly, which
                takes less time. With 1 that is the last one alone, whose accuracy stands above the curve of the others.
            precision ('float32'): bfloat16, float16: forward and loss under autocast; weights and update stay float32.
                float16 scales the loss and leaves out a step whose gradient overflows.
            channels_last (False): Memory format of images and convolutions; `auto` measures which one is faster before
                the first step.
            compile (False): Run the network's blocks through torch.compile; a text names its backend.
            deterministic (True): On a GPU: deterministic algorithms only.
            measure (True): Measure what a step costs: a few steps an epoch where there are strategies; `every`: all of
                them, slowly.
            device ('auto'): `auto`: where the data are.

    Returns:
        A `FitResult`; a list of them when several seeds are given.

    Raises:
        LayerlabError: settings that do not validate, strategies that cannot run together, a network that does not
            fit the data, a checkpoint of another fit (all `Refused`); a loss that is no longer finite (`Diverged`).

    Example:
        >>> from layerlab import build_model, fit, load_dataset
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> network = build_model("mlp", num_classes=10, image_size=8, width=16)
        >>> result = fit(network, data, epochs=2, lr=0.02, progress=False)
        >>> len(result.history)
        2
    """
    checked_settings(settings, data.batch_size if isinstance(data, OwnData) else None)
    seeds = [seed] if isinstance(seed, int) else list(seed)
    if memory is not None:
        strategies = with_memory(chosen(strategies), memory)
    comparison = compare(
        model, data, {name: strategies}, seeds=seeds, loss=loss, metrics=metrics, checkpoint=checkpoint,
        observers=observers, progress=progress, **settings,
    )
    results = list(comparison.results.values())
    return results[0] if isinstance(seed, int) else results


@validated
def compare(
    model: nn.Module | Callable[[], nn.Module] | Mapping[str, nn.Module | Callable[[], nn.Module]],
    data: SkipValidation[Given],
    arms: SkipValidation[Mapping[str, Strategies]],
    *,
    seeds: Sequence[int] = (0,),
    loss: Loss | None = None,
    metrics: Metrics = MappingProxyType({}),
    checkpoint: str | Path | None = None,
    observers: Sequence[Observer] = (),
    progress: bool = True,
    keep_going: Collection[str] = (),
    equal: Equal = "none",
    placebo: bool = False,
    judged: Collection[str] | None = None,
    at_once: Annotated[int, Field(ge=1)] = 1,
    **settings: Unpack[FitSettings],
) -> Comparison:
    """Train a network with different strategies under the same seeds, epoch by epoch by turns.

    By turns, so that a load on the machine slows all arms alike and ratios of seconds stay honest.

    Args:
        model: as `fit`, the same for all arms; or name of an arm → its own.
        arms: name → strategy or strategies; the baseline is an arm with none: `{"conventional": (), "mine": Mine()}`.
        seeds: each arm is trained with each.
        checkpoint: a folder; every run gets a folder of its own in it.
        keep_going: arms that may fail in any way; the reason stands in the result's `failures`.
        equal: `flops` or `seconds`: beside each arm with strategies, train the first arm without any once more, for as
            many steps as the arm's cost buys, with its whole schedule, as `ARM · equal flops`; see `Comparison.pays`.
        placebo: train beside each arm, as `ARM · placebo`, what its strategy names as its placebo.
        judged: the arms that `equal` and `placebo` are for. Default: all with strategies.
        at_once: seeds trained at a time, each in a process, for networks that leave the device idle; it needs a
            `checkpoint`. Arms still take turns, so that ratios of seconds stay honest, but all are slower.
        data, loss, metrics, observers, progress, settings: as `fit`.

    Returns:
        All results, with tables of them.

    Raises:
        LayerlabError: as `fit`; no seeds; an arm without a network; `equal` without a baseline or measured costs.

    Example:
        >>> from layerlab import build_model, compare, load_dataset, strategies
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> network = lambda: build_model("resnet-cifar", num_classes=10, channels=1, depth=8)
        >>> arms = {"full": (), "skip": strategies("lars-skip")}
        >>> compare(network, data, arms, seeds=[0, 1], epochs=1, progress=False).arms
        ['full', 'skip']
    """
    # Long because its docstring names every argument, with an example.
    _check_kinds(arms, seeds, keep_going)
    data = own_data(data, device=settings.get("device", "auto"))
    own = data if isinstance(data, OwnData) else None
    checked = checked_settings(settings, own.batch_size if own else None, "compare", ARGUMENTS_OF_COMPARE)
    if own and checkpoint is not None and not own.exact:
        say(f"{own.name!r} cannot be resumed exactly: its DataLoader chooses or makes examples by random numbers that "
            "fit does not seed; give its sampler a `generator`, or give its dataset.")
    every = [Arm(name, _network(model, name), chosen(given), checked) for name, given in arms.items()]
    companions = Companions(every, equal, placebo, judged)
    going = {*keep_going, *(name for arm in keep_going for name in companions.beside(arm))}
    runs = len(seeds) * (len(every) + len(companions.equals) + len(companions.placebos))
    folders = Folders(checkpoint_folder(checkpoint), runs == 1)
    training = _Training(data, loss, metrics, folders, going, companions, checked.epochs)
    with Ahead(training.ahead, seeds, at_once if checkpoint else 1) as ahead, \
            training.rounds(observers, Progress(runs * checked.epochs, progress)) as rounds:
        for seed in seeds:
            ahead.wait(seed)
            training.train(rounds, seed)
    return companions.comparison(rounds)


class _Training(NamedTuple):
    """What a comparison trains with every seed."""

    data: Data
    loss: Loss | None
    metrics: Metrics
    folders: Folders
    keep_going: Collection[str]
    companions: Companions
    epochs: int

    def rounds(self, observers: Sequence[Observer], progress: Progress) -> Rounds:
        return Rounds(self.data, self.loss, self.metrics, self.folders, observers, self.keep_going, progress,
                      self.epochs)

    def train(self, rounds: Rounds, seed: int) -> None:
        rounds.train(seed, self.companions.arms)
        self.companions.train(rounds, seed)

    def ahead(self, seed: int) -> None:
        """Write a seed's checkpoints and nothing else, in another process."""
        with self.rounds((), Progress(0, False)) as rounds:
            self.train(rounds, seed)


def _check_kinds(arms: object, seeds: Sequence[int], keep_going: Collection[str]) -> None:
    """Raises Refused for arms as other libraries take them, arms that there are not, and where there is no seed."""
    if not seeds:
        raise Refused("seeds is empty; give at least one.")
    if not isinstance(arms, Mapping):
        raise Refused("arms must map the name of each arm to its strategies, such as {'full': (), 'mine': strategy}, "
                      f"got {type(arms).__name__}.")
    missing = [name for name in ([keep_going] if isinstance(keep_going, str) else keep_going) if name not in arms]
    if missing or isinstance(keep_going, str):
        raise Refused(f"keep_going is a list of arms, got {brief(keep_going)}; the arms are "
                      f"{', '.join(map(repr, arms))}.")


def chosen(strategies: Strategies) -> tuple[Strategy, ...]:
    """The strategies, those that are named with their default settings."""
    from layerlab.contract.registry import strategies as installed

    if not isinstance(strategies, Strategy | str | Sequence):
        raise Refused(f"strategies are objects of layerlab.Strategy, their names, or a list of those, got "
                      f"{brief(strategies)}.")
    given = [strategies] if isinstance(strategies, Strategy | str) else strategies
    return tuple(installed(each) if isinstance(each, str) else each for each in given)


def _network(model: Network | Mapping[str, Network], arm: str) -> Network:
    if not isinstance(model, Mapping):
        return model
    if arm not in model:
        raise Refused(f"No network is given for arm {arm!r}; give one for each arm.")
    return model[arm]
