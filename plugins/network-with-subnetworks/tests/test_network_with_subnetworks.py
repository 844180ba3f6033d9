"""NSN: one set of weights against literal copies, the pair rule, momentum formats, detaching, resuming."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from layerlab import (
    LayerlabError,
    Refused,
    Run,
    build_model,
    compare,
    evaluate,
    fit,
    load_dataset,
    strategies,
)
from layerlab.training.loop import Fit
from layerlab_network_with_subnetworks import (
    NetworkWithSubnetworks,
    analysis,
    convolutional_chain,
    detach,
    perceptron,
)

OPTIONS: dict[str, Any] = dict(batch_size=64, lr=0.3, weight_decay=0.0, progress=False)


@pytest.fixture(scope="module")
def data():
    return analysis.unit_range(load_dataset("digits", limit=512, test_limit=128, device="cpu"))


def network(depth: int = 2, **options: Any) -> nn.Sequential:
    return perceptron(10, 8, depth=depth, **options)


# ------------------------------------------------------------------------------- one set of weights suffices


class Literal:
    """Equations (1) to (5) word by word: n + 1 networks of their own, parameters copied upwards before each mini-batch,
    gradients averaged in pairs, one momentum buffer for each source tensor."""

    def __init__(self, base: nn.Sequential, depth: int, rates: list[float], lr: float, alpha: float, l2: float,
                 paper_format: bool) -> None:
        self.lr, self.alpha, self.l2, self.paper_format = lr, alpha, l2, paper_format
        linears = [copy.deepcopy(m) for m in base.modules() if isinstance(m, nn.Linear)]
        # [model m][layer o][weight, bias], layers counted from the input: model m has m + 1.
        self.weights = [[[part.detach().clone().requires_grad_() for part in (layer.weight, layer.bias)]
                         for layer in linears[depth - m:]] for m in range(depth + 1)]
        self.rates = rates
        self.velocity: dict[tuple[int, int, int], torch.Tensor] = {}

    def copy_upwards(self) -> None:
        # (1): W(o + 1, m + 1) ← W(o, m), smallest model first.
        with torch.no_grad():
            for m in range(len(self.weights) - 1):
                for o in range(m + 1):
                    for part in range(2):
                        self.weights[m + 1][o + 1][part].copy_(self.weights[m][o][part])

    def forward(self, m: int, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for o in range(m):
            x = torch.relu(nn.functional.linear(x, *self.weights[m][o]))
            x = nn.functional.dropout(x, self.rates[min(o, len(self.rates) - 1)])
        return nn.functional.linear(x, *self.weights[m][m])

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        top = len(self.weights) - 1
        self.copy_upwards()
        gradients = []
        for m in range(top + 1):
            flat = [p for layer in self.weights[m] for p in layer]
            loss = nn.functional.cross_entropy(self.forward(m, x), y)
            if m == top:
                loss = loss + self.l2 * sum((layer[0] ** 2).sum() for layer in self.weights[m])
            found = torch.autograd.grad(loss, flat)
            gradients.append([found[2 * o : 2 * o + 2] for o in range(m + 1)])
        with torch.no_grad():
            for m in range(top + 1):
                # What model m is the smallest to have: its own first layer; the last layer too for model 0.
                for part in range(2):
                    gradient = gradients[m][0][part]
                    if m < top:
                        gradient = (gradient + gradients[m + 1][1][part]) / 2
                    before = self.velocity.get((m, 0, part), torch.zeros_like(gradient))
                    new = (1 - self.alpha) * gradient if self.paper_format else gradient
                    self.velocity[m, 0, part] = self.alpha * before + new
                    self.weights[m][0][part].sub_(self.lr * self.velocity[m, 0, part])


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("momentum_format", ["paper", "tensorflow"])
def test_one_set_of_weights_equals_literal_copies_with_averaged_gradients(depth, momentum_format):
    torch.manual_seed(0)
    base = network(depth)
    lr = 0.3 if momentum_format == "paper" else 0.03
    literal = Literal(copy.deepcopy(base).double(), depth, [0.2, 0.5], lr, 0.9, 0.01, momentum_format == "paper")
    strategy = NetworkWithSubnetworks(l2=0.01, momentum_format=momentum_format)
    data = load_dataset("digits", limit=64, test_limit=16, device="cpu")
    run = Fit(base, data, strategy, batch_size=64, lr=lr, weight_decay=0).run
    # In double precision, so that a wrong rule cannot hide behind rounding.
    run.model.double()
    for state in run.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    run.model.train()
    strategy.on_epoch_start(run)
    generator = torch.Generator().manual_seed(1)
    for index in range(12):
        x = torch.rand(16, 1, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(10, (16,), generator=generator)
        for step in (lambda x, y: strategy.training_step(run, x, y), literal.step):
            # The same dropout masks for both: each model draws its own, smallest first.
            torch.manual_seed(100 + index)
            step(x, y)
    literal.copy_upwards()
    mine, start = ([m for m in model.modules() if isinstance(m, nn.Linear)] for model in (run.model, base.double()))
    for layer, theirs, before in zip(mine, literal.weights[depth], start, strict=True):
        torch.testing.assert_close(layer.weight, theirs[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.bias, theirs[1], rtol=1e-10, atol=1e-12)
        assert (layer.weight - before.weight).abs().max() > 1e-3


def _scripted(depth: int, **settings: Any) -> tuple[dict[str, float], Run]:
    """Gradients that equation (2) leaves when model m's loss is 10^m times the sum of its logits, on ones throughout.

    With weights of one and inputs of one, what a layer gets from model m is 10^m times a number worked out by hand.
    """
    model = nn.Sequential(OrderedDict(
        [("flatten", nn.Flatten())] + [(f"fc{i}", nn.Linear(4, 4)) for i in range(1, depth + 1)]
        + [("output", nn.Linear(4, 10))]))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.25 if parameter.ndim > 1 else 0.0)
    data = load_dataset("digits", image_size=2, limit=64, test_limit=16, device="cpu")
    # The loss is tried once before the training.
    calls = iter([0, *range(depth + 1)])
    job = Fit(model, data, NetworkWithSubnetworks(l2=0.0, **settings), batch_size=64, weight_decay=0,
              loss=lambda logits, y: 10.0 ** next(calls) * logits.sum() / len(y))
    job.strategies[0].share_gradients(job.run, torch.ones(8, 1, 2, 2), torch.zeros(8, dtype=torch.long))
    return {name: p.grad[0, 0].item() for name, p in job.run.model.named_parameters() if p.ndim > 1}, job.run


def test_each_gradient_is_the_mean_that_the_rule_says():
    # All activations are one (4 × 0.25), so model m gives dW(output) = 10^m and, through 10 logits of weight 0.25,
    # dW(hidden) = 2.5 × 10^m for every hidden layer that it has.
    assert _scripted(2)[0] == pytest.approx({
        "output.weight": (1 + 10) / 2,  # models 0 and 1; the base's is left out
        "fc2.weight": 2.5 * (10 + 100) / 2,  # models 1 and 2
        "fc1.weight": 2.5 * 100,  # the base's own
    })
    assert _scripted(3)[0] == pytest.approx({
        "output.weight": 5.5, "fc3.weight": 2.5 * 55, "fc2.weight": 2.5 * 550, "fc1.weight": 2.5 * 1000})
    assert _scripted(3, sharing="all")[0] == pytest.approx({
        "output.weight": 1111 / 4, "fc3.weight": 2.5 * 1110 / 3, "fc2.weight": 2.5 * 550, "fc1.weight": 2.5 * 1000})


def test_several_layers_at_a_time_make_fewer_models():
    gradients, run = _scripted(3, detach_at_once=2)
    # Models with 0, 1 and 3 hidden layers, called 0, 1 and 2 here.
    assert gradients == pytest.approx({
        "output.weight": 5.5, "fc3.weight": 2.5 * 55, "fc2.weight": 250, "fc1.weight": 250})
    strategy = NetworkWithSubnetworks(detach_at_once=2)
    strategy.on_fit_start(run)
    assert strategy.models == {"model0": ("fc1", "fc2", "fc3"), "model1": ("fc1", "fc2"), "model3": ()}


def test_the_penalty_reaches_what_the_base_s_gradient_reaches():
    def penalty(**settings: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        found = []
        for l2 in (0.0, 0.5):
            strategy = NetworkWithSubnetworks(l2=l2, **settings)
            job = Fit(base, data, strategy, batch_size=64, weight_decay=0)
            job.strategies[0].share_gradients(job.run, x, y)
            found.append({name: p.grad for name, p in job.run.model.named_parameters()})
        return {name: found[1][name] - found[0][name] for name in found[0]}

    base = network(2, dropout=())
    data = load_dataset("digits", limit=64, test_limit=16, device="cpu")
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    weights = dict(base.named_parameters())
    # d(λΣw²)/dw = 2λw = w for λ = 0.5; half of it where the base is one of a pair, none for the output layer.
    shares = {"fc1.weight": 1.0, "fc2.weight": 0.5}
    for name, difference in penalty().items():
        torch.testing.assert_close(difference, shares.get(name, 0.0) * weights[name], rtol=1e-4, atol=1e-6)
    everywhere = penalty(l2_on="all", l2_biases=True)
    for name, difference in everywhere.items():
        torch.testing.assert_close(difference, weights[name], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------- momentum


@pytest.mark.parametrize(
    ("momentum_format", "wanted"),
    # Worked out by hand for α = 0.9: V of G = 1, 2, −1, 0.
    [("tensorflow", [1.0, 2.9, 1.61, 1.449]), ("paper", [0.1, 0.29, 0.161, 0.1449])],
)
def test_momentum_on_a_scripted_gradient_sequence(momentum_format, wanted, data):
    strategy = NetworkWithSubnetworks(momentum_format=momentum_format, l2=0)
    run = Fit(network(1), data, strategy, batch_size=64, lr=0.5, weight_decay=0).run
    weight = run.model.fc1.weight
    seen = []
    for gradient in (1.0, 2.0, -1.0, 0.0):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, gradient)
        run.optimizer.step()
        seen.append(((before - weight.detach()) / 0.5).mean().item())
    assert seen == pytest.approx(wanted, abs=1e-5)


def test_the_two_formats_are_one_with_another_learning_rate(data):
    options = {**OPTIONS, "epochs": 2}
    paper = fit(network, data, NetworkWithSubnetworks(), **options)
    tensorflow = fit(network, data, NetworkWithSubnetworks(momentum_format="tensorflow"), **{**options, "lr": 0.03})
    for (name, a), b in zip(paper.model.state_dict().items(), tensorflow.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_other_optimizers_keep_their_own_momentum(data):
    result = fit(network(1), data, NetworkWithSubnetworks(), epochs=2, batch_size=64, optimizer="adamw", lr=1e-3,
                 progress=False)
    assert result.final["test/top1"] > 0.2
    with pytest.raises(LayerlabError, match="momentum_format 'paper' is not defined for nesterov=True"):
        fit(network(1), data, NetworkWithSubnetworks(), epochs=1, nesterov=True, **OPTIONS)


def test_without_detachable_layers_it_is_regular_training_bit_for_bit(data):
    regular = NetworkWithSubnetworks(layers=(), momentum_format="tensorflow", l2=0.0)
    options = {**OPTIONS, "lr": 0.05}
    mine = fit(network, data, regular, epochs=3, **options)
    plain = fit(network, data, epochs=3, **options)
    nsn = fit(network, data, NetworkWithSubnetworks(l2=0.0), epochs=3, **options)
    assert _same(mine.model, plain.model)
    assert not _same(nsn.model, plain.model)


def _same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------- detaching


@pytest.mark.parametrize(("layers", "count"), [(0, 1_238_730), (1, 623_290), (2, 7_850)])
def test_parameter_counts_of_the_tables(layers, count):
    assert sum(p.numel() for p in detach(perceptron(), layers).parameters()) == count


def test_a_detached_network_predicts_exactly_what_the_sub_network_did(data):
    result = fit(network, data, NetworkWithSubnetworks(), epochs=2, **OPTIONS)
    (strategy,) = result.strategies
    x = torch.rand(32, 1, 8, 8)
    for count, name in ((2, "model0"), (1, "model1"), (0, "model2")):
        alone = detach(result.model, count)
        assert type(alone) is nn.Sequential
        inside = strategy._models[strategy._names.index(name)].eval()
        assert torch.equal(alone(x), inside(x))
        logged = "test/top1" if name == "model2" else f"network-with-subnetworks/{name}/top1"
        assert evaluate(alone, data.test)["test/top1"] == result.final[logged]
        # It is a copy: training it on changes nothing here.
        nn.init.zeros_(alone.output.weight)
        assert result.model.output.weight.abs().sum() > 0
    assert _same(strategy.networks(result.model)["model1"], detach(result.model, "fc1"))


def test_the_base_without_its_first_layer_is_the_sub_network_bit_for_bit(data):
    result = fit(network, data, NetworkWithSubnetworks(), epochs=2, **OPTIONS)
    base, strategy = result.model, result.strategies[0]
    x = torch.rand(16, 64)
    by_hand = base.output(torch.relu(nn.functional.linear(x, base.fc2.weight, base.fc2.bias)))
    model0, model1 = strategy._models[0].eval(), strategy._models[1].eval()
    assert torch.equal(model1(x), by_hand)
    assert torch.equal(model0(x), base.output(x))
    assert model1.fc2 is base.fc2
    assert model0.output is model1.output is base.output
    assert not torch.equal(base(x), by_hand)


def test_dropout_follows_the_position_or_the_layer():
    def rates(**settings: Any) -> dict[str, list[float]]:
        strategy = NetworkWithSubnetworks(**settings)
        data = load_dataset("digits", limit=64, test_limit=16, device="cpu")
        Fit(network(3), data, strategy, batch_size=64)
        return {name: [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
                for name, model in zip(strategy.models, strategy._models, strict=True)}

    assert rates() == {"model0": [], "model1": [0.2], "model2": [0.2, 0.5], "model3": [0.2, 0.5, 0.5]}
    assert rates(dropout_by="layer") == {"model0": [], "model1": [0.5], "model2": [0.5, 0.5], "model3": [0.2, 0.5, 0.5]}


def test_sub_networks_drop_in_every_epoch(data):
    class Watch(NetworkWithSubnetworks):
        def training_step(self, run: Run, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            seen.append(all(m.training for model in self._models for m in model.modules() if isinstance(m, nn.Dropout)))
            return super().training_step(run, x, y)

    seen: list[bool] = []
    fit(network, data, Watch(), epochs=3, **OPTIONS)
    assert len(seen) == 24
    assert all(seen)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (nn.Sequential(OrderedDict(flat=nn.Flatten(), first=nn.Linear(64, 32), second=nn.Linear(32, 10))), {},
         r"cannot detach 'first': it takes shape \(64,\), and the next layer left, 'second', is given \(32,\)"),
        (nn.Sequential(OrderedDict(flat=nn.Flatten(), first=nn.Linear(64, 32), second=nn.Linear(32, 32),
                                   third=nn.Linear(32, 10))), {"layers": ("first", "second")},
         r"'first': it takes shape \(64,\), .* 'second', is given \(32,\); layers=\['second'\] can be detached"),
        (convolutional_chain(channels=1, width=8, depth=2), {"layers": ("stem", "block1")},
         r"'stem': it takes shape \(1, 8, 8\), .* 'block1', is given \(8, 4, 4\); layers=\['block1', 'block2'\] can"),
        (network(), {"layers": ("fc3",)}, "no layer 'fc3'; it has fc1, fc2, output"),
        (network(), {"layers": ("output",)}, "cannot detach 'output': it is the network's last layer"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), {}, "needs a chain of two layers or more"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, 1, 1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)), {},
         "running statistics .*; use nn.GroupNorm"),
    ],
)
def test_what_cannot_be_detached_is_refused_by_name(model, settings, message, data):
    with pytest.raises(Refused, match=message):
        fit(model, data, NetworkWithSubnetworks(**settings), epochs=1, **OPTIONS)


def with_a_stem() -> nn.Sequential:
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), stem=nn.Linear(64, 24), wide=nn.Linear(24, 24), act=nn.Tanh(),
                                     narrow=nn.Linear(24, 16), last=nn.Linear(16, 16), output=nn.Linear(16, 10)))


@pytest.mark.parametrize(("build", "kept", "gone"), [
    (with_a_stem, ("stem", "narrow", "output"), ("wide", "last")),
    (lambda: convolutional_chain(10, 1, width=8, depth=2), ("stem", "output"), ("block1", "block2")),
])
def test_by_default_the_layers_go_that_keep_the_shape_and_the_others_are_named(build, kept, gone, data):
    result = fit(build, data, NetworkWithSubnetworks(l2=0), epochs=1, **OPTIONS)
    (strategy,) = result.strategies
    found = result.preflights["network-with-subnetworks"]
    assert {name.partition(".")[0] for name in found.covered} == set(gone)
    assert {name.partition(".")[0] for name in found.left_out} == set(kept)
    (saved,) = found.saves.values()
    smallest = strategy.networks(result.model)["model0"]
    assert saved == pytest.approx(1 - analysis.count(smallest) / analysis.count(result.model))
    assert strategy.models["model0"] == gone
    alone, inside = analysis.detached_accuracy(result, data), analysis.accuracies(result).iloc[-1]
    assert alone == {name: inside[name] for name in alone}


# ------------------------------------------------------------------------------- modules that are used several times


def chain_of(activation: nn.Module | None, drop: nn.Module | None) -> nn.Sequential:
    """Three hidden layers, with one activation and one dropout for all of them or one each."""
    torch.manual_seed(3)
    children: list[nn.Module] = [nn.Flatten()]
    for _ in range(3):
        children += [nn.Linear(64, 64), activation or nn.ReLU(), drop or nn.Dropout(0.3)]
    return nn.Sequential(*children, nn.Linear(64, 10))


def tied_chain() -> nn.Sequential:
    """One linear layer at two depths."""
    torch.manual_seed(3)
    layer = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), layer, nn.Sigmoid(), layer, nn.Sigmoid(), nn.Linear(64, 10))


def tied_convolutions() -> nn.Sequential:
    """Three blocks that are one block, and a norm between them that is one norm."""
    torch.manual_seed(3)
    block, norm = nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), block, norm, block, norm, block, nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(6, 10))


def test_an_activation_used_several_times_learns_as_one_for_each_layer_does(data):
    shared, own = chain_of(nn.ReLU(), nn.Dropout(0.3)), chain_of(None, None)
    results = [fit(model, data, NetworkWithSubnetworks(l2=0), epochs=2, **OPTIONS) for model in (shared, own)]
    assert _same(results[0].model, results[1].model)
    assert [row["network-with-subnetworks/model1/top1"] for row in results[0].history] == [
        row["network-with-subnetworks/model1/top1"] for row in results[1].history]
    for count in range(4):
        apart = [detach(result.model, count) for result in results]
        assert list(map(type, apart[0])) == list(map(type, apart[1]))
        x = torch.rand(8, 1, 8, 8)
        assert torch.equal(apart[0](x), apart[1](x))


@pytest.mark.parametrize(("build", "count"), [(tied_chain, 1), (tied_convolutions, 2)])
def test_what_is_used_at_several_depths_goes_at_one_of_them_and_stays_tied(build, count):
    model, x = build().eval(), torch.rand(4, 1, 8, 8)
    assert torch.equal(detach(model, 0)(x), model(x))
    if build is tied_chain:
        smaller, left = detach(model, count), nn.Sequential(model[0], *list(model)[3:])
    else:
        smaller, left = detach(model, ["1", "3"]), nn.Sequential(model[0], *list(model)[5:])
    assert torch.equal(smaller(x), left(x))
    assert [type(child) for child in smaller] == [type(child) for child in left]
    whole = detach(model, 0)
    assert whole[1] is whole[3]


@pytest.mark.parametrize("build", [tied_chain, tied_convolutions])
def test_a_tied_layer_gets_the_mean_of_the_smallest_two_models_that_have_it(build, data):
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    names = ("1", "3") if build is tied_chain else ("1", "3", "5")
    job = Fit(build(), data, NetworkWithSubnetworks(l2=0, layers=names), batch_size=64, weight_decay=0)
    job.strategies[0].share_gradients(job.run, x, y)
    model = build()
    children = list(model)
    # Without all but one of its uses, and without all but two of them.
    one, two = ([model[0], *children[3:]], children) if build is tied_chain else (
        [model[0], *children[5:]], [model[0], *children[3:]])
    gradients = []
    for chain in (one, two):
        model.zero_grad()
        nn.functional.cross_entropy(nn.Sequential(*chain)(x), y).backward()
        gradients.append(model[1].weight.grad.clone())
    torch.testing.assert_close(job.run.model[1].weight.grad, sum(gradients) / 2)


def test_a_network_that_is_no_chain_is_refused(data):
    with pytest.raises(LayerlabError, match=r"needs a chain of layers, an nn\.Sequential, and ResNet is none"):
        fit(build_model("resnet18", num_classes=10), load_dataset("digits", channels=3, limit=64, device="cpu"),
            NetworkWithSubnetworks(), epochs=1, **OPTIONS)
    with pytest.raises(LayerlabError, match=r"nn\.Sequential, and ResNet is none"):
        detach(build_model("resnet18"), 1)


def test_detaching_names_the_layers_that_do_not_fit():
    with pytest.raises(LayerlabError, match=r"detach 'fc1': it takes shape \(784,\), .*'fc2', is given \(100,\)"):
        detach(build_model("mlp", width=100), 1)
    with pytest.raises(LayerlabError, match="can detach 0 to 2 of these 3 layers, got 3"):
        detach(perceptron(), 3)
    chain = convolutional_chain(width=8, depth=3)
    with pytest.raises(LayerlabError, match=r"'stem': it takes shape \(3, height, width\), .*'block1', is given \(8, "):
        detach(chain, 1)
    smaller = detach(chain, ["block1", "block3"], example=torch.rand(2, 3, 32, 32))
    assert [name for name, _ in smaller.named_children()] == ["stem", "block2", "pool", "flatten", "output"]
    # Two layers that only fit together.
    narrow = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 3))
    assert len(detach(narrow, 2)) == 1


@pytest.mark.parametrize("settings", [{"l2": -1}, {"detach_at_once": 0}, {"momentum_format": "other"}, {"sharing": 3}])
def test_bad_settings_get_one_sentence(settings):
    with pytest.raises(LayerlabError, match=f"network-with-subnetworks: setting '{next(iter(settings))}' .*, got "):
        NetworkWithSubnetworks(**settings)


# ------------------------------------------------------------------------------- training


def test_resume_in_the_middle_ends_with_the_same_weights(data, tmp_path):
    options = dict(epochs=4, batch_size=64, lr=0.3, weight_decay=0.0, schedule="step", milestones=(1, 3), gamma=1 / 3)
    whole = fit(network, data, NetworkWithSubnetworks(), progress=False, **options)
    first = Fit(network, data, NetworkWithSubnetworks(), checkpoint=tmp_path, **options)
    first.train_epoch()
    first.train_epoch()
    again = fit(network, data, NetworkWithSubnetworks(), checkpoint=tmp_path, progress=False, **options)
    assert _same(whole.model, again.model)
    assert [row["network-with-subnetworks/model0/top1"] for row in whole.history] == [
        row["network-with-subnetworks/model0/top1"] for row in again.history]
    assert len({row["train/loss"] for row in whole.history}) == 4


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_convolutional_chain_learns_and_comes_apart(at_once):
    data = load_dataset("digits", image_size=16, limit=512, test_limit=128, device="cpu")
    blocks = ("block1", "block2", "block3", "block4")
    strategy = NetworkWithSubnetworks(layers=blocks, detach_at_once=at_once, l2=0)
    result = fit(lambda: convolutional_chain(10, 1, width=16), data, strategy, epochs=8, batch_size=32,
                 optimizer="adamw", lr=4e-3, weight_decay=0.0, progress=False)
    models = result.strategies[0].networks(result.model)
    assert list(models) == [f"model{count}" for count in range(0, 5, at_once)]
    assert result.final["test/top1"] > 0.3
    alone, inside = analysis.detached_accuracy(result, data), analysis.accuracies(result).iloc[-1]
    assert alone == {name: inside[name] for name in models}
    assert len(set(alone.values())) > 1


def test_other_strategies_gradient_hooks_see_the_shared_gradients(data):
    from layerlab import Strategy

    class Zero(Strategy):
        name = "zero"

        def on_after_backward(self, run: Run) -> None:
            for parameter in run.model.parameters():
                parameter.grad.zero_()

    result = fit(network, data, [NetworkWithSubnetworks(), Zero()], epochs=1, **OPTIONS)
    torch.manual_seed(0)
    assert _same(result.model, network())


def test_frozen_layers_stand_still(data):
    model = network()
    model.fc2.requires_grad_(False)
    result = fit(model, data, NetworkWithSubnetworks(), epochs=1, **OPTIONS)
    assert torch.equal(result.model.fc2.weight, model.fc2.weight)
    assert not torch.equal(result.model.fc1.weight, model.fc1.weight)
    assert not torch.equal(result.model.output.weight, model.output.weight)


def test_the_paper_s_epoch_is_the_base_s_best_and_the_last_selects_nothing(data):
    result = fit(network, data, NetworkWithSubnetworks(), epochs=3, **OPTIONS)
    for row, (base, model1, model0) in zip(result.history, [(0.5, 0.9, 0.1), (0.7, 0.2, 0.3), (0.6, 0.4, 0.8)],
                                           strict=True):
        row["test/top1"] = base
        row["network-with-subnetworks/model1/top1"] = model1
        row["network-with-subnetworks/model0/top1"] = model0
    assert [analysis.accuracy(result, f"model{m}", "best") for m in (2, 1, 0)] == [0.7, 0.2, 0.3]
    assert [analysis.accuracy(result, f"model{m}", "last") for m in (2, 1, 0)] == [0.6, 0.4, 0.8]


def test_tables_and_ratios_of_a_small_run(data):
    arms = analysis.arms({"ref-model0": 0.0, "ref-model1": 0.0, "model0-1": 0.0})
    assert [arms[name].momentum_format for name in arms] == ["tensorflow", "tensorflow", "paper"]
    run = compare(analysis.networks(list(arms), data), data, arms, epochs=2, **OPTIONS)
    published = pd.DataFrame({"test accuracy": [0.9], "parameters": ["650"]}, index=["model0"])
    table = analysis.table(published, run, ["model0-1"])
    assert table["parameters"].to_dict() == {"model1": "4,810", "model0": "650"}
    assert table["paper"].to_dict() == {"model1": "", "model0": 0.9}
    assert table["last epoch"]["model1"] == f"{run.results['model0-1', 0].final['test/top1']:.4f}"
    for (_, _), result in run.results.items():
        for row in result.history:
            row["time/epoch_seconds"] = {"ref-model0": 1.0, "ref-model1": 3.0, "model0-1": 3.0}[result.name]
    references = ["ref-model0", "ref-model1"]
    assert analysis.cost_ratio(run, "model0-1", references).values == (0.75,)
    speed = analysis.speed_table({"digits": run}, "model0-1", references)
    # Worked out for a hidden layer of w² and an output of o weights: (2w² + 3o + 2o) for both, with nothing left out.
    assert speed["ratio of FLOPs"]["digits"] == pytest.approx((2 * 64**2 + 5 * 640) / (2 * 64**2 + 5 * 640))
    choice = analysis.cost_and_accuracy(run, torch.rand(2, 1, 8, 8), rounds=2)
    assert choice.groupby("family")["parameters"].apply(list).to_dict() == {
        "trained separately": [650, 4810], "model0-1, trained at once": [650, 4810]}


def test_each_reference_takes_the_rate_that_is_best_on_held_out_images_and_gains_are_against_either(data):
    l2 = {"ref-model0": 0.0, "ref-model1": 0.0, "model0-1": 0.0}
    arms = analysis.arms(l2)
    references = ["ref-model0", "ref-model1"]
    built, regular = analysis.networks(references, data), {name: arms[name] for name in references}
    tried = {rate: compare(built, data.held_out(), regular, seeds=[5, 6], epochs=1, **{**OPTIONS, "lr": rate})
             for rate in (0.1, 0.01)}
    reached = {("ref-model0", 0.01): (0.5, 0.7), ("ref-model0", 0.1): (0.8, 0.3),
               ("ref-model1", 0.01): (0.4, 0.4), ("ref-model1", 0.1): (0.3, 0.6)}
    for rate, run in tried.items():
        for (arm, seed), result in run.results.items():
            result.history[-1]["test/top1"] = reached[arm, rate][seed - 5]
    table = analysis.rate_table(tried)
    assert table["chosen"].to_dict() == {"ref-model0": 0.01, "ref-model1": 0.1}
    assert table[0.1].to_dict() == pytest.approx({"ref-model0": 0.55, "ref-model1": 0.45})
    own = {tuned: arms[arm] for arm, tuned in analysis.tuned(references).items()}
    assert list(own) == ["ref-tuned-model0", "ref-tuned-model1"]
    run = analysis.merged(
        compare(analysis.networks(list(arms), data), data, arms, epochs=1, **OPTIONS),
        compare(analysis.networks(list(own), data), data, own, epochs=1, **{**OPTIONS, "lr": 0.03}))
    tops = {"ref-model0": 0.5, "ref-model1": 0.6, "ref-tuned-model0": 0.7, "ref-tuned-model1": 0.9, "model0-1": 0.8}
    for (arm, _), result in run.results.items():
        result.history[-1]["test/top1"] = tops[arm]
    assert analysis.gains(run)["model0-1-gain"].values == pytest.approx((20.0,))
    assert analysis.gains(run, family=analysis.TUNED)["model0-1-gain"].values == pytest.approx((-10.0,))
    assert analysis.reference_numbers(run) == pytest.approx({
        "ref-model0_top1": 50, "ref-model1_top1": 60, "ref-tuned-model0_top1": 70, "ref-tuned-model1_top1": 90})


def test_each_model_is_held_against_its_reference_trained_for_its_share_of_the_same_budget(data):
    arms = analysis.arms({"ref-model0": 0.0, "ref-model1": 0.0, "model0-1": 0.0})
    references = ["ref-model0", "ref-model1"]
    options = {**OPTIONS, **analysis.schedule(3)}
    run = compare(analysis.networks(list(arms), data), data, arms, **options)
    steps = len(data.train) // OPTIONS["batch_size"]
    for (_, _), result in run.results.items():
        for row in result.history:
            row["time/epoch_seconds"] = {"ref-model0": 1.0, "ref-model1": 3.0, "model0-1": 2.0}[result.name]
    # Half the seconds of both references: half their steps, and the whole schedule in them.
    budget = analysis.equal_budget(run, "model0-1", references, steps, "seconds")
    assert budget["max_steps"] == 3 * steps // 2
    assert budget["milestones"] == (round(steps / 2), round(steps))
    assert analysis.rates_of(references, None, 0.3) == {0.3: references}
    rates = pd.DataFrame({"chosen": [0.1, 0.01]}, index=references)
    assert analysis.rates_of(references, rates, 0.3) == {0.01: ["ref-model1"], 0.1: ["ref-model0"]}
    equal = compare(analysis.networks(references, data), data, {name: arms[name] for name in references},
                    **{**options, **budget})
    judged = analysis.against_equal_budget(run, equal, "model0-1", analysis.REGULAR)
    top = analysis.accuracies(run.results["model0-1", 0]).iloc[-1]
    for model in ("model1", "model0"):
        pays = judged.pays(f"{model} of model0-1")
        wanted = 100 * (top[model] - equal.results[f"ref-{model}", 0].final["test/top1"])
        assert pays.points.values == pytest.approx((wanted,))
        assert pays.length == pytest.approx(0.5, abs=1 / (3 * steps))


def test_the_schedule_is_the_paper_s_scaled():
    assert analysis.schedule(600)["milestones"] == (200, 400)
    assert analysis.schedule(12) == {"epochs": 12, "schedule": "step", "milestones": (4, 8), "gamma": 1 / 3}


def test_pixels_are_in_the_unit_range(data):
    x, _ = next(data.test.batches(64))
    assert (x.min(), x.max()) == (0.0, 1.0)
    assert data.fingerprint.endswith("-unit")


def test_it_is_found_by_name():
    assert isinstance(strategies("network-with-subnetworks"), NetworkWithSubnetworks)
