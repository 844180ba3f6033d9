"""The settings of `fit`, and the optimizer and the schedule that they name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal, TypedDict, cast
from uuid import UUID

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from layerlab.base.errors import LayerlabError, Refused, sentence
from layerlab.training.evaluation import Views
from layerlab.training.muon import Muon, hidden_first
from layerlab.training.recipes import RECIPES
from layerlab.workload.dataset import Augment

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
CYCLES = ("triangle", "one-cycle")
Schedules = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


# What `fit` takes besides its settings, for the nearest name of one that it does not have: a test compares the two.
ARGUMENTS = ("strategies", "seed", "name", "loss", "metrics", "checkpoint", "observers", "progress", "memory")
ARGUMENTS_OF_COMPARE = ("seeds", "loss", "metrics", "checkpoint", "observers", "progress", "keep_going", "equal",
                        "placebo", "judged", "at_once")


class FitSettings(TypedDict, total=False):
    """The keyword arguments of `fit` and `compare` that are `Settings`, for type checkers: a test compares the two."""

    epochs: int
    max_steps: int | None
    patience: int | None
    batch_size: int
    recipe: Literal["fast"] | None
    augment: Augment | None
    padding: int | None
    sizes: tuple[tuple[float, float], ...]
    whitening: bool
    optimizer: Literal["sgd", "adam", "adamw", "muon"] | Optimizers
    lr: float
    bias_scale: float
    muon_lr: float
    muon_norm: bool
    momentum: float
    nesterov: bool
    weight_decay: float
    schedule: Literal["constant", "cosine", "step", "triangle", "one-cycle"] | Schedules
    warmup: float | None
    lr_start: float
    lr_end: float
    milestones: tuple[int, ...]
    gamma: float
    schedule_each: Literal["epoch", "step"]
    label_smoothing: float
    clip_norm: float | None
    accumulate: int
    averaging: Literal["none", "ema", "lookahead"]
    averaging_decay: float
    averaging_every: int
    averaging_power: float
    views: Views
    views_from: float
    precision: Literal["float32", "bfloat16", "float16"]
    channels_last: bool | Literal["auto"]
    compile: bool | str
    deterministic: bool
    measure: bool | Literal["every"]
    device: str


class Settings(BaseModel):
    """The settings of `fit`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, arbitrary_types_allowed=True)

    epochs: int = Field(10, ge=1)
    """Passes over the training data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after these many steps, within an epoch if need be; a schedule that is named shortens with it."""
    patience: int | None = Field(None, ge=1)
    """End after so many epochs without a better one by the validation half's accuracy, or loss where there are no
    classes; the weights stay the last epoch's."""
    batch_size: int = Field(128, ge=1)
    """Images a step; the uneven rest of each shuffled epoch is left out."""
    recipe: Literal["fast"] | None = None
    """A bundle of settings by name; each that is given beside it counts instead of the bundle's."""
    augment: Augment | None = None
    """Of the training images, as `Split.augment` has it; None leaves the data's own."""
    padding: int | None = Field(None, ge=0)
    """Pixels by which `augment` shifts at most; None leaves the data's own."""
    sizes: tuple[tuple[float, float], ...] = ()
    """Pairs (share of the epochs from which on, share of the images' side), to train with small images first."""
    whitening: bool = False
    """Let the first convolution whiten the training images' patches, frozen; its bias learns for 0.3 of the epochs."""
    optimizer: Literal["sgd", "adam", "adamw", "muon"] | Optimizers = "sgd"
    """By name, or a function from parameters to an optimizer."""
    lr: float = Field(0.05, ge=0)
    """Learning rate."""
    bias_scale: float = Field(1.0, gt=0)
    """Rate of the parameters of one dimension (biases, scales), in multiples of `lr`; their decay a step stays."""
    muon_lr: float = Field(0.05, ge=0)
    """Muon: learning rate of the hidden matrices and kernels; `lr` is that of the rest, which SGD trains."""
    muon_norm: bool = False
    """Muon: scale each hidden weight to a fixed norm before an update; for layers with a normalisation behind."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD and Muon."""
    nesterov: bool = False
    """SGD's momentum in Nesterov's form; Muon's always is."""
    weight_decay: float = Field(5e-4, ge=0)
    """On all parameters; AdamW and Muon decay the weight itself, by `lr * weight_decay` a step."""
    schedule: Literal["constant", "cosine", "step", "triangle", "one-cycle"] | Schedules = "constant"
    """Of the learning rate, by name, or a function from the optimizer to a torch schedule."""
    warmup: float | None = Field(None, ge=0, lt=1)
    """Share of the training in which the rate rises to `lr`; None: 0.3 for `triangle` and `one-cycle`, 0 for others."""
    lr_start: float = Field(0.04, ge=0)
    """Where a rise begins, in multiples of `lr`."""
    lr_end: float = Field(0.0, ge=0)
    """Where `cosine`, `triangle` and `one-cycle` end, in multiples of `lr`."""
    milestones: tuple[int, ...] = ()
    """Schedule `step`: multiply the rate by `gamma` after these many epochs."""
    gamma: float = Field(0.1, gt=0)
    """Schedule `step`: the factor."""
    schedule_each: Literal["epoch", "step"] = "epoch"
    """How often the schedule steps; `milestones` count in the same unit."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Of the cross-entropy."""
    clip_norm: float | None = Field(None, gt=0)
    """Shorten the gradient of all parameters together to at most this norm, after every backward."""
    accumulate: int = Field(1, ge=1)
    """Parts, one after the other, in which a step computes its batch's gradient, to save memory."""
    averaging: Literal["none", "ema", "lookahead"] = "none"
    """Average the weights over steps: `ema` evaluates and returns the average, `lookahead` goes on from it."""
    averaging_decay: float = Field(0.9, ge=0, lt=1)
    """Share of the old average that stays at an update."""
    averaging_every: int = Field(5, ge=1)
    """Steps between two updates of the average."""
    averaging_power: float = Field(0.0, ge=0)
    """The decay is multiplied by the share of the training that is done to this power, so that it grows."""
    views: Views = "plain"
    """`mirrored`: evaluate the mean logits of each image and its mirror image; `shifted`: half of that, and half of the
    mean of the same when the image is shifted by a pixel up and to the left, and down and to the right (Jordan, arXiv
    2404.00498)."""
    views_from: float = Field(0.0, ge=0, le=1)
    """Share of the epochs from which on `views` count; the others are evaluated plainly, which takes less time. With 1
    that is the last one alone, whose accuracy stands above the curve of the others."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16, float16: forward and loss under autocast; weights and update stay float32. float16 scales the loss and
    leaves out a step whose gradient overflows."""
    channels_last: bool | Literal["auto"] = False
    """Memory format of images and convolutions; `auto` measures which one is faster before the first step."""
    compile: bool | str = False
    """Run the network's blocks through torch.compile; a text names its backend."""
    deterministic: bool = True
    """On a GPU: deterministic algorithms only."""
    measure: bool | Literal["every"] = True
    """Measure what a step costs: a few steps an epoch where there are strategies; `every`: all of them, slowly."""
    device: str = "auto"
    """`auto`: where the data are."""

    def keywords(self) -> FitSettings:
        """The settings as keyword arguments."""
        return cast(FitSettings, dict(self))

    @model_validator(mode="before")
    @classmethod
    def _with_recipe(cls, given: Any) -> Any:
        recipe = given.get("recipe") if isinstance(given, dict) else None
        return {**RECIPES.get(recipe, {}), **given} if isinstance(recipe, str) else given

    @field_validator("sizes")
    @classmethod
    def _growing(cls, value: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        starts = [start for start, _ in value]
        if starts != sorted(set(starts)) or any(not 0 <= start < 1 for start in starts):
            raise ValueError("should begin each size at a later share of the epochs, from 0 to below 1")
        if any(not 0 < side <= 1 for _, side in value):
            raise ValueError("should have sides that are shares of the images' side, above 0 and at most 1")
        return value

    @field_validator("compile")
    @classmethod
    def _known_backend(cls, value: bool | str) -> bool | str:
        if isinstance(value, str) and value not in (known := torch._dynamo.list_backends(exclude_tags=())):
            raise ValueError(f"should be true, false or one of {', '.join(known)}")
        return value


def describe(settings: BaseModel) -> dict[str, Any]:
    """Settings as values that JSON takes, the same in every process; functions by their qualified names."""
    return {name: _plain(getattr(settings, name)) for name in type(settings).model_fields}


def _plain(value: Any) -> Any:
    """Whatever pydantic takes for a setting: enums, paths, dates, sets and nested models among them."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, BaseModel):
        return describe(value)
    if isinstance(value, Mapping):
        return {_key(key): _plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=repr)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', _unplaced(value))}"
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return _unplaced(value)


def _key(key: Any) -> Any:
    plain = _plain(key)
    return plain if plain is None or isinstance(plain, str | int | float) else str(plain)


def _unplaced(value: Any) -> str:
    """What an object looks like, without its place in this process's memory."""
    text = str(value) if isinstance(value, PurePath | date | time | Decimal | UUID) else repr(value)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def checked_settings(
    settings: Mapping[str, Any], batch_size: int | None = None, owner: str = "fit", arguments: Sequence[str] = ARGUMENTS
) -> Settings:
    """Validate the keyword arguments of `fit`.

    Args:
        settings: given by the user.
        batch_size: of the data's own batches; None where the settings decide.
        owner: the function whose keyword arguments they are.
        arguments: what it takes besides.

    Raises:
        Refused: an unknown setting or a value that is not allowed; another batch size than the data's own.
    """
    if batch_size is not None and settings.get("batch_size", batch_size) != batch_size:
        raise Refused(f"The DataLoader's batches are of {batch_size}, so that batch_size={settings['batch_size']!r} "
                      "cannot be; leave it out, or give the DataLoader's dataset.")
    try:
        return Settings(**(settings if batch_size is None else {**settings, "batch_size": batch_size}))
    except ValidationError as error:
        raise Refused(sentence(error, owner, (*Settings.model_fields, *arguments))) from None


def make_optimizer(
    settings: Settings, parameters: list[nn.Parameter], output: Collection[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over `parameters`; those of the `output` layer are none of Muon's."""
    if callable(settings.optimizer):
        return settings.optimizer(parameters)
    decay, lr = settings.weight_decay, settings.lr
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if settings.bias_scale != 1:
        flat = [each for each in parameters if each.dim() < 2]
        scaled = {"lr": lr * settings.bias_scale, "weight_decay": decay / settings.bias_scale}
        groups = [{"params": [each for each in parameters if each.dim() >= 2]}, {"params": flat, **scaled}]
    if settings.optimizer == "muon":
        return Muon(hidden_first(groups, settings.muon_lr, output), lr, settings.momentum, decay, settings.muon_norm)
    shared: dict[str, Any] = {"lr": lr, "weight_decay": decay, "foreach": True}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov, **shared)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, **shared)


def length(settings: Settings, steps: int) -> tuple[int, int]:
    """(epochs, steps) of a whole training whose epochs have `steps` steps; the last epoch may be a shorter one."""
    whole = settings.epochs * steps
    if settings.max_steps is not None:
        whole = min(whole, settings.max_steps)
    return -(-whole // steps), whole


def make_schedule(
    settings: Settings, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule that the settings name, over the whole training; `steps` is the number of steps of an epoch."""
    if callable(settings.schedule):
        return settings.schedule(optimizer)
    _, whole = length(settings, steps)
    units = whole if settings.schedule_each == "step" else whole / steps
    rising = (0.3 if settings.schedule in CYCLES else 0.0) if settings.warmup is None else settings.warmup
    if settings.schedule in CYCLES or rising or (settings.schedule == "cosine" and settings.lr_end):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, Course(settings, units, rising))
    if settings.schedule == "cosine":
        # A training may end within an epoch; torch's formula takes a fraction, its stubs do not.
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=units)  # type: ignore[arg-type]
    milestones = list(settings.milestones) if settings.schedule == "step" else []
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, settings.gamma)


class Course:
    """The learning rate over a training, in multiples of `lr`: a straight rise, then what the schedule's name says.

    `triangle` falls in a straight line, `cosine` and `one-cycle` (Smith & Topin, arXiv 1708.07120) in half a cosine.

    Args:
        settings: with the schedule's name, `lr_start` and `lr_end`.
        units: of the whole training, steps or epochs.
        rising: share of it in which the rate rises.
    """

    def __init__(self, settings: Settings, units: float, rising: float) -> None:
        self.name, self.units, self.rising = str(settings.schedule), units, rising
        self.start, self.end = settings.lr_start, settings.lr_end
        self.milestones, self.gamma = settings.milestones, settings.gamma

    def __call__(self, unit: int) -> float:
        """The factor after so many units."""
        # A strategy may change how many steps an epoch has: the last factor stays.
        done = min(1.0, unit / self.units)
        if done < self.rising:
            return self.start + (1 - self.start) * done / self.rising
        if self.name == "constant":
            return 1.0
        if self.name == "step":
            return self.gamma ** sum(unit >= each for each in self.milestones)
        falling = (done - self.rising) / (1 - self.rising)
        left = 1 - falling if self.name == "triangle" else (1 + math.cos(math.pi * falling)) / 2
        return self.end + (1 - self.end) * left


def shortened(settings: Settings, steps: int, budget: int) -> Settings:
    """The same training in `budget` steps, its whole schedule shortened (or stretched) with it.

    Args:
        settings: of the whole training.
        steps: of an epoch.
        budget: steps of the new training.

    Raises:
        LayerlabError: a schedule that is a function without a method `stretched(factor)`, which gives the same schedule
            over so many times as many of its steps.
    """
    _, whole = length(settings, steps)
    # The budget is spent to its end.
    changes: dict[str, Any] = {"epochs": -(-budget // steps), "max_steps": budget, "patience": None}
    # Counted in steps from here on, since a shortened epoch's end is no step's.
    factor = budget / whole * (1 if settings.schedule_each == "step" else steps)
    if callable(settings.schedule):
        stretched = getattr(settings.schedule, "stretched", None)
        if stretched is None:
            raise LayerlabError(
                "The schedule is a function, which cannot be shortened for a baseline of equal cost; name one "
                "(constant, cosine, step, triangle, one-cycle), give it a method stretched(factor), or compare with "
                "equal='none'."
            )
        changes |= {"schedule_each": "step", "schedule": stretched(factor)}
    if settings.schedule == "step":
        changes |= {"schedule_each": "step", "milestones": tuple(round(each * factor) for each in settings.milestones)}
    return settings.model_copy(update=changes)
