"""One step of a run on a copy of the network, before the run: what a strategy can do with it shows there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerlab.base.devices import kept_random_states
from layerlab.base.errors import LayerlabWarning
from layerlab.contract.run import Run

# A method that acts every so many epochs has to fit in; only the first is rehearsed.
EPOCHS = 1000
# No fit's own: a strategy may keep something by the seed for another arm of the same comparison.
SEED = 2**40 + 1


@dataclass(frozen=True)
class _OneBatch:
    """Data of a single batch, as `Batches`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All of it, at once."""
        yield self.images.to(dtype, memory_format=memory_format), self.labels


@contextmanager
def rehearsal(network: nn.Module, example: Tensor) -> Iterator[tuple[Run, list[str]]]:
    """A run of one batch on a copy of a network; afterwards all random states are as they were.

    Args:
        network: is not changed.
        example: images, (batch, channels, height, width); of a single one two are made, for batch norm.

    Yields:
        (the run, the sentences of which strategies warn in the block).
    """
    model = copy.deepcopy(network)
    images = example if len(example) > 1 else torch.cat((example, example))
    said: list[str] = []
    with kept_random_states(images.device), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.eval()
        with torch.no_grad():
            classes = model(images).shape[1]
        model.train()
        labels = torch.arange(len(images), device=images.device) % classes  # (batch,)
        yield _run(model, _OneBatch(images, labels)), said
    said += dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, LayerlabWarning))


def _run(model: nn.Module, data: _OneBatch) -> Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
    return Run(
        model=model,
        training_model=model,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0),
        data=data,
        test_data=data,
        loss=nn.CrossEntropyLoss(),
        example=data.images,
        epochs=EPOCHS,
        device=data.images.device,
        generator=torch.Generator().manual_seed(SEED),
        batch_size=len(data),
        steps_per_epoch=1,
    )
