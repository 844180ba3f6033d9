"""The start of a run: data and network on the device, optimizer and schedule, a first forward pass that is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from layerlab.base.errors import LayerlabError, Refused, first_line, located
from layerlab.contract.run import Run
from layerlab.contract.strategy import Strategy
from layerlab.training.choosing import memory_format, warn_of_slow_bfloat16
from layerlab.training.settings import Settings, length, make_optimizer, make_schedule
from layerlab.training.whitening import whiten
from layerlab.workload.dataset import Dataset, Moment, Split
from layerlab.workload.order import forward_order

Network = nn.Module | Callable[[], nn.Module]
Loss = Callable[[Tensor, Tensor], Tensor]


def on_device(data: Dataset, device: torch.device) -> Dataset:
    """The dataset with labels and resident images on a device; streamed images stay where they are."""
    validation = _moved(data.validation, device) if data.validation is not None else None
    return replace(
        data, train=_moved(data.train, device), test=_moved(data.test, device), validation=validation
    )


def _moved(split: Split, device: torch.device) -> Split:
    if split.labels.device == device:
        return split
    images = split.images.to(device) if isinstance(split.images, Tensor) else split.images
    return replace(split, images=images, labels=split.labels.to(device))


def prepared(data: Dataset, settings: Settings) -> Dataset:
    """The dataset for one training: augmented as the settings say, and with a moment of its own."""
    train = data.train
    augment = train.augment if settings.augment is None else settings.augment
    padding = train.padding if settings.padding is None else settings.padding
    return replace(data, train=replace(train, augment=augment, padding=padding, moment=Moment()))


def side_of(settings: Settings, whole: int, done: float) -> int | None:
    """Pixels of the images' side when a share of the epochs is done; None for all of the `whole` side."""
    sides = [side for start, side in settings.sizes if start <= done]
    return max(1, round(whole * sides[-1])) if sides and sides[-1] != 1 else None


def start(
    model: Network, data: Dataset, strategies: Sequence[Strategy], settings: Settings, seed: int,
    loss: Loss | None = None, folder: Path | None = None, writes: bool = True,
) -> Run:
    """A run before its first epoch, under the random state that is in force.

    Args:
        model: a network, which is copied, or a function that builds one.
        data: on its device, where the run trains.
        strategies: whose `on_after_backward` the run calls.
        settings, seed, loss: as `fit`.
        folder: of the checkpoint.
        writes: whether this process writes there.

    Raises:
        Refused: no network, one without parameters or frozen whole, one that does not fit the data, or too few images.
    """
    if len(data.train) < settings.batch_size:
        raise Refused(
            f"batch_size {settings.batch_size} is larger than the {len(data.train)} training images of "
            f"{data.name!r}; make it smaller."
        )
    device = data.train.labels.device
    network = _placed(model, device)
    form = memory_format(settings, network, data.train, folder, writes)
    network.to(memory_format=form)
    # (batch, channels, height, width), two images: what strategies trace the network with.
    example = next(data.test.batches(min(2, len(data.test)), memory_format=form))[0]
    _check_forward(network, example, data)
    _check_sides(network, example, settings)
    if settings.whitening:
        whiten(network, example, data.train)
    optimizer = _optimizer(settings, network, example)
    steps = len(data.train) // settings.batch_size
    epochs, _ = length(settings, steps)
    run = Run(
        model=network,
        training_model=network,
        optimizer=optimizer,
        schedule=make_schedule(settings, optimizer, steps),
        data=data.train,
        test_data=data.test,
        loss=loss or nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing),
        example=example,
        epochs=epochs,
        device=device,
        generator=torch.Generator().manual_seed(seed),
        batch_size=settings.batch_size,
        schedule_each=settings.schedule_each,
        memory_format=form,
        clip_norm=settings.clip_norm,
        accumulate=settings.accumulate,
    )
    if settings.precision == "bfloat16":
        warn_of_slow_bfloat16(device)
        run.autocast = lambda: torch.autocast(device.type, torch.bfloat16)
    hooked = [strategy for strategy in strategies if strategy.defines("on_after_backward")]
    run.after_backward = [strategy.on_after_backward for strategy in hooked]
    _check_loss(run, data)
    return run


