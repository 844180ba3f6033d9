"""Loss, accuracy and other metrics of a network on a split."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, SkipValidation
from torch import Tensor, nn

from layerlab.base.arguments import validated
from layerlab.base.errors import Refused, brief, first_line, unknown
from layerlab.base.trees import count, predict, tensors
from layerlab.contract.run import Batches
from layerlab.workload.examples import are_classes

# Maps (output, target), or (model, batch), to a number; or an object of torchmetrics.
Metrics = str | Mapping[str, Any]
# Metrics that the mean loss tells.
OF_LOSS: Mapping[str, Callable[[float], float]] = {"perplexity": math.exp}
# Of an image, whose logits are averaged.
Views = Literal["plain", "mirrored", "shifted"]
# How the first parameter of a function is called that is given the network and the whole batch.
NETWORK = ("model", "network")


def takes_model(function: Callable[..., Any]) -> bool:
    """Whether a loss or a metric is a function of (model, batch): its first parameter is called so.

    Example:
        >>> takes_model(lambda model, batch: model(batch).mean()), takes_model(nn.CrossEntropyLoss())
        (True, False)
    """
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some functions of C have no signature
        return False
    return bool(parameters) and parameters[0] in NETWORK


@validated
def evaluate(
    model: nn.Module,
    data: SkipValidation[Batches],
    loss: Callable[..., Tensor] | None = None,
    batch_size: Annotated[int, Field(ge=1)] = 512,
    autocast: Callable[[], Any] = nullcontext,
    memory_format: torch.memory_format = torch.contiguous_format,
    views: Views = "plain",
    metrics: Metrics = MappingProxyType({}),
) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy (as shares) of a network on a split; leaves the network in evaluation mode.

    Args:
        model: maps images, or the inputs of other batches, to logits or another output.
        data: a `Split`, or an object that gives batches as it does, on the network's device.
        loss: maps (logits, labels), or (model, batch), to a scalar, the batch's mean. Default: cross-entropy.
        batch_size: examples at a time.
        autocast: gives the context of forward and loss.
        memory_format: of the images.
        views: of which mean logits are taken; as the setting of `fit`.
        metrics: name → a function of (output, target), or of (model, batch), whose mean over the examples counts; or an
            object of torchmetrics, which is updated with (output, target). `perplexity` is known by its name.

    Raises:
        LayerlabError: what is no half of data, or a metric that is none or does not take what there is.

    Returns:
        `test/loss`; where labels are classes, `test/top1` and `test/top5`, shares; `test/NAME` of each metric.

    Example:
        >>> from layerlab import build_model, evaluate, load_dataset
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> sorted(evaluate(build_model("mlp", num_classes=10, image_size=8, width=16), data.test))
        ['test/loss', 'test/top1', 'test/top5']
    """
    # Long because its docstring names every argument, with an example.
    if not hasattr(data, "batches"):
        raise Refused(f"evaluate takes a half of data, such as `data.test`, got {brief(data)}; own_data makes one of a "
                      "DataLoader, a Dataset or tensors.")
    loss = loss or nn.CrossEntropyLoss()
    objective, measured = takes_model(loss), Measured(metrics)
    needed = not objective or measured.of_output
    model.eval()
    sums: Any = 0.0
    examples, classes = 0, False
    with torch.no_grad():
        for x, y in data.batches(batch_size, None, torch.float32, memory_format):
            number = count((x, y))
            with autocast():
                output = logits(predict(model, x)) if needed or are_classes(y) else None
                if views != "plain":
                    assert output is not None
                    output = _over_views(model, x, output, views)
                batch = joined(data, x, y)
                value = loss(model, batch) if objective else loss(output, y)
                measured.add(model, batch, output, y)
            parts = [value.float() * number]
            classes = are_classes(y) and isinstance(output, Tensor) and output.dim() == 2
            if classes:
                assert output is not None
                best = output.topk(min(5, output.shape[1])).indices == y.unsqueeze(1)  # (batch, up to 5)
                parts += [best[:, 0].sum(), best.sum()]
            sums = sums + torch.stack(parts)
            examples += number
    mean_loss, *accuracies = (sums / examples).tolist()
    named = dict(zip(("test/top1", "test/top5"), accuracies, strict=True)) if classes else {}
    return {"test/loss": mean_loss, **named, **measured.found(mean_loss, examples)}


def _over_views(model: nn.Module, x: Tensor, plain: Tensor, views: Views) -> Tensor:
    """The logits (batch, classes) over the views of images (batch, channels, height, width).

    Args:
        plain: the logits of the images as they are.
    """
    mirrored = (plain + model(x.flip(-1))) / 2
    if views == "mirrored":
        return mirrored
    height, width = x.shape[-2:]
    padded = nn.functional.pad(x, [1] * 4, mode="reflect")
    total = torch.zeros_like(plain)
    for row, column in ((0, 0), (2, 2)):
        shifted = padded[..., row : row + height, column : column + width]
        total += (model(shifted) + model(shifted.flip(-1))) / 2
    return (mirrored + total / 2) / 2


def joined(data: Any, x: Any, y: Any) -> Any:
    """The batch that was divided into x and y, as its data give it."""
    form = getattr(data, "form", None)
    return form.join(x, y) if form is not None else (x, y)


def logits(output: Any) -> Any:
    """What a network gives; of the objects that the networks of transformers give, their logits."""
    return getattr(output, "logits", output)


class Measured:
    """Metrics over one pass.

    Args:
        metrics: as `evaluate`.

    Raises:
        Refused: a metric that is none, or a name that is not known.

    Attributes:
        of_output: whether one of them needs the network's output.
    """

    def __init__(self, metrics: Metrics) -> None:
        given = {metrics: metrics} if isinstance(metrics, str) else dict(metrics)
        self._of_loss, self._functions, self._objects = {}, {}, {}
        for name, metric in given.items():
            if isinstance(metric, str):
                if metric not in OF_LOSS:
                    raise Refused(str(unknown("metric", metric, OF_LOSS, "Or give a function of (output, target).")))
                self._of_loss[name] = OF_LOSS[metric]
            elif all(hasattr(metric, part) for part in ("update", "compute", "reset")):
                self._objects[name] = copy.deepcopy(metric)
                self._objects[name].reset()
            elif callable(metric):
                self._functions[name] = metric
            else:
                raise Refused(f"The metric {name!r} is {metric!r}; give a function of (output, target), an object of "
                              f"torchmetrics, or one of {', '.join(OF_LOSS)}.")
        self._sums = dict.fromkeys(self._functions, 0.0)
        self.of_output = bool(self._objects) or not all(map(takes_model, self._functions.values()))

    def add(self, model: nn.Module, batch: Any, output: Any, target: Any) -> None:
        """A batch.

        Raises:
            Refused: a metric does not take it.
        """
        for name, metric in (self._functions | self._objects).items():
            try:
                if name in self._objects:
                    metric.to(tensors(target)[0].device).update(output, target)
                    continue
                value = metric(model, batch) if takes_model(metric) else metric(output, target)
                self._sums[name] += float(value) * count(batch)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise Refused(f"The metric {name!r} does not take what the network gives and its target "
                              f"({first_line(error)}); give a function of (output, target) that does.") from error

    def found(self, mean_loss: float, examples: int) -> dict[str, float]:
        """`test/NAME` of each metric."""
        values = {name: function(mean_loss) for name, function in self._of_loss.items()}
        values |= {name: total / examples for name, total in self._sums.items()}
        values |= {name: float(metric.compute()) for name, metric in self._objects.items()}
        return {f"test/{name}": value for name, value in values.items()}
