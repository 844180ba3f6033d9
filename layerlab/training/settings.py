"""The settings of `fit`, and the optimizer and the schedule that they name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import date, time
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal, TypedDict, cast
from uuid import UUID

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import nn

from layerlab.base.errors import LayerlabError, Refused, sentence

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Schedules = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


# What `fit` takes besides its settings, for the nearest name of one that it does not have: a test compares the two.
ARGUMENTS = ("strategies", "seed", "name", "loss", "checkpoint", "observers", "progress")


class FitSettings(TypedDict, total=False):
    """The keyword arguments of `fit` and `compare` that are `Settings`, for type checkers: a test compares the two."""

    epochs: int
    max_steps: int | None
    batch_size: int
    optimizer: Literal["sgd", "adam", "adamw"] | Optimizers
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    schedule: Literal["constant", "cosine", "step"] | Schedules
    milestones: tuple[int, ...]
    gamma: float
    schedule_each: Literal["epoch", "step"]
    label_smoothing: float
    precision: Literal["float32", "bfloat16"]
    channels_last: bool
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
    measure: bool | Literal["every"] = True
    """Measure what a step costs: a few steps an epoch where there are strategies; `every`: all of them, slowly."""
    device: str = "auto"
    """`auto`: where the data are."""

    def keywords(self) -> FitSettings:
        """The settings as keyword arguments."""
        return cast(FitSettings, dict(self))

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


def checked_settings(settings: Mapping[str, Any]) -> Settings:
    """Validate the keyword arguments of `fit`.

    Raises:
        Refused: an unknown setting or a value that is not allowed.
    """
    try:
        return Settings(**settings)
    except ValidationError as error:
        raise Refused(sentence(error, "fit", (*Settings.model_fields, *ARGUMENTS))) from None


def make_optimizer(settings: Settings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over `parameters`."""
    if callable(settings.optimizer):
        return settings.optimizer(parameters)
    shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "foreach": True}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, nesterov=settings.nesterov, **shared)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, **shared)


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
    if settings.schedule == "cosine":
        units = whole if settings.schedule_each == "step" else whole / steps
        # A training may end within an epoch; torch's formula takes a fraction, its stubs do not.
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=units)  # type: ignore[arg-type]
    milestones = list(settings.milestones) if settings.schedule == "step" else []
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, settings.gamma)


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
    changes: dict[str, Any] = {"epochs": -(-budget // steps), "max_steps": budget}
    # Counted in steps from here on, since a shortened epoch's end is no step's.
    factor = budget / whole * (1 if settings.schedule_each == "step" else steps)
    if callable(settings.schedule):
        stretched = getattr(settings.schedule, "stretched", None)
        if stretched is None:
            raise LayerlabError(
                "The schedule is a function, which cannot be shortened for a baseline of equal cost; name one "
                "(constant, cosine, step), give it a method stretched(factor), or compare with equal='none'."
            )
        changes |= {"schedule_each": "step", "schedule": stretched(factor)}
    if settings.schedule == "step":
        changes |= {"schedule_each": "step", "milestones": tuple(round(each * factor) for each in settings.milestones)}
    return settings.model_copy(update=changes)
