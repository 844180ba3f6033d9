"""The check of a strategy in a training loop that is not layerlab's."""

from __future__ import annotations

import copy
import unittest
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layerlab.base.devices import kept_random_states
from layerlab.base.errors import Refused
from layerlab.contract.strategy import Strategy
from layerlab.testing.trial import BATCH, EPOCHS, difference, digits, own_network, trained
from layerlab.training.attached import attach

# After which epoch the loop is interrupted, too.
_STOP = 2


def attaches(strategy: Strategy) -> None:
    """In a loop of the user's own it ends with the weights of `fit`, interrupted or not, or asks for `fit`."""
    try:
        with kept_random_states(torch.device("cpu")):
            whole = _loop(strategy, (EPOCHS,))
            parts = _loop(strategy, (_STOP, EPOCHS))
    except Refused as refusal:
        raise unittest.SkipTest(f"refused: {refusal}") from None
    where = difference(trained(strategy, weight_decay=0.0).model, whole)
    assert not where, (
        f"in a loop of the user's own it ends with other weights than in `fit` ({where}); read of `run` only what "
        "`help(layerlab.attach)` names, and declare with a class attribute what it replaces"
    )
    where = difference(whole, parts)
    assert not where, (
        f"interrupted after epoch {_STOP} of a loop of the user's own it ends with other weights ({where}); put what "
        "changes during training into `state_dict` and take it back in `load_state_dict`"
    )


def _loop(strategy: Strategy, stops: Sequence[int]) -> nn.Module:
    """Train as `fit` would with seed 0, in processes of which each ends at one of the `stops`."""
    data, saved = digits(), dict[str, Any]()
    images = next(data.test.batches(2))[0]
    for stop in stops:
        torch.manual_seed(0)
        model = own_network(strategy)()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, foreach=True)
        loss_of, generator = nn.CrossEntropyLoss(), torch.Generator().manual_seed(0)
        attached = attach(
            model, optimizer, copy.deepcopy(strategy), example=images, epochs=EPOCHS,
            steps=len(data.train) // BATCH, batch_size=BATCH, loss=loss_of, generator=generator,
        )
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            attached.load_state_dict(saved["attached"])
            torch.set_rng_state(saved["random"])
        while attached.run.epoch < stop:
            with attached.epoch():
                for x, y in data.train.batches(BATCH, generator):
                    optimizer.zero_grad(set_to_none=True)
                    with attached.forward():
                        loss = loss_of(model(x), y)
                    loss.backward()
                    attached.after_backward()
                    optimizer.step()
        saved = copy.deepcopy({
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "attached": attached.state_dict(),
            "random": torch.get_rng_state(),
        })
    attached.finish()
    return model.eval()
