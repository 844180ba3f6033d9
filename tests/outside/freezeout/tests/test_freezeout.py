"""FreezeOut: the schedule, and that frozen layers stand still."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from freezeout import FreezeOut, analysis, networks
from freezeout.strategy import freezing_times, rate
from pydantic import PrivateAttr
from torch import nn

from layerlab import LayerlabError, Run, Strategy, fit, load_dataset, measure
from layerlab.testing import parametrize_with_checks


@parametrize_with_checks([FreezeOut(t_0=0.5, spacing="linear"), FreezeOut()])
def test_contract(strategy, check):
    check(strategy)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", image_size=8, limit=256, test_limit=64, device="cpu")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )


def test_times_run_from_t_0_to_the_end():
    assert freezing_times(5, 0.5, "linear") == [0.5, 0.625, 0.75, 0.875, 1.0]
    assert freezing_times(3, 0.8, "cubic") == pytest.approx([0.512, 0.729, 1.0])


@pytest.mark.parametrize("t_i", [0.5, 0.8, 1.0])
def test_scaled_rates_of_every_layer_have_the_same_area(t_i):
    area = sum(rate((step + 0.5) / 1000, t_i, True) for step in range(1000)) / 1000
    assert area == pytest.approx(0.5, abs=1e-4)
    assert rate(0, t_i, False) == 1
    assert rate(t_i, t_i, True) == rate(1, t_i, True) == 0


class Watch(Strategy):
    """Notes the optimizer's groups at every step, and the weights at every epoch's end."""

    name: ClassVar[str] = "watch"
    _groups: list[Any] = PrivateAttr(default_factory=list)
    _weights: list[Any] = PrivateAttr(default_factory=list)

    def on_after_backward(self, run: Run) -> None:
        self._groups.append([{**group, "params": len(group["params"])} for group in run.optimizer.param_groups])

    def on_epoch_end(self, run: Run) -> None:
        self._weights.append({name: value.clone() for name, value in run.model.state_dict().items()})


def test_each_layer_follows_its_own_cosine_step_by_step(data):
    result = fit(network(), data, [FreezeOut(t_0=0.5, spacing="linear"), Watch()], epochs=4, batch_size=64, lr=0.1,
                 progress=False)
    watched = result.strategies[1]._groups
    assert len(watched) == 4 * (len(data.train) // 64)
    for step, groups in enumerate(watched):
        # The last layer's group is the first one: what another strategy adds joins that.
        assert [group["params"] for group in groups] == [2, 4, 4]
        wanted = [0.05 / t * (1 + math.cos(math.pi * min(1, step / len(watched) / t))) for t in (1.0, 0.75, 0.5)]
        assert [group["lr"] for group in groups] == pytest.approx(wanted)


def test_a_layer_stands_still_from_its_time_on_and_its_backward_is_saved(data):
    result = fit(network(), data, [FreezeOut(t_0=0.5, spacing="linear"), Watch()], epochs=4, batch_size=64, lr=0.1,
                 progress=False)
    assert [row["freezeout/frozen_layers"] for row in result.history] == [0, 0, 1, 2]
    changes = [{name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
               for before, after in pairwise(result.strategies[1]._weights)]
    # Convolutions 0 and 3 with the batch norms 1 and 4 behind them, statistics included; 8 is the classifier.
    assert changes == [{"0", "1", "3", "4", "8"}, {"3", "4", "8"}, {"8"}]
    costs = [row["cost/backward_flops"] for row in result.history]
    assert costs[0] == costs[1] > costs[2] > costs[3]


def test_with_nothing_to_freeze_it_is_cosine_annealing(data):
    options = dict(epochs=3, batch_size=64, lr=0.05, progress=False)
    torch.manual_seed(0)
    model = network()
    cosine = fit(model, data, schedule="cosine", schedule_each="step", **options)
    ours = fit(model, data, FreezeOut(t_0=1), **options)
    for (name, a), b in zip(cosine.model.state_dict().items(), ours.model.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-5), name


def test_an_optimizer_with_groups_of_its_own_keeps_their_settings(data):
    def split(parameters):
        return torch.optim.SGD([{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
                                {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}], lr=0.1)

    watch = fit(network(), data, [FreezeOut(), Watch()], epochs=2, batch_size=64, optimizer=split,
                progress=False).strategies[1]
    assert [(group["weight_decay"], group["params"]) for group in watch._groups[0]] == [
        (0.1, 1), (0.0, 1), (0.1, 1), (0.0, 3), (0.1, 1), (0.0, 3)]


def test_a_network_with_one_layer_is_refused(data):
    with pytest.raises(LayerlabError, match="freezeout needs a network of two layers or more"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data, FreezeOut(), epochs=1, progress=False)


def test_the_prediction_on_a_worked_example():
    costs = measure.layer_costs(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)), (1, 4, 4))
    assert costs["forward_macs"].tolist() == [32, 32]
    # Half of the first layer's backward: 16 of 128; counted, its backward is one product, of its weights: 16 of 160.
    assert analysis.predicted_saving(costs, [0.5, 1.0]) == {"paper": 12.5, "counted": 10.0}


@pytest.mark.parametrize(("name", "options", "layers"), [
    ("densenet-bc", {"depth": 16, "growth": 4}, 16), ("wide-resnet", {"depth": 10, "width": 2}, 11),
])
def test_the_networks_have_the_layers_they_are_named_by(name, options, layers):
    model = networks.build(name, 10, 1, **options)
    costs = measure.layer_costs(model, (1, 16, 16))
    assert len(costs) == layers  # with the classifier, which a Wide ResNet's name leaves out
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    with pytest.raises(LayerlabError, match=f"{name} has 6n \\+ 4 layers"):
        networks.build(name, 10, 1, depth=12)
    with pytest.raises(LayerlabError, match="cannot be built"):
        networks.build(name, 10, 1, dpth=16)
