"""The start of a run: data and network on the device, optimizer and schedule, a first forward pass that is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from layerlab.base.errors import LayerlabError, Refused, first_line, located
from layerlab.contract.run import Run
from layerlab.contract.strategy import Strategy
from layerlab.training.settings import Settings, length, make_optimizer, make_schedule
from layerlab.workload.dataset import Dataset, Split

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


def memory_format(settings: Settings) -> torch.memory_format:
    """The memory format of images and convolutions."""
    return torch.channels_last if settings.channels_last else torch.contiguous_format


def start(
    model: Network, data: Dataset, strategies: Sequence[Strategy], settings: Settings, seed: int,
    loss: Loss | None = None,
) -> Run:
    """A run before its first epoch, under the random state that is in force.

    Args:
        model: a network, which is copied, or a function that builds one.
        data: on its device, where the run trains.
        strategies: whose `on_after_backward` the run calls.
        settings, seed, loss: as `fit`.

    Raises:
        Refused: no network, one without parameters or frozen whole, one that does not fit the data, or too few images.
    """
    if len(data.train) < settings.batch_size:
        raise Refused(
            f"batch_size {settings.batch_size} is larger than the {len(data.train)} training images of "
            f"{data.name!r}; make it smaller."
        )
    device = data.train.labels.device
    network = _placed(model, device, settings)
    optimizer = make_optimizer(settings, list(network.parameters()))
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
        # (batch, channels, height, width), two images: what strategies trace the network with.
        example=next(data.test.batches(min(2, len(data.test)), memory_format=memory_format(settings)))[0],
        epochs=epochs,
        device=device,
        generator=torch.Generator().manual_seed(seed),
        batch_size=settings.batch_size,
        schedule_each=settings.schedule_each,
    )
    if settings.precision == "bfloat16":
        run.autocast = lambda: torch.autocast(device.type, torch.bfloat16)
    run.after_backward = [
        strategy.on_after_backward for strategy in strategies if strategy.defines("on_after_backward")
    ]
    _check_forward(run, data)
    _check_loss(run, data)
    return run


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


def _placed(model: Network, device: torch.device, settings: Settings) -> nn.Module:
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
    # Both at once is not in torch's stubs.
    network = network.to(device, memory_format=memory_format(settings))  # type: ignore[call-overload]
    parameters = list(network.parameters())
    if not parameters:
        raise Refused("The network has no parameters, so there is nothing to train.")
    if not any(parameter.requires_grad for parameter in parameters):
        raise Refused("Every parameter of the network is frozen, so there is nothing to train; set requires_grad of "
                      "those that are to learn.")
    return network


def _check_forward(run: Run, data: Dataset) -> None:
    """One forward pass of the example in evaluation mode: the network takes the images and gives one logit a class."""
    network = run.model
    try:
        with torch.no_grad():
            was = network.training
            network.eval()
            logits = network(run.example)  # (batch, classes)
            network.train(was)
    except LayerlabError:
        raise
    except Exception as error:  # torch's, or the network's own
        raise Refused(
            f"The network does not take images of shape {tuple(run.example.shape[1:])} as {data.name!r} gives "
            f"them ({located(error)}); load the data with another image_size or channels, or mend the network."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < data.classes:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise Refused(
            f"The network gives {shape} for {len(run.example)} images, but {data.name!r} has "
            f"{data.classes} classes: it must give one logit a class."
        )
