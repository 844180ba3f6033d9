"""Strategies in a plain PyTorch loop: five lines of it are layerlab's, and the weights are those of `fit`."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import Freezer, same_weights
from pydantic import PrivateAttr
from torch import nn

from layerlab import Preflight, Refused, Run, Strategy, attach, fit, prefixes, strategies
from layerlab.testing import CHECKS

EPOCHS, BATCH, RATE = 4, 256, 0.1
SETTINGS: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "lr": RATE, "weight_decay": 0.0, "progress": False}


class Loop:
    """A user's own loop over the digits, with whatever she attaches; `fit` with the same seed trains the same."""

    def __init__(self, digits, build: Callable[[], nn.Module], given: Any, **told: Any) -> None:
        torch.manual_seed(0)
        self.data = digits
        self.model = build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=0.9)
        self.order = torch.Generator().manual_seed(0)
        images = next(digits.test.batches(2))[0]
        self.attached = attach(self.model, self.optimizer, given, example=images, **told)

    def epoch(self, before: Callable[[], object] = lambda: None) -> None:
        with self.attached.epoch():
            before()
            for x, y in self.data.train.batches(BATCH, self.order):
                self.optimizer.zero_grad()
                with self.attached.forward():
                    loss = nn.functional.cross_entropy(self.model(x), y)
                loss.backward()
                self.attached.after_backward()
                self.optimizer.step()

    def train(self) -> nn.Module:
        while self.attached.run.epoch < EPOCHS:
            self.epoch()
        self.attached.finish()
        return self.model


class OwnRates(Strategy):
    """Has a group of parameters for each layer and a schedule of its own, by the number of epochs and steps."""

    name: ClassVar[str] = "own-rates"

    def on_fit_start(self, run: Run) -> None:
        (group,) = run.optimizer.param_groups
        layers = [list(module.parameters(recurse=False)) for module in run.model.modules()]
        run.optimizer.param_groups[:] = [{**group, "params": layer} for layer in layers if layer]
        steps = run.epochs * (len(run.data) // run.batch_size)
        run.schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 - step / (steps + 1))
        run.schedule_each = "step"


class Halves(Strategy):
    """Halves gradients, and what a step learns changes from step to step."""

    name: ClassVar[str] = "halves"
    _layers: list[Any] = PrivateAttr(default_factory=list)

    def on_fit_start(self, run: Run) -> None:
        self._layers = [modules for _, modules in prefixes(run.model, run.example)]

    def on_train_batch_start(self, run: Run) -> None:
        drawn = int(torch.randint(len(self._layers) + 1, (), generator=run.generator_for(self.name)))
        run.freeze(self.name, self._layers[drawn - 1] if drawn else ())

    def on_after_backward(self, run: Run) -> None:
        run.log("halves/step", run.step)
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2


@pytest.mark.parametrize("given", ["lars-skip", "low-bit", Freezer(), Halves()], ids=str)
def test_the_plain_loop_ends_with_the_weights_of_fit(digits, residual, given):
    loop = Loop(digits, residual, given)
    result = fit(residual, digits, given, **SETTINGS)
    assert same_weights(loop.train(), result.model)
    assert not same_weights(result.model, fit(residual, digits, **SETTINGS).model)
    own = [name for name in result.history[-1] if name.startswith(loop.attached.strategies[0].name)]
    assert own
    assert [[row[name] for name in own] for row in result.history] == [
        [row[name] for name in own] for row in loop.attached.history]


