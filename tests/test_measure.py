"""Costs against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from helpers import same_weights
from pydantic import PrivateAttr
from torch import nn

from layerlab import Fit, Strategy, build_model, fit
from layerlab.measure import Meter, layer_costs, mean_interval, peak_allocated, time_by_turns


def _measure(model: nn.Module, x: torch.Tensor) -> object:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    with Meter(model, optimizer, x) as meter:
        model(x).sum().backward()
        optimizer.step()
    return meter.cost


def test_a_linear_layer_by_hand():
    batch, inputs, outputs = 4, 6, 5
    layer = nn.Linear(inputs, outputs, bias=False)
    cost = _measure(layer, torch.randn(batch, inputs))
    assert cost.forward_flops == 2 * batch * inputs * outputs
    # The input needs no gradient, so backward is dW alone.
    assert cost.backward_flops == 2 * batch * inputs * outputs
    x = torch.randn(batch, inputs, requires_grad=True)
    assert _measure(layer, x).backward_flops == 2 * 2 * batch * inputs * outputs


def test_a_convolution_by_hand():
    batch, before, after, kernel, size = 2, 3, 8, 3, 10
    layer = nn.Conv2d(before, after, kernel)
    side = size - kernel + 1
    macs = batch * after * side * side * before * kernel * kernel
    cost = _measure(layer, torch.randn(batch, before, size, size))
    assert cost.forward_flops == 2 * macs
    assert cost.backward_flops == 2 * macs
    x = torch.randn(batch, before, size, size, requires_grad=True)
    assert _measure(layer, x).backward_flops == 2 * 2 * macs


def test_bytes_moved_by_hand():
    weight = torch.randn(6, 5, requires_grad=True)
    x = torch.randn(4, 6)
    with Meter() as meter:
        y = x @ weight
        y.backward(torch.ones_like(y))
        with torch.no_grad():
            weight.sub_(weight.grad)
    x_, w_, y_ = 4 * 6, 6 * 5, 4 * 5
    # ones_like writes y once; the product reads x and w and writes y.
    assert meter.cost.forward_bytes == 4 * (x_ + w_ + y_ + 2 * y_)
    assert meter.cost.backward_bytes == 4 * (x_ + y_ + w_)
    # In place: reads w and its gradient, writes w.
    assert meter.cost.update_bytes == 4 * 3 * w_


def test_peak_memory_by_hand():
    weight = nn.Parameter(torch.randn(100, 50))
    holder = nn.ParameterList([weight])
    x = torch.randn(10, 100)
    with Meter(holder, x) as meter:
        y = x @ weight
        (y * y).sum().backward()
    floats = weight.numel() + x.numel()
    # At the end of backward: dw (all of weight), y, its gradient; sums and products of y's size come and go.
    assert 4 * (2 * weight.numel() + x.numel() + y.numel()) <= meter.cost.peak_memory_bytes
    assert meter.cost.peak_memory_bytes <= 4 * (floats + weight.numel() + 5 * y.numel() + 8)


@pytest.mark.parametrize(("channels", "size"), [(3, 12), (8, 20)])
def test_the_allocators_peak_counts_what_a_kernel_takes_for_itself(channels, size):
    # Without oneDNN, a convolution unfolds its input inside the kernel: 9 × channels values a pixel, in no tensor.
    layer, x = nn.Conv2d(channels, 4, 3, padding=1, bias=False), torch.randn(1, channels, size, size)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        found = peak_allocated(lambda: None, lambda: layer(x), [x, layer.weight])
    result, unfolded = 4 * 4 * size**2, 4 * 9 * channels * size**2
    assert found == x.nbytes + layer.weight.nbytes + result + unfolded


def test_the_allocators_peak_knows_what_was_there_before_and_what_was_freed():
    x = torch.ones(1000)
    kept: list[torch.Tensor] = []

    def prepare() -> None:
        kept.append(torch.ones(500) + torch.ones(500))

    assert peak_allocated(prepare, x.square, [x, x[10:]]) == 4000 + 2000 + 4000
    assert peak_allocated(prepare, kept.clear, [x, *kept]) == 4000 + 2000 + 2000


def test_frozen_layers_are_measured_and_backward_ends_at_their_edge():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    x = torch.randn(4, 8)
    full = _measure(model, x)
    model[0].requires_grad_(False)
    less = _measure(model, x)
    macs = 4 * 8 * 8
    assert less.forward_flops == full.forward_flops
    # dW of the first and dX of the second layer are gone.
    assert full.backward_flops - less.backward_flops == 2 * 2 * macs


def test_recomputation_in_backward_counts_as_backward():
    from torch.utils.checkpoint import checkpoint

    # The product is computed again because the ReLU's result was not kept.
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    x = torch.randn(4, 8, requires_grad=True)
    with Meter() as meter:
        checkpoint(layers, x, use_reentrant=False).sum().backward()
    assert (meter.cost.forward_flops, meter.cost.backward_flops) == (2 * 256, 3 * 2 * 256)


@pytest.mark.parametrize("name", ["vgg-f", "resnet18", "mobilenet_v2", "densenet121"])
def test_layer_costs_add_up_to_what_a_real_forward_pass_counts(name):
    options = {"image_size": 64, "width": 128} if name == "vgg-f" else {}
    model = build_model(name, num_classes=10, **options).eval()
    table = layer_costs(model, (3, 64, 64), batch_size=2)
    with Meter() as meter, torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert 2 * table["forward_macs"].sum() == meter.cost.forward_flops


def test_interval_by_hand():
    # Student's t for two degrees of freedom at 97.5 %: 4.302653.
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 * 1.0 / math.sqrt(3), rel=1e-5)
    assert math.isnan(mean_interval([1.0])[1])


def test_turns_alternate():
    calls = []
    turns = time_by_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warmup=1)
    assert "".join(calls) == "ab" + "abbaabba"
    assert len(turns["a"].seconds) == 4
    middle, low, high = turns["a"].ratio(turns["a"])
    assert (middle, low, high) == (1, 1, 1)


class Dropping(Strategy):
    """Leaves a layer out of a step with a probability, as stochastic depth does; from an epoch on with another one."""

    name: ClassVar[str] = "dropping"
    first: float = 0.5
    later: float = 0.5

    _hooks: list[Any] = PrivateAttr(default_factory=list)
    _taken: list[bool] = PrivateAttr(default_factory=list)
    _share: float = PrivateAttr(1.0)

    def on_fit_start(self, run) -> None:
        generator = torch.Generator().manual_seed(run.generator.initial_seed())
        inner = run.model[1]

        class Sometimes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = inner

            def forward(own, x):
                if own.training:
                    self._taken.append(torch.rand((), generator=generator).item() >= self._share)
                    if not self._taken[-1]:
                        return x
                return own.inner(x)

        run.model[1] = Sometimes()

    def on_epoch_start(self, run) -> None:
        self._taken.clear()
        self._share = self.first if run.epoch == 1 else self.later

    def on_epoch_end(self, run) -> None:
        run.log("dropping/taken", sum(self._taken) / len(self._taken))


def _layers() -> nn.Module:
    # Multiply-accumulates of a step of 8 images: 8 · 64 · 64 for the layer in the middle, 8 · 64 · 10 for the last.
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 10))


def test_a_cost_that_differs_from_step_to_step_is_the_mean_of_several_with_an_interval(digits):
    result = fit(_layers(), digits, Dropping(), epochs=3, batch_size=8, progress=False)
    for row in result.history:
        # Forward: two operations a multiply-accumulate.
        whole, last = 179 * 2 * 8 * 64 * 64, 179 * 2 * 8 * 64 * 10
        share = (row["cost/forward_flops"] - last) / whole
        assert share == pytest.approx(row["dropping/taken"], abs=0.3)
        assert 0.2 < share < 0.8
        assert row["cost/flops_interval"] > 0


def test_a_strategy_that_costs_less_from_an_epoch_on_without_freezing_anything_is_measured_anew(digits):
    result = fit(_layers(), digits, Dropping(first=0.0, later=1.0), epochs=3, batch_size=64, progress=False)
    first, *later = [row["cost/forward_flops"] for row in result.history]
    assert [each / first for each in later] == pytest.approx([10 / 74, 10 / 74])
    assert not any("cost/flops_interval" in row for row in result.history)


def test_without_strategies_one_step_is_measured_in_the_whole_training(digits, monkeypatch):
    measured = []
    enter = Meter.__enter__
    monkeypatch.setattr(Meter, "__enter__", lambda self: measured.append(self) or enter(self))
    fit(_layers(), digits, epochs=3, batch_size=64, progress=False)
    assert len(measured) == 1
    fit(_layers(), digits, Dropping(first=0.0, later=0.0), epochs=3, batch_size=64, progress=False)
    # Four steps in the first epoch, to see whether they differ, then one in each.
    assert len(measured) == 1 + 4 + 1 + 1


class Changing(Strategy):
    """Freezes all but the last layer after so many steps of each epoch, and says so or does not."""

    name: ClassVar[str] = "changing"
    after: int = 10
    says: bool = True

    def on_epoch_start(self, run) -> None:
        run.freeze(self.name, ())

    def on_after_backward(self, run) -> None:
        if run.step % run.steps_per_epoch == self.after - 1:
            run.freeze(self.name, list(run.model.children())[:-1])
            if self.says:
                run.remeasure()


# (network, batch size): 22 steps of an epoch, and 44.
@pytest.mark.parametrize(("network", "batch"), [
    (_layers, 64),
    (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)), 32),
])
def test_a_strategy_that_asks_for_it_is_measured_anew_in_the_middle_of_an_epoch(digits, network, batch, monkeypatch):
    names = ("cost/forward_flops", "cost/backward_flops")
    options = dict(epochs=3, batch_size=batch, progress=False)
    every = fit(network(), digits, Changing(says=False), measure="every", **options)
    measured = []
    enter = Meter.__enter__
    monkeypatch.setattr(Meter, "__enter__", lambda self: measured.append(self) or enter(self))
    asked = fit(network(), digits, Changing(), **options)
    whole = fit(network(), digits, Dropping(first=0.0, later=0.0) if network is _layers else (), **options).final
    for row, exact in zip(asked.history, every.history, strict=True):
        assert [row[name] for name in names] == pytest.approx([exact[name] for name in names], rel=1e-12)
        assert "cost/flops_interval" not in row
        assert row["cost/backward_flops"] < whole["cost/backward_flops"]
    assert len(measured) <= 3 * (4 + 1) + 4 + 2


def test_what_a_strategy_asked_for_survives_an_interruption(digits, tmp_path):
    options = dict(epochs=3, batch_size=64)
    Fit(_layers, digits, Changing(after=1), checkpoint=tmp_path, **options).train_epoch()
    again = Fit(_layers, digits, Changing(after=1), checkpoint=tmp_path, **options)
    while not again.finished:
        again.train_epoch()
    every = fit(_layers, digits, Changing(after=1), measure="every", progress=False, **options)
    later = [row["cost/backward_flops"] for row in again.run.history[1:]]
    assert later == pytest.approx([row["cost/backward_flops"] for row in every.history[1:]], rel=1e-12)


def test_what_is_computed_outside_the_steps_counts_to_the_epoch_s_flops(digits):
    class Stores(Strategy):
        name: ClassVar[str] = "stores"

        def on_epoch_start(self, run) -> None:
            if run.epoch == 2:
                run.spend(1e6)
                run.spend(2e6)

    first, second, third = [row["cost/forward_flops"] for row in fit(
        _layers(), digits, Stores(), epochs=3, batch_size=64, progress=False).history]
    assert (second - first, third - first) == (3e6, 0)


class Noisy(nn.Module):
    """Draws its own random numbers, from torch's generator, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1))
        if self.training:
            x = x + 0.1 * torch.randn_like(x) * torch.bernoulli(torch.full_like(x, 0.8))
        return self.last(x.relu())


@pytest.mark.parametrize("network", [
    lambda: build_model("resnet-cifar", num_classes=10, channels=1, depth=8),
    lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Dropout2d(0.3), nn.ReLU(), nn.Flatten(), nn.Dropout(),
                          nn.Linear(288, 10)),
    Noisy,
    # torch's own counter takes the backward pass of SiLU and Mish apart, which rounds differently.
    lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.Mish(),
                          nn.Flatten(), nn.Linear(128, 10)),
], ids=["batch norm", "dropout", "random numbers of its own", "SiLU and Mish"])
def test_measuring_leaves_the_weights_bit_for_bit_the_same(digits, network):
    options = dict(epochs=2, batch_size=128, lr=0.02, progress=False)
    plain, once, every = (fit(network, digits, measure=measure, **options).model for measure in (False, True, "every"))
    assert same_weights(plain, once)
    assert same_weights(plain, every)
