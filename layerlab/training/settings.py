"""The settings of `fit`, and the optimizer and the schedule that they name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import nn

from layerlab.base.errors import LayerlabError, sentence

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


def describe(settings: BaseModel) -> dict[str, Any]:
    """Settings as JSON values; functions by their qualified names."""
    def plain(value: Any) -> Any:
        if callable(value):
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return {name: plain(getattr(settings, name)) for name in type(settings).model_fields}


def checked_settings(settings: Mapping[str, Any]) -> Settings:
    """Validate the keyword arguments of `fit`.

    Raises:
        LayerlabError: an unknown setting or a value that is not allowed.
    """
    try:
        return Settings(**settings)
    except ValidationError as error:
        raise LayerlabError(sentence(error, "fit")) from None


def make_optimizer(settings: Settings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over `parameters`."""
    if callable(settings.optimizer):
        return settings.optimizer(parameters)
    shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "foreach": True}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, nesterov=settings.nesterov, **shared)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, **shared)


def make_schedule(
    settings: Settings, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule that the settings name; `steps` is the number of steps of an epoch."""
    if callable(settings.schedule):
        return settings.schedule(optimizer)
    units = settings.epochs * (steps if settings.schedule_each == "step" else 1)
    if settings.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=units)
    milestones = list(settings.milestones) if settings.schedule == "step" else []
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, settings.gamma)
