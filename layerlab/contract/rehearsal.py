"""One step of a run on a copy of the network, before the run: what a strategy can do with it shows there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerlab.base.devices import kept_random_states
from layerlab.base.errors import LayerlabWarning
from layerlab.base.trees import count, on_tensors, predict, tensors
from layerlab.contract.run import Run

# A method that acts every so many epochs has to fit in; only the first is rehearsed.
EPOCHS = 1000
# No fit's own: a strategy may keep something by the seed for another arm of the same comparison.
SEED = 2**40 + 1


@dataclass(frozen=True)
class _OneBatch:
    """Data of a single batch, as `Batches`."""

    images: Any
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Iterator[tuple[Any, Tensor]]:
        """All of it, at once."""

        def placed(each: Tensor) -> Tensor:
            kind = dtype if each.is_floating_point() else each.dtype
            return each.to(kind, memory_format=memory_format if each.dim() == 4 else torch.preserve_format)

        yield on_tensors(placed, self.images), self.labels


@contextmanager
def rehearsal(network: nn.Module, example: Any) -> Iterator[tuple[Run, list[str]]]:
    """A run of one batch on a copy of a network; afterwards all random states are as they were.

    Args:
        network: is not changed.
        example: a batch's inputs, images, (batch, channels, height, width), say; of a single one two are made, for
            batch norm.

    Yields:
        (the run, the sentences of which strategies warn in the block).
    """
    model = copy.deepcopy(network)
    inputs = example if count(example) > 1 else on_tensors(lambda each: torch.cat((each, each)), example)
    device = tensors(inputs)[0].device
    said: list[str] = []
    with kept_random_states(device), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.eval()
        with torch.no_grad():
            output = predict(model, inputs)
        model.train()
        of_classes = isinstance(output, Tensor) and output.dim() == 2
        labels = torch.arange(count(inputs), device=device) % (output.shape[1] if of_classes else 1)  # (batch,)
        yield _run(model, _OneBatch(inputs, labels), nn.CrossEntropyLoss() if of_classes else _any_loss), said
    said += dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, LayerlabWarning))


def _any_loss(output: Any, _: Tensor) -> Tensor:
    """A loss of outputs that are no logits of classes: what is rehearsed is the way of the gradients."""
    return tensors(output)[0].float().square().mean()


def _run(model: nn.Module, data: _OneBatch, loss: Callable[[Any, Tensor], Tensor]) -> Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
    return Run(
        model=model,
        training_model=model,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0),
        data=data,
        test_data=data,
        loss=loss,
        objective=lambda network, x, y: loss(predict(network, x), y),
        example=data.images,
        epochs=EPOCHS,
        device=data.labels.device,
        generator=torch.Generator().manual_seed(SEED),
        batch_size=len(data),
        steps_per_epoch=1,
    )
