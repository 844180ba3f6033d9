"""The start of a run: data and network on the device, optimizer and schedule, a first forward pass that is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from layerlab.base.errors import LayerlabError, Refused, first_line, located
from layerlab.base.trees import count, manner, on_tensors, predict, shapes
from layerlab.contract.run import Run
from layerlab.contract.strategy import Strategy
from layerlab.training.choosing import memory_format, warn_of_slow
from layerlab.training.evaluation import joined, logits, takes_model
from layerlab.training.settings import Settings, length, make_optimizer, make_schedule
from layerlab.training.whitening import whiten
from layerlab.workload.dataset import Dataset, Moment, Split
from layerlab.workload.examples import Examples
from layerlab.workload.order import forward_order
from layerlab.workload.own import Data, OwnData, offers, on_halves

Network = nn.Module | Callable[[], nn.Module]
# Of (output, target), or of (model, batch).
Loss = Callable[..., Tensor]
# Settings of images as bytes, which `Split` has.
OF_IMAGES = ("augment", "padding", "sizes", "whitening")


def on_device(data: Data, device: torch.device) -> Data:
    """The dataset with labels and resident images on a device; streamed images stay where they are."""
    return on_halves(partial(_moved, device=device), data)


def _moved(half: Split | Examples, device: torch.device) -> Split | Examples:
    if isinstance(half, Examples):
        return half.to(device)
    if half.labels.device == device:
        return half
    images = half.images.to(device) if isinstance(half.images, Tensor) else half.images
    return replace(half, images=images, labels=half.labels.to(device))


def prepared(data: Data, settings: Settings) -> Data:
    """The dataset for one training: augmented as the settings say, and with a moment of its own.

    Raises:
        Refused: settings of images as `load_dataset` gives them, for data of another kind.
    """
    if isinstance(data, OwnData):
        for name in OF_IMAGES:
            if (value := getattr(settings, name)) != Settings.model_fields[name].default:
                raise Refused(f"{name}={value!r} is for images as load_dataset gives them; leave it out with "
                              f"{data.name!r}, and give own_data a transform.")
        if settings.views != "plain" and "images" not in offers(data):
            raise Refused(f"views={settings.views!r} mirrors images, which {data.name!r} does not give; leave it out.")
        return replace(data, train=replace(data.train, moment=Moment()))
    train = data.train
    augment = train.augment if settings.augment is None else settings.augment
    padding = train.padding if settings.padding is None else settings.padding
    return replace(data, train=replace(train, augment=augment, padding=padding, moment=Moment()))


def side_of(settings: Settings, whole: int, done: float) -> int | None:
    """Pixels of the images' side when a share of the epochs is done; None for all of the `whole` side."""
    sides = [side for start, side in settings.sizes if start <= done]
    return max(1, round(whole * sides[-1])) if sides and sides[-1] != 1 else None


def start(
    model: Network, data: Data, strategies: Sequence[Strategy], settings: Settings, seed: int,
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
    _check_size(data, settings.batch_size)
    device = data.train.device
    network = _placed(model, device)
    form = memory_format(settings, network, data.train, folder, writes)
    network.to(memory_format=form)
    # Two images, (batch, channels, height, width), say: what strategies trace the network with.
    batch = next(data.test.batches(min(2, len(data.test)), memory_format=form))
    example, target = on_tensors(lambda each: each[:2], batch)
    output = _check_forward(network, example, data)
    _check_sides(network, example, settings)
    if settings.whitening and isinstance(data, Dataset):
        whiten(network, example, data.train)
    optimizer = _optimizer(settings, network, example)
    measured = loss or nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    steps = len(data.train) // settings.batch_size
    epochs, _ = length(settings, steps)
    run = Run(
        model=network,
        training_model=network,
        optimizer=optimizer,
        schedule=make_schedule(settings, optimizer, steps),
        data=data.train,
        test_data=data.test,
        loss=measured,
        # None stands for the loss of the output for one tensor.
        objective=_objective(measured, data, network, example, output),  # type: ignore[arg-type]
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
    _join_in(run, settings, strategies)
    if isinstance(data, OwnData) or takes_model(measured):
        _check_own_loss(run, example, target)
    else:
        _check_loss(run, data)
    return run


def _check_size(data: Data, batch_size: int) -> None:
    """Raises Refused where an epoch has no step."""
    if len(data.train) < batch_size:
        raise Refused(
            f"batch_size {batch_size} is larger than the {len(data.train)} training "
            f"{'images' if isinstance(data, Dataset) else 'examples'} of {data.name!r}; make it smaller."
        )


def _join_in(run: Run, settings: Settings, strategies: Sequence[Strategy]) -> None:
    """Give a run its autocast, and what is called after each backward."""
    if settings.precision != "float32":
        kind = getattr(torch, settings.precision)
        warn_of_slow(run.device, kind)
        run.autocast = lambda: torch.autocast(run.device.type, kind)
    if settings.precision == "float16":
        run.scaler = torch.amp.GradScaler(run.device.type)
    hooked = [strategy for strategy in strategies if strategy.defines("on_after_backward")]
    run.after_backward = [strategy.on_after_backward for strategy in hooked]


def _objective(
    loss: Loss, data: Data, network: nn.Module, example: Any, output: Any
) -> Callable[[nn.Module, Any, Any], Tensor] | None:
    """What a step computes of a batch, decided once: None for the loss of a network's output for one tensor."""
    if takes_model(loss):
        return lambda network, x, y: loss(network, joined(data.train, x, y))
    if isinstance(example, Tensor) and isinstance(output, Tensor):
        return None
    take = manner(network, example)
    return lambda network, x, y: loss(logits(take(network, x)), y)


def _check_own_loss(run: Run, x: Any, y: Any) -> None:
    """The loss of two examples: one number.

    Raises:
        Refused: it is none, or there is nothing to compare the output with.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            run.model.eval()
            value = run.objective(run.model, x, y)
            run.model.train()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"it gives {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}")
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        what = "the output and the target" if y is not None else "the output, for the batches have no target,"
        raise Refused(f"The loss does not map {what} to one number ({located(error)}); give loss=function(output, "
                      "target), or loss=function(model, batch) with these names.") from error


def _optimizer(settings: Settings, network: nn.Module, example: Any) -> torch.optim.Optimizer:
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


def _predicted(network: nn.Module, inputs: Any) -> Any:
    """What the network gives in evaluation mode: of images the logits, (batch, classes)."""
    with torch.no_grad():
        was = network.training
        network.eval()
        output = predict(network, inputs)
        network.train(was)
    return output


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


def _check_forward(network: nn.Module, example: Any, data: Data) -> Any:
    """One forward pass of the example in evaluation mode: the network takes the images and gives one logit a class.

    Returns:
        What it gives.
    """
    images = isinstance(data, Dataset)
    try:
        found = _predicted(network, example)
    except LayerlabError:
        raise
    except Exception as error:  # torch's, or the network's own
        what = f"images of shape {tuple(example.shape[1:])}" if images else shapes(example)
        remedy = "load the data with another image_size or channels, or mend the network" if images else "mend either"
        raise Refused(
            f"The network does not take {what} as {data.name!r} gives them ({located(error)}); {remedy}."
        ) from error
    given = logits(found)
    of_classes = data.classes and isinstance(given, Tensor) and given.dim() == 2
    if (images and not of_classes) or (of_classes and given.shape[1] < data.classes):
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise Refused(
            f"The network gives {shape} for {count(example)} images, but {data.name!r} has "
            f"{data.classes} classes: it must give one logit a class."
        )
    return found
