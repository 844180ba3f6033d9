"""The checks of which networks a strategy trains, and of what it says of them beforehand."""

from __future__ import annotations

import copy
import unittest
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from layerlab.base.errors import Refused, reason
from layerlab.base.sharing import shared_names
from layerlab.contract.preflight import Preflight, parameter_layers, unmentioned
from layerlab.contract.strategy import Strategy
from layerlab.testing.networks import CLASSES, NETWORKS, SHAPE, SHARED, TIED, UNUSUAL, Network, relu_thrice
from layerlab.testing.trial import EPOCHS, digits, logits_of, own_network, train
from layerlab.training.results import FitResult


def refused_at_the_start(strategy: Strategy) -> None:
    """It refuses a network before the first step or trains it to the end."""
    for name, build in _every(strategy, UNUSUAL).items():
        try:
            job, _ = train([copy.deepcopy(strategy)], build, until=0)
        except Refused:
            continue
        try:
            while job.run.epoch < EPOCHS:
                job.train_epoch()
            job.finish()
        except Exception as error:
            raise AssertionError(
                f"it accepts the network {name} and ends in epoch {job.run.epoch} with {reason(error)}; do once, on a "
                "copy, in `preflight` what may fail, and raise layerlab.Refused there"
            ) from error


def shared_modules(strategy: Strategy) -> None:
    """Trains a network that uses a ReLU object three times or a block twice as what it is, or refuses it."""
    torch.manual_seed(0)
    shared, own = relu_thrice(), relu_thrice(shared=False)
    own.load_state_dict(shared.state_dict())
    mine, theirs = _accepted(strategy, shared), _accepted(strategy, own)
    if mine is not None and theirs is not None:
        logits, wanted = logits_of(mine.model), logits_of(theirs.model)
        assert torch.allclose(logits, wanted, rtol=1e-3, atol=1e-4), (
            "a chain with one ReLU object in three places ends as another network than one with three objects "
            f"({(logits - wanted).abs().max():.3g} apart); walk over names, not over different modules: "
            "named_modules(remove_duplicate=False)"
        )
    _keeps_ties(strategy, {"block-twice": SHARED["block-twice"]})


def tied_weights(strategy: Strategy) -> None:
    """Weights that are tied are tied at the end, or the network is refused."""
    _keeps_ties(strategy, TIED)


def _keeps_ties(strategy: Strategy, networks: Mapping[str, Network]) -> None:
    for name, build in networks.items():
        groups = shared_names(build())
        result = _accepted(strategy, build)
        if result is None:
            continue
        now = dict(result.model.named_parameters(remove_duplicate=False))
        for group in groups:
            left = {id(now[each]) for each in group if each in now}
            assert len(left) <= 1, (
                f"it unties {' and '.join(each for each in group if each in now)} of the network {name}; put a new "
                "parameter wherever the old one stood, or raise layerlab.Refused"
            )


def frozen_by_others(strategy: Strategy) -> None:
    """A layer that the user froze stays frozen and keeps its weights bit for bit."""
    for name, build in _every(strategy, {}).items():
        torch.manual_seed(0)
        network = build()
        layer, module = next(iter(parameter_layers(network).items()))
        module.requires_grad_(False)
        kept = {f"{layer}.{part}": value.clone() for part, value in module.named_parameters(recurse=False)}
        result = _accepted(strategy, network)
        if result is None:
            continue
        now = dict(result.model.named_parameters())
        for part, value in kept.items():
            assert part in now, f"it removes {part!r}, which the user froze, from the network {name}"
            assert not now[part].requires_grad, (
                f"it thaws {part!r}, which the user froze, in the network {name}; freeze and thaw with `run.freeze`"
            )
            assert now[part].shape == value.shape, f"it reshapes {part!r}, which the user froze, in the network {name}"
            assert torch.equal(now[part], value), (
                f"it changes {part!r}, which the user froze, in the network {name}; leave what needs no gradient as it "
                "is (run.frozen_by_user)"
            )


def coverage_said(strategy: Strategy) -> None:
    """Its pre-flight has every layer with parameters among those that it covers or leaves out, with a reason."""
    example = next(digits().test.batches(2))[0]
    said = 0
    for name, build in _every(strategy, {**SHARED, **TIED, **UNUSUAL}).items():
        network = build()
        try:
            found = strategy.preflight(network, example)
        except Refused:
            continue
        said += 1
        _complete(found, network, example, name)
    if not said:
        raise unittest.SkipTest("refuses all of the networks")


def _complete(found: Preflight, network: nn.Module, example: Tensor, name: str) -> None:
    names = (*found.covered, *found.left_out)
    for layer in unmentioned(network, names):
        raise AssertionError(
            f"its preflight says nothing of layer {layer!r} of the network {name}; list it as covered or as left out, "
            "with the reason (Preflight.of does the latter)"
        )
    known = {each for each, _ in (*network.named_modules(remove_duplicate=False),
                                  *network.named_parameters(remove_duplicate=False))}
    for each in names:
        assert each in known, f"its preflight names {each!r}, which the network {name} does not have"
    for each, why in found.left_out.items():
        assert why.strip(), f"its preflight leaves {each!r} of the network {name} out without a reason"
        assert each not in found.covered, f"its preflight has {each!r} of the network {name} covered and left out"


def _every(strategy: Strategy, more: Mapping[str, Network]) -> dict[str, Network]:
    """The networks of the contract, the strategy's own among them, and some more."""
    own = {} if type(strategy).example_network(SHAPE, CLASSES) is None else {"example": own_network(strategy)}
    return {**NETWORKS, **own, **more}


def _accepted(strategy: Strategy, model: nn.Module | Network) -> FitResult | None:
    """A fit with a copy of the strategy; None if it refuses the network."""
    try:
        return train([copy.deepcopy(strategy)], model)[1]
    except Refused:
        return None