def test_a_strategy_with_rates_of_its_own_asks_for_what_it_needs_and_steps_them(digits, residual):
    told: dict[str, Any] = {}
    for asked, value in (("epochs", EPOCHS), ("steps", len(digits.train) // BATCH), ("batch_size", BATCH)):
        with pytest.raises(Refused, match=rf"^own-rates needs to know [^;]*; call attach\(…, {asked}="):
            Loop(digits, residual, OwnRates(), **told)
        told[asked] = value
    assert same_weights(Loop(digits, residual, OwnRates(), **told).train(),
                        fit(residual, digits, OwnRates(), **SETTINGS).model)


def test_two_schedules_of_the_same_rates_are_refused(residual):
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(Refused, match=r"own-rates brings a learning-rate schedule of its own.*leave yours out"):
        attach(model, optimizer, OwnRates(), example=torch.rand(2, 1, 8, 8), epochs=2, steps=3, batch_size=4)
    optimizer.zero_grad()
    optimizer.step()  # nothing of it is left in the optimizer


@pytest.mark.parametrize("name", list(strategies))
def test_each_bundled_strategy_acts_in_the_loop_or_says_that_it_needs_fit(name, digits, residual):
    strategy = strategies(name)
    if name in ("lars-skip", "low-bit"):
        Loop(digits, residual, strategy).epoch()
        return
    network = type(strategy).example_network((1, 8, 8), 10) or residual()
    with pytest.raises(Refused, match=rf"^{name} [^.;]*, which a loop of your own cannot follow: it needs layerlab"):
        Loop(digits, lambda: network, strategy)


class Undeclared(Strategy):
    """Does, without saying so, what a loop cannot follow."""

    name: ClassVar[str] = "undeclared"
    what: str = ""

    def preflight(self, network: nn.Module, example: torch.Tensor) -> Preflight:
        return Preflight.of(network)

    def on_after_backward(self, run: Run) -> None:
        if self.what == "later":
            run.training_model = copy.deepcopy(run.model)

    def on_epoch_start(self, run: Run) -> None:
        if self.what == "model":
            run.model = copy.deepcopy(run.model)
        elif self.what == "optimizer":
            run.optimizer = copy.deepcopy(run.optimizer)
        elif self.what == "data":
            run.data = run.test_data
        elif self.what == "restructure":
            run.restructure(copy.deepcopy(run.model))
        elif self.what == "batches":
            next(iter(run.data.batches(4, None, torch.float32, torch.contiguous_format)))
        elif self.what == "frozen":
            run.freeze(self.name, [run.model])
        elif self.what == "history" and run.history:
            run.log("undeclared/loss", run.history[-1]["train/loss"])


@pytest.mark.parametrize(("what", "said"), [
    ("model", "undeclared replaces the network,"), ("optimizer", "undeclared replaces the optimizer,"),
    ("later", "undeclared replaces the network that trains,"), ("data", "undeclared replaces the training data,"),
    ("restructure", "undeclared changes the network's structure,"),
    ("batches", "undeclared reads the training data itself,"), ("frozen", "lets nothing learn in epoch 1"),
    ("history", "reads 'train/loss' of an epoch, which `fit` measures"),
])
def test_what_a_strategy_does_undeclared_is_refused_when_it_does_it(digits, residual, what, said):
    loop = Loop(digits, residual, Undeclared(what=what), steps=2, batch_size=4)
    if what == "history":
        loop.epoch()
    with pytest.raises(Refused, match=said) as caught:
        loop.epoch()
    assert "needs" in str(caught.value)
    assert "fit" in str(caught.value)


def test_a_loop_that_goes_on_ends_with_the_same_weights(digits, residual):
    whole = Loop(digits, residual, [Halves(), "lars-skip"]).train()
    for stop in (1, 3):
        first = Loop(digits, residual, [Halves(), "lars-skip"])
        for _ in range(stop):
            first.epoch()
        kept, file = first.attached.state_dict(), io.BytesIO()
        torch.save({"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict(),
                    "order": first.order.get_state(), "random": torch.get_rng_state(),
                    "attached": kept}, file)
        before = copy.deepcopy(kept["strategies"])
        first.epoch()
        assert kept["strategies"] == before  # what is trained afterwards is not in the state
        again = Loop(digits, residual, [Halves(), "lars-skip"])
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        again.model.load_state_dict(saved["model"])
        again.optimizer.load_state_dict(saved["optimizer"])
        again.order.set_state(saved["order"])
        torch.set_rng_state(saved["random"])
        again.attached.load_state_dict(saved["attached"] if stop == 1 else kept)
        assert again.attached.run.epoch == stop
        assert same_weights(again.train(), whole)


def test_a_state_is_of_whole_epochs_and_of_the_same_strategies(digits, residual):
    loop = Loop(digits, residual, "lars-skip")
    with pytest.raises(Refused, match="whole between epochs alone; save behind the block"), loop.attached.epoch():
        loop.attached.state_dict()
    with pytest.raises(Refused, match="The last epoch is not over"):
        loop.epoch()
    state = Loop(digits, residual, "lars-skip").attached.state_dict()
    loop.attached.load_state_dict(state)
    loop.epoch()
    with pytest.raises(Refused, match=r"The state belongs to .*alpha.*; attach the same"):
        Loop(digits, residual, strategies("lars-skip", alpha=3.0)).attached.load_state_dict(state)
    with pytest.raises(Refused, match="no state of attached strategies"):
        loop.attached.load_state_dict(loop.model.state_dict())


def steps(loop: Loop, forward: bool, after_backward: bool, inside: bool = True) -> None:
    x, y = next(loop.data.train.batches(BATCH, loop.order))

    def step() -> None:
        loop.optimizer.zero_grad()
        if forward:
            with loop.attached.forward():
                loss = nn.functional.cross_entropy(loop.model(x), y)
        else:
            loss = nn.functional.cross_entropy(loop.model(x), y)
        loss.backward()
        if after_backward:
            loop.attached.after_backward()
        loop.optimizer.step()

    if not inside:
        step()
        return
    with loop.attached.epoch():
        step()
        step()


def test_a_line_of_the_five_that_is_forgotten_is_named(digits, residual):
    with pytest.raises(Exception, match=r"halves did not see the gradients; call attached.after_backward\(\) between"):
        steps(Loop(digits, residual, Halves()), forward=True, after_backward=False)
    for given in ("low-bit", Halves()):
        with pytest.raises(Exception, match=r"put `with attached.forward\(\):` around the forward pass and the loss"):
            steps(Loop(digits, residual, given), forward=False, after_backward=True)
    with pytest.raises(Exception, match=r"put the steps into `with attached.epoch\(\):`"):
        steps(Loop(digits, residual, "lars-skip"), forward=True, after_backward=False, inside=False)
    # What acts between epochs alone needs neither of the two lines within a step.
    steps(Loop(digits, residual, "lars-skip"), forward=False, after_backward=False)


def test_lines_in_the_wrong_place_are_named(digits, residual):
    loop = Loop(digits, residual, Halves())
    with pytest.raises(Refused, match=r"belongs into the block of `with attached.epoch\(\):`"):
        loop.attached.after_backward()
    with loop.attached.epoch():
        with pytest.raises(Refused, match=r"belongs behind the block of `with attached.forward\(\):`"), \
                loop.attached.forward():
            loop.attached.after_backward()
        with pytest.raises(Refused, match=r"finish\(\) belongs behind the block of the last epoch"):
            loop.attached.finish()
    loop.attached.finish()
    with pytest.raises(Refused, match=r"finish\(\) has ended this training"):
        loop.epoch()


def test_train_within_the_epoch_thaws_no_frozen_batch_norm_and_wakes_none_of_the_users(digits, residual):
    loop = Loop(digits, residual, Freezer())
    loop.epoch()
    mean = loop.model.bn1.running_mean.clone()
    loop.epoch(before=lambda: loop.model.train())  # freezes conv1 and bn1
    assert torch.equal(loop.model.bn1.running_mean, mean)

    own = Loop(digits, residual, Freezer())
    own.model.bn2.eval()
    for _ in range(EPOCHS):
        own.epoch()
        assert not own.model.bn2.training
        assert own.model.bn1.training == (own.attached.run.epoch in (1,))
    own.attached.finish()
    assert own.model.bn1.training
    assert not own.model.bn2.training
    assert all(parameter.requires_grad for parameter in own.model.parameters())


def test_several_backward_passes_are_one_step(digits, residual):
    loop = Loop(digits, residual, Halves())
    with loop.attached.epoch():
        for x, y in digits.train.batches(BATCH, loop.order):
            loop.optimizer.zero_grad()
            for part in (slice(0, BATCH // 2), slice(BATCH // 2, None)):
                with loop.attached.forward():
                    loss = nn.functional.cross_entropy(loop.model(x[part]), y[part])
                (loss / 2).backward()
            loop.attached.after_backward()
            loop.optimizer.step()
    result = fit(residual, digits, Halves(), **{**SETTINGS, "epochs": 1, "accumulate": 2})
    assert same_weights(loop.model, result.model)
    assert loop.attached.run.step == len(digits.train) // BATCH


@pytest.mark.filterwarnings("ignore::layerlab.LayerlabWarning")
def test_a_precision_of_the_loop_s_own_is_told_and_one_that_is_not_is_found(digits, residual):
    def bfloat16() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    assert same_weights(Loop(digits, residual, "lars-skip", autocast=bfloat16).train(),
                        fit(residual, digits, "lars-skip", precision="bfloat16", **SETTINGS).model)
    with pytest.raises(Refused, match=r"both decide what forward computes in; leave precision at float32"):
        Loop(digits, residual, "low-bit", autocast=bfloat16)
    loop = Loop(digits, residual, "low-bit")
    with pytest.raises(Refused, match=r"both decide what forward computes in; leave autocast out"), bfloat16(), \
            loop.attached.forward():
        pass


def test_a_second_attach_to_an_optimizer_is_refused_until_the_first_is_detached(digits, residual):
    loop = Loop(digits, residual, strategies("lars-skip", alpha=0.0))
    loop.epoch()
    images = torch.rand(2, 1, 8, 8)
    with pytest.raises(Refused, match=r"attached to this optimizer already; give all of them in one call"):
        attach(loop.model, loop.optimizer, Halves(), example=images)
    with pytest.raises(ZeroDivisionError):
        loop.epoch(before=lambda: 1 / 0)
    assert not loop.model.conv1.weight.requires_grad
    loop.attached.detach()
    assert loop.model.conv1.weight.requires_grad
    attach(loop.model, loop.optimizer, Halves(), example=images).finish()
    loop.optimizer.step()  # without a word from either


@pytest.mark.parametrize(("changed", "said"), [
    ({"model": "resnet18"}, "model must be an nn.Module, got str"),
    ({"optimizer": None}, "optimizer must be a torch.optim.Optimizer, got NoneType"),
    ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)}, "holds none of the network's parameters"),
    ({"example": [1, 2]}, "example must be one batch's input, a tensor"),
    ({"example": torch.rand(2, 3, 8, 8)}, r"does not take the example of shape \(2, 3, 8, 8\)"),
    ({"strategies": "lars-skp"}, r"Unknown strategy 'lars-skp'. Did you mean 'lars-skip'\?"),
    ({"strategies": [Freezer(), Freezer()]}, "given twice"),
])
def test_what_cannot_be_attached_gets_one_sentence(residual, changed, said):
    model = residual()
    arguments = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "strategies": "lars-skip",
                 "example": torch.rand(2, 1, 8, 8), **changed}
    with pytest.raises(Exception, match=said):
        attach(**arguments)


