"""Learn&Drop on other people's networks: what is refused at the start, statistics, compiling, scores, plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerlab import Refused, build_model, compare, fit, load_dataset
from layerlab_learn_and_drop import LearnAndDrop
from layerlab_learn_and_drop.method.scores import Gradients

OPTIONS: dict[str, Any] = dict(batch_size=32, lr=0.02, progress=False)
EAGER: dict[str, Any] = dict(settled=10.0, flat=10.0, window=2, at_most=0.6)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=128, test_limit=64, device="cpu")


def resnet() -> nn.Module:
    return build_model("resnet-cifar", channels=1, depth=8)


def chain() -> nn.Module:
    """Blocks in a Sequential, with batch norms that follow the weights at a long distance."""
    def block(before: int, after: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after, momentum=1e-3), nn.ReLU(),
        )

    return nn.Sequential(
        block(1, 8), block(8, 8), block(8, 16), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)
    )


def deep() -> nn.Module:
    """Ten linear layers, each as wide as the next."""
    layers = [each for _ in range(9) for each in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))


def _dropped(result: Any) -> list[float]:
    return [row["learn-and-drop/dropped_layers"] for row in result.history]


# ---------------------------------------------------------------------------------------------- refused at the start


class Noisy(nn.Module):
    """Adds noise in training, between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu()
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.last(x)


class Shortened(nn.Module):
    """Leaves its second layer out in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu()
        return self.last(self.second(x) if self.training else x)


class Table(nn.Module):
    """A module without children that knows batches of up to two images."""

    def forward(self, x: Tensor) -> Tensor:
        return x * [1.0, 1.0, 1.0][len(x)]


class Drawn(nn.Module):
    """Draws in inference too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(())


def _with(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), module, nn.Linear(16, 10))


def _first_alone() -> nn.Module:
    model = chain().requires_grad_(False)
    model[0].requires_grad_(True)  # type: ignore[index]  # a Sequential
    return model


@pytest.mark.parametrize(("model", "message"), [
    (Noisy(), "cannot cut Noisy: it runs other operations in training than in inference"),
    (Shortened(), "cannot cut Shortened: it runs other operations in training than in inference"),
    (_first_alone(), "no place to cut Sequential: behind each layer nothing learns"),
    (_with(Table()), r"cannot cut Sequential: the first try ends in IndexError \(list index out of range\)"),
    (_with(Drawn()), "cannot cut Sequential: cut behind 1 layers it gives other outputs than whole"),
])
def test_what_cannot_be_cut_is_refused_before_the_first_step(data, model, message):
    with pytest.raises(Refused, match=message):
        LearnAndDrop().preflight(model, torch.zeros(2, 1, 8, 8))
    with pytest.raises(Refused, match=message):
        fit(model, data, LearnAndDrop(), epochs=30, **OPTIONS)


@pytest.mark.parametrize(("build", "last", "before"), [(resnet, "fc", 7), (chain, "5", 3)])
def test_the_last_layer_that_learns_is_never_dropped(data, build, last, before):
    model = build()
    model.get_submodule(last).requires_grad_(False)
    result = fit(model, data, LearnAndDrop(**EAGER | {"at_most": 1.0}, flops_per_byte=0), epochs=4, **OPTIONS)
    assert 0 < _dropped(result)[-1] < before
    left_out = result.preflights["learn-and-drop"].left_out
    assert {*result.strategies[0].layers[before - 1 :]} <= {*left_out}


@pytest.mark.parametrize("build", [resnet, chain])
def test_the_preflight_says_what_can_go_and_what_a_step_then_saves(data, build):
    result = fit(build, data, LearnAndDrop(**EAGER), epochs=4, **OPTIONS)
    found = result.preflights["learn-and-drop"]
    before, after = result.history[0], result.final
    assert after["learn-and-drop/dropped_layers"] > 0
    assert found.saves == {"forward FLOPs of a step": pytest.approx(
        1 - after["cost/forward_flops"] / before["cost/forward_flops"])}
    names = [name for name, module in result.model.named_modules() if next(module.parameters(recurse=False), None)
             is not None]
    assert {*found.covered, *found.left_out} == set(names)
    assert names[-1] in found.left_out
    assert names[0] in found.covered
    (note,) = LearnAndDrop(at_most=1e-6).preflight(build(), torch.zeros(2, 1, 8, 8)).notes
    assert note.endswith("nothing is dropped.")


# ---------------------------------------------------------------------------------------------- statistics, compiling


