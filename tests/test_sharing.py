"""Weights that are tied and modules that are used several times: what walks over a network loses none of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerlab import LayerlabError, Replaced, Run, fit, forward_order, load_dataset, load_model, prefixes, save_model
from layerlab.measure import layer_costs
from layerlab.training.loop import Fit

EXAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class TiedLayers(nn.Module):
    """The first linear layer and the third have one weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.last.weight = self.first.weight
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        return self.head(self.last(torch.relu(self.middle(x))))


class TwiceUsed(nn.Module):
    """One block under two names, one ReLU everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.block1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), self.relu)
        self.between = nn.Conv2d(8, 8, 1)
        self.block2 = self.block1
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.relu(self.stem(x)))
        return self.head(self.block2(self.between(x)).mean((2, 3)))


def untied(network: nn.Module) -> nn.Module:
    """Of the same values under the same names, each its own."""
    network = copy.deepcopy(network)
    if isinstance(network, TiedLayers):
        network.last.weight = nn.Parameter(network.last.weight.detach().clone())
    else:
        network.block2 = copy.deepcopy(network.block1)
    return network


BOTH = pytest.mark.parametrize("build", [TiedLayers, TwiceUsed])


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=64, test_limit=32, device="cpu")


def options(**more: Any) -> dict[str, Any]:
    return {"epochs": 2, "batch_size": 32, "lr": 0.02, "progress": False, **more}


def the_run(network: nn.Module, data: Any, **more: Any) -> Run:
    return Fit(network, data, epochs=1, batch_size=32, **more).run


@pytest.mark.parametrize(("build", "wanted"), [
    (TiedLayers, ["middle", "first", "last", "head"]),
    (TwiceUsed, ["stem", "between", "block1.0", "block1.1", "head"]),
])
def test_what_shares_a_weight_stands_where_it_is_last_used(build, wanted):
    network = build()
    assert [name for name, _ in forward_order(network, EXAMPLE)] == wanted
    kinds = (nn.Linear, nn.Conv2d)
    assert [name for name, _ in prefixes(network, EXAMPLE, kinds)] == [
        name for name in wanted if isinstance(network.get_submodule(name), kinds)]


@BOTH
def test_a_shared_weight_learns_until_all_that_have_it_are_frozen(build, data):
    run = the_run(build(), data)
    network = run.model
    if isinstance(network, TiedLayers):
        run.freeze("test", [network.first])
        assert network.first.weight.requires_grad
        assert not network.first.bias.requires_grad
        run.freeze("test", [network.first, network.last])
        assert not network.first.weight.requires_grad
    else:
        run.freeze("test", [network.block1])
        assert not any(parameter.requires_grad for parameter in network.block2.parameters())
    run.freeze("test", ())
    assert all(parameter.requires_grad for parameter in network.parameters())


@BOTH
def test_a_shared_weight_that_is_replaced_is_held_once_in_its_place(build, data):
    run = the_run(build(), data)
    shared = run.model.first if isinstance(run.model, TiedLayers) else run.model.block1[0]
    old = shared.weight
    place = [id(each) for each in run.optimizer.param_groups[0]["params"]].index(id(old))
    new = nn.Parameter(old.detach().clone())
    for module in run.model.modules():
        if getattr(module, "weight", None) is old:
            module.weight = new
    run.restructure(run.model, [Replaced(old, new, lambda state: state)])
    held = run.optimizer.param_groups[0]["params"]
    assert len(held) == len(list(run.model.parameters()))
    assert held[place] is new


@BOTH
def test_a_checkpoint_of_a_network_with_ties_is_not_that_of_one_without(build, data, tmp_path):
    network = build()
    first = fit(network, data, checkpoint=tmp_path, **options())
    assert fit(network, data, checkpoint=tmp_path, **options()).history == first.history
    with pytest.raises(LayerlabError, match="belongs to a fit with other arguments"):
        fit(untied(network), data, checkpoint=tmp_path, **options())


@BOTH
def test_a_saved_network_comes_back_with_its_ties_and_only_with_them(build, data, tmp_path):
    result = fit(build(), data, **options())
    file = save_model(tmp_path / "model.pt", result, data)
    again = load_model(file, build).model
    with torch.no_grad():
        assert torch.equal(again(EXAMPLE), result.model(EXAMPLE))
    assert len(list(again.parameters())) == len(list(result.model.parameters()))
    with pytest.raises(LayerlabError, match="shares other weights among its layers"):
        load_model(file, untied(build()))


@pytest.mark.parametrize(("build", "layers"), [
    (TiedLayers, ["first", "middle", "last", "head"]),
    (TwiceUsed, ["stem", "block1.0", "between", "block1.0", "head"]),
])
def test_every_call_of_a_layer_costs(build, layers):
    costs = layer_costs(build(), (1, 8, 8))
    assert list(costs["layer"]) == layers
    assert list(costs["forward_macs"]) == list(layer_costs(untied(build()), (1, 8, 8))["forward_macs"])
