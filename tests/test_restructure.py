"""A change of structure: the optimizer stays the user's, what is frozen stays frozen, what is exact is checked."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from helpers import Residual
from torch import nn

from layerlab import LayerlabError, Refused, Replaced, Run, Strategy, fit, load_dataset
from layerlab.testing.networks import mlp, plain_cnn
from layerlab.training.loop import Fit


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=64, test_limit=32, device="cpu")


def options(**more: Any) -> dict[str, Any]:
    return {"epochs": 3, "batch_size": 32, "lr": 0.02, "measure": False, **more}


def biases_apart(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Weights backwards in a first group, biases in a second, and the network's very first parameter in none."""
    rest = parameters[1:]
    weights, biases = [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim == 1]
    return torch.optim.SGD([{"params": weights[::-1]}, {"params": biases, "lr": 0.01}], lr=0.02, momentum=0.9)


def layers(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [each for each in network.modules() if isinstance(each, nn.Conv2d | nn.Linear)]


def renewed(network: nn.Module) -> list[Replaced]:
    """Put a copy in the place of every layer's weight."""
    found = []
    for layer in layers(network):
        old = layer.weight
        layer.weight = nn.Parameter(old.detach().clone())
        found.append(Replaced(old, layer.weight, torch.clone))
    return found


class Regrows(Strategy):
    """Renews all weights at each epoch's start, and gives a layer more a scale of its own each time."""

    name: ClassVar[str] = "regrows"
    changes_structure: ClassVar[bool] = True

    def on_epoch_start(self, run: Run) -> None:
        self.change(run, (run.epoch,))

    def on_load_checkpoint(self, run: Run) -> None:
        self.change(run, range(1, run.epoch + 1))

    def change(self, run: Run, epochs: Any) -> None:
        for epoch in epochs:
            # The last layer first: in the network's order it comes after those of later epochs.
            layers(run.model)[-epoch].scale = nn.Parameter(torch.ones(1))
        run.restructure(run.model, renewed(run.model), group=1)

    def on_after_backward(self, run: Run) -> None:
        for index, layer in enumerate(layers(run.model)):
            if hasattr(layer, "scale"):
                layer.scale.grad = torch.full((1,), 1.0 + index)


@pytest.mark.parametrize("build", [plain_cnn, Residual])
def test_groups_their_order_and_what_is_not_held_stay_as_they_were(build, data):
    run = Fit(build, data, optimizer=biases_apart, **options()).run
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    before = [[names[parameter] for parameter in group["params"]] for group in run.optimizer.param_groups]
    left_out = next(iter(names.values()))
    for _ in range(2):
        run.restructure(run.model, renewed(run.model))
        names = {parameter: name for name, parameter in run.model.named_parameters()}
        assert [[names[parameter] for parameter in group["params"]]
                for group in run.optimizer.param_groups] == before
    assert not any(left_out in group for group in before)


@pytest.mark.parametrize("build", [plain_cnn, Residual])
def test_a_parameter_that_the_users_optimizer_left_out_never_trains(build, data):
    torch.manual_seed(0)
    network = build()
    name, kept = next((name, value.detach().clone()) for name, value in network.named_parameters())
    result = fit(network, data, Regrows(), optimizer=biases_apart, progress=False, **options(epochs=2))
    assert torch.equal(result.model.get_parameter(name), kept)


@pytest.mark.parametrize("build", [plain_cnn, Residual])
def test_new_parameters_join_the_group_that_is_named_and_go_on_after_an_interruption(build, data, tmp_path):
    settings = options(optimizer=biases_apart)
    whole = Fit(build, data, Regrows(), **settings)
    while not whole.finished:
        whole.train_epoch()
    scales = [layer.scale for layer in layers(whole.run.model) if hasattr(layer, "scale")]
    held = whole.run.optimizer.param_groups[1]["params"]
    # In the order in which they came, which is not the network's.
    assert [id(each) for each in held[-3:]] == [id(each) for each in reversed(scales)]
    for epoch in (1, 2):
        folder = tmp_path / str(epoch)
        stopped = Fit(build, data, Regrows(), checkpoint=folder, **settings)
        while stopped.run.epoch < epoch:
            stopped.train_epoch()
        result = fit(build, data, Regrows(), checkpoint=folder, progress=False, **settings)
        for mine, theirs in zip(result.model.parameters(), whole.run.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_what_the_optimizer_trains_besides_the_network_stays_with_it(data):
    temperature = nn.Parameter(torch.ones(1))

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD([temperature, *parameters], lr=0.02)

    run = Fit(plain_cnn, data, optimizer=optimizer, **options()).run
    run.restructure(run.model, renewed(run.model))
    assert run.optimizer.param_groups[0]["params"][0] is temperature


class FreezesAll(Strategy):
    """From the second epoch on nothing learns."""

    name: ClassVar[str] = "freezes-all"

    def on_epoch_start(self, run: Run) -> None:
        run.freeze(self.name, [run.model] if run.epoch > 1 else ())

    def on_after_backward(self, run: Run) -> None:
        assert all(parameter.grad is not None for parameter in run.model.parameters())


def all_convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("build", [all_convolutional, mlp])
def test_a_step_in_which_nothing_learns_counts_its_loss_and_changes_nothing(build, optimizer, data):
    torch.manual_seed(0)
    network = build()
    once = fit(network, data, FreezesAll(), progress=False, **options(epochs=1, optimizer=optimizer))
    thrice = fit(network, data, FreezesAll(), progress=False, **options(epochs=3, optimizer=optimizer))
    for mine, theirs in zip(once.model.parameters(), thrice.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    losses = [row["train/loss"] for row in thrice.history]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("build", [all_convolutional, Residual])
def test_a_network_that_is_frozen_whole_is_refused(build, data):
    with pytest.raises(Refused, match="Every parameter of the network is frozen"):
        fit(build().requires_grad_(False), data, progress=False, **options())


@pytest.mark.parametrize("build", [plain_cnn, Residual])
def test_what_the_user_froze_is_known_and_never_thawed(build, data):
    network = build()
    layers(network)[0].requires_grad_(False)
    run = Fit(network, data, **options()).run
    mine = layers(run.model)[0]
    assert run.frozen_by_user == {mine}
    run.freeze("test", run.model.modules())
    assert run.frozen_by_user == {mine}
    run.restructure(run.model, renewed(run.model))
    run.freeze("test", ())
    assert [name for name, each in run.model.named_parameters() if not each.requires_grad] == [
        name for name, each in run.model.named_parameters() if each is mine.weight or each is mine.bias]


@pytest.mark.parametrize("build", [plain_cnn, Residual])
def test_an_exact_change_is_checked_and_leaves_everything_as_it_was(build, data):
    run = Fit(build, data, **options()).run
    before, state = run.model, torch.get_rng_state()
    same = copy.deepcopy(before)
    values = copy.deepcopy(before.state_dict())
    run.same_outputs(before, same, train=True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, values[name]) for name, value in before.state_dict().items())
    run.restructure(same, [Replaced(old, new, None) for old, new in
                           zip(before.parameters(), same.parameters(), strict=True)], exact=True)
    assert run.model is same
    other = copy.deepcopy(same)
    with torch.no_grad():
        layers(other)[0].weight.mul_(1.1)
    with pytest.raises(LayerlabError, match=r"changes its outputs for the example by up to [\d.e-]+ in evaluation"):
        run.restructure(other, exact=True)
    assert run.model is same
    with pytest.raises(LayerlabError, match="change a copy"):
        run.restructure(same, exact=True)


def test_exactness_in_training_is_another_matter(data):
    network = Residual()
    run = Fit(network, data, **options()).run
    folded = copy.deepcopy(run.model)
    folded.bn1.eval()
    folded.bn1.forward = lambda x: nn.functional.batch_norm(
        x, folded.bn1.running_mean, folded.bn1.running_var, folded.bn1.weight, folded.bn1.bias)
    run.same_outputs(run.model, folded)
    with pytest.raises(LayerlabError, match="in training mode"):
        run.same_outputs(run.model, folded, train=True)