def _optimizer(settings: Settings, network: nn.Module, example: Tensor) -> torch.optim.Optimizer:
    """The optimizer over all parameters; Muon is told which layer runs last."""
    parameters = list(network.parameters())
    if settings.optimizer != "muon":
        return make_optimizer(settings, parameters)
    _, last = forward_order(network, example)[-1]
    return make_optimizer(settings, parameters, list(last.parameters()))


def _check_loss(run: Run, data: Dataset) -> None:
    """The loss of two images: one number from logits (2, classes) and labels (2,), int64."""
    logits, labels = torch.zeros(2, data.classes, device=run.device), data.train.labels[:2]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            value = run.loss(logits, labels)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"it gives {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}")
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise Refused(
            f"The loss does not map logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} to "
            f"one number ({first_line(error)}); give a function that does, such as torch.nn.CrossEntropyLoss()."
        ) from None


def _placed(model: Network, device: torch.device) -> nn.Module:
    """A network of this run's own, on the device."""
    try:
        network = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
    except LayerlabError:
        raise
    except Exception as error:  # the user's own, whatever it is
        what = "cannot be copied" if isinstance(model, nn.Module) else "cannot be built"
        raise Refused(f"The network {what} ({located(error)}); give a function that builds it without arguments.") \
            from error
    if not isinstance(network, nn.Module):
        raise Refused(f"model must be an nn.Module or a function that builds one, got {type(network)!r}.")
    if lazy := [name for name, tensor in chain(network.named_parameters(), network.named_buffers())
               if is_lazy(tensor)]:
        raise Refused(f"The network has layers that learn their size from the first image ({lazy[0]}); call it once on "
                      "one, or give the sizes.")
    network = network.to(device)
    parameters = list(network.parameters())
    if not parameters:
        raise Refused("The network has no parameters, so there is nothing to train.")
    if not any(parameter.requires_grad for parameter in parameters):
        raise Refused("Every parameter of the network is frozen, so there is nothing to train; set requires_grad of "
                      "those that are to learn.")
    return network


def _predicted(network: nn.Module, images: Tensor) -> Tensor:
    """The logits of images in evaluation mode, (batch, classes)."""
    with torch.no_grad():
        was = network.training
        network.eval()
        logits = network(images)
        network.train(was)
    return logits


def _check_sides(network: nn.Module, example: Tensor, settings: Settings) -> None:
    """The network takes images of all sides that it is to be trained with."""
    for start, _ in settings.sizes:
        side = side_of(settings, example.shape[2], start) or example.shape[2]
        try:
            _predicted(network, nn.functional.interpolate(example, (side, side), mode="bilinear", antialias=True))
        except (RuntimeError, ValueError, TypeError) as error:
            raise Refused(
                f"The network does not take images of {side} pixels a side ({first_line(error)}), which sizes asks "
                "for; leave sizes=(), or choose larger shares."
            ) from None


def _check_forward(network: nn.Module, example: Tensor, data: Dataset) -> None:
    """One forward pass of the example in evaluation mode: the network takes the images and gives one logit a class."""
    try:
        logits = _predicted(network, example)
    except LayerlabError:
        raise
    except Exception as error:  # torch's, or the network's own
        raise Refused(
            f"The network does not take images of shape {tuple(example.shape[1:])} as {data.name!r} gives "
            f"them ({located(error)}); load the data with another image_size or channels, or mend the network."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < data.classes:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise Refused(
            f"The network gives {shape} for {len(example)} images, but {data.name!r} has "
            f"{data.classes} classes: it must give one logit a class."
        )