@pytest.mark.parametrize("flops_per_byte", [0, 1e9])
@pytest.mark.parametrize(("build", "conv", "norm"), [(resnet, "conv", "bn"), (chain, "0.0", "0.1")])
def test_layers_leave_with_the_statistics_of_their_last_weights(data, build, conv, norm, flops_per_byte):
    strategy = LearnAndDrop(**EAGER, flops_per_byte=flops_per_byte)
    result = fit(build, data, strategy, epochs=3, **OPTIONS)
    assert result.final["learn-and-drop/dropped_layers" if not flops_per_byte else "learn-and-drop/frozen_layers"] > 0
    images = torch.cat([x for x, _ in data.train.batches(32)])  # (128, 1, 8, 8)
    with torch.no_grad():
        maps = result.model.get_submodule(conv)(images)  # (128, channels, 8, 8)
    left = result.model.get_submodule(norm)
    torch.testing.assert_close(left.running_mean, maps.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert left.momentum == build().get_submodule(norm).momentum
    # Statistics that lag behind would be those of the first steps, and the tail would start anew.
    assert result.final["train/loss"] < result.history[1]["train/loss"]


@pytest.mark.parametrize("build", [resnet, chain])
def test_a_compiled_network_drops_the_same_layers(data, build):
    runs = [fit(build, data, LearnAndDrop(**EAGER), epochs=4, compile=how, measure=False, **OPTIONS)
            for how in (False, "eager")]
    assert _dropped(runs[0]) == _dropped(runs[1])
    assert _dropped(runs[0])[-1] > 0
    assert runs[1].history[0]["compile/graphs"] > 0
    states = [run.model.state_dict() for run in runs]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


# ---------------------------------------------------------------------------------------------- scores, plans


def test_the_score_from_gradients_on_a_worked_example():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    gradients = Gradients({0: [weight], 1: [nn.Parameter(torch.ones(1))]})
    for gradient in ([0.0, 5.0], [3.0, 0.0], [0.0, 1.0]):
        weight.grad = torch.tensor(gradient)
        gradients.add()
    # (5 + 3 + 1) / 3 steps, over ‖(3, 4)‖ = 5.
    assert gradients.score(0, [weight.detach()]) == pytest.approx(0.6)
    assert gradients.score(1, [torch.ones(1)]) is None


@pytest.mark.parametrize("build", [resnet, chain])
def test_the_score_from_gradients_decides_as_that_from_weights_does(data, build):
    runs = {score: fit(build, data, LearnAndDrop(**EAGER, score=score), epochs=4, **OPTIONS)
            for score in ("weights", "gradients")}
    name = f"learn-and-drop/change/{runs['weights'].strategies[0].layers[0]}"
    changes = [run.history[0][name] for run in runs.values()]
    assert changes[0] != changes[1]
    assert min(changes) > 0
    assert _dropped(runs["gradients"]) == _dropped(runs["weights"])
    # Gradients do not know the learning rate; how far weights move in a first step does.
    slow = fit(build, data, LearnAndDrop(**EAGER, score="gradients"), epochs=1, max_steps=1, **OPTIONS | {"lr": 1e-4})
    fast = fit(build, data, LearnAndDrop(**EAGER, score="gradients"), epochs=1, max_steps=1, **OPTIONS)
    assert slow.history[0][name] == fast.history[0][name]


@pytest.mark.parametrize("build", [resnet, deep])
def test_the_placebo_is_one_drop_in_the_middle_at_about_the_same_flops(data, build):
    runs = compare(build, data, {"plain": (), "drop": LearnAndDrop(**EAGER)}, epochs=8, placebo=True, **OPTIONS)
    (placebo,) = runs.placebos.values()
    counts = _dropped(runs.results[placebo, 0])
    start = next(index for index, count in enumerate(counts) if count)
    assert set(counts[start:]) == {counts[start]}
    assert counts != _dropped(runs.results["drop", 0])

    assert runs.paired("TFLOP", placebo, "drop").mean == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("build", [resnet, chain])
def test_a_plan_drops_what_it_says_when_it_says(data, build):
    result = fit(build, data, LearnAndDrop(drops={2: 1, 4: 2}, flops_per_byte=0), epochs=4, **OPTIONS)
    assert _dropped(result) == [0, 1, 1, 2]
    nothing = fit(build, data, LearnAndDrop(drops={99: 1}), epochs=2, **OPTIONS)
    assert nothing.strategies[0].placebo(nothing) is None