def test_a_network_whose_output_is_no_tensor_of_logits_is_attached_without_a_pre_flight():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"map": self.second(self.first(x))}

    model = Two()
    attached = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), strategies("lars-skip", alpha=0.0),
                      example=torch.rand(2, 1, 8, 8))
    assert attached.preflights == {}
    for wanted in (True, False):
        with attached.epoch():
            assert model.first.weight.requires_grad is wanted
            with attached.forward():
                loss = model(torch.rand(2, 1, 8, 8))["map"].square().mean()
            loss.backward()
            attached.after_backward()
            attached.run.optimizer.step()


def test_the_loop_of_its_page_runs_with_five_lines_of_layerlab_s(digits, residual):
    page = (Path(__file__).parents[1] / "docs" / "own-loop.md").read_text()
    (block,) = re.findall(r"^```python\n(import layerlab\n.*?)^```", page, re.M | re.S)
    assert block.count("attached") == 5
    model = residual()
    names: dict[str, Any] = {
        "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "epochs": 3,
        "criterion": nn.CrossEntropyLoss(), "loader": list(digits.train.batches(BATCH)),
        "images": next(digits.test.batches(2))[0]}
    exec(compile(block, "own-loop.md", "exec"), names)
    assert len(names["attached"].history) == 3


def test_the_kit_has_the_check():
    assert "attaches" in CHECKS
