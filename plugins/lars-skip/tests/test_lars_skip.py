"""LARS skip: the variable, Algorithm 1, and that skipping is real."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from helpers import slow
from torch import nn

from layerlab import (
    Comparison,
    FitResult,
    LayerlabError,
    Preflight,
    Refused,
    Run,
    Strategy,
    build_model,
    compare,
    fit,
    load_dataset,
    measure,
)
from layerlab.training.loop import Fit
from layerlab.training.settings import Settings
from layerlab_lars_skip import LarsSkip, analysis
from layerlab_lars_skip.method.planned import alternation, linear
from layerlab_lars_skip.strategy import lars_variable

OPTIONS: dict[str, Any] = dict(batch_size=64, lr=0.01, progress=False)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", image_size=16, limit=256, test_limit=64, device="cpu")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )


def test_the_variable_on_a_worked_example():
    # ‖(3, 4)‖ = 5, ‖(3, 4) − (3, 2)‖ = 2.
    assert lars_variable(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 2.0])) == 2.5
    assert lars_variable(torch.ones(2, 2), torch.ones(2, 2)) == math.inf


def _decide(script: list[list[float | None]], **settings: Any) -> list[int]:
    """Edges after each epoch of a script of nw, one list a layer position; None where the layer was skipped."""
    strategy = LarsSkip(**settings)
    data = load_dataset("digits", limit=64, device="cpu")
    model = nn.Sequential(*[nn.Conv2d(1, 1, 1) for _ in script[0]], nn.Flatten(), nn.Linear(64, 10))
    Fit(model, data, strategy, batch_size=64)
    edges = []
    for epoch in script:
        assert [value is None for value in epoch] == [index < strategy.skipped for index in range(len(epoch))]
        edges.append(strategy.decide({index: value for index, value in enumerate(epoch) if value is not None}))
    return edges


def test_the_decision_follows_algorithm_1():
    script = [
        [1.0, 1.5, 1.9],  # none above 2: all learn
        [3.0, 1.0, 1.0],  # layer 1
        [None, 1.0, 1.0],  # skipped, so undefined: all learn again
        [1.0, 5.0, 1.0],  # layer 2 takes layer 1 along
        [None, None, 2.0],  # 2.0 does not exceed 2
        [1.0, 1.0, 2.1],  # the last takes all along
        [None, None, None],
    ]
    assert _decide(script, alpha=2.0) == [0, 1, 0, 2, 0, 3, 0]


def test_a_skipped_prefix_can_grow_while_it_is_skipped():
    assert _decide([[3.0, 1.0, 1.0], [None, 1.0, 4.0], [None, None, None]], alpha=2.0) == [1, 3, 0]


def test_keeping_the_last_variable_skips_for_ever_and_forgetting_ends_it():
    script = [[3.0, 1.0], *[[None, 1.0]] * 4]
    assert _decide(script, memory="keep") == [1, 1, 1, 1, 1]
    assert _decide([[3.0, 1.0], [None, 1.0], [None, 1.0], [3.0, 1.0]], memory="keep", forget_after=2) == [1, 1, 0, 1]


def test_the_rule_without_a_threshold_compares_a_layer_with_itself():
    # Layer 1 slows down (its nw rises above its own geometric mean), layer 2 speeds up, whatever their size.
    script = [[1.0, 1000.0], [4.0, 100.0], [None, 10.0], [1.0, 1.0]]
    assert _decide(script, rule="own-history") == [0, 1, 0, 0]


def test_an_infinite_threshold_trains_bit_for_bit_as_no_strategy(data):
    plain = fit(network, data, epochs=3, **OPTIONS)
    never = fit(network, data, LarsSkip(alpha=math.inf), epochs=3, **OPTIONS)
    for (name, a), b in zip(plain.model.state_dict().items(), never.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    skipping = fit(network, data, LarsSkip(alpha=0), epochs=3, **OPTIONS)
    assert not torch.equal(plain.model[0].weight, skipping.model[0].weight)


def test_the_maps_show_what_was_skipped_and_what_was_measured(data):
    result = fit(network, data, LarsSkip(alpha=0), epochs=3, **OPTIONS)
    skipped, measured = (result.layer_maps[f"lars-skip: {title}"].table for title in ("skipped", "LARS variable"))
    assert list(skipped.index) == ["0", "4", "7"]
    assert [int(skipped[epoch].sum()) for epoch in skipped] == [
        row["lars-skip/skipped_layers"] for row in result.history]
    assert skipped.to_numpy().any()
    assert (measured.isna() == (skipped == 1)).all(axis=None)
    assert measured.loc["4", 1] == pytest.approx(math.log10(result.history[0]["lars-skip/nw/4"]))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_skipped_weights_and_momentum_do_not_move_and_the_others_do(data, optimizer):
    class Watch(LarsSkip):
        def preflight(self, network: nn.Module, example: torch.Tensor) -> Preflight:
            # Watch the epochs of the fit alone.
            return Preflight.of(network)

        def on_epoch_start(self, run: Run) -> None:
            super().on_epoch_start(run)
            object.__setattr__(self, "before", self._snapshot(run))

        def on_epoch_end(self, run: Run) -> None:
            moved = {name for name, value in self._snapshot(run).items()
                     if any(not torch.equal(a, b) for a, b in zip(value, self.before.get(name, value), strict=True))}
            seen.append((self.skipped, moved))
            super().on_epoch_end(run)

        def _snapshot(self, run: Run) -> dict[str, list[torch.Tensor]]:
            found = {}
            for name, parameter in run.model.named_parameters():
                state = run.optimizer.state.get(parameter, {})
                found[name] = [parameter.detach().clone(), *(
                    value.clone() for value in state.values() if isinstance(value, torch.Tensor))]
            for name, value in run.model.named_buffers():
                found[name] = [value.clone()]
            return found

    seen: list[tuple[int, set[str]]] = []
    fit(network, data, Watch(alpha=0), epochs=3, optimizer=optimizer, **OPTIONS)
    # α = 0 skips everything in every second epoch.
    assert [skipped for skipped, _ in seen] == [0, 3, 0]
    assert seen[1][1] == {"11.weight", "11.bias"}
    assert {"0.weight", "1.weight", "1.running_mean", "7.weight"} <= seen[2][1]


def test_resume_in_the_middle_of_a_skip(data, tmp_path):
    options = dict(epochs=4, batch_size=64, lr=0.01)
    whole = fit(network, data, LarsSkip(alpha=0), progress=False, **options)
    assert [row["lars-skip/skipped_layers"] for row in whole.history] == [0, 3, 0, 3]
    first = Fit(network, data, LarsSkip(alpha=0), checkpoint=tmp_path, **options)
    first.train_epoch()
    again = fit(network, data, LarsSkip(alpha=0), checkpoint=tmp_path, progress=False, **options)
    assert [row["lars-skip/skipped_layers"] for row in again.history] == [0, 3, 0, 3]
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_backward_flops_fall_by_exactly_the_skipped_layers_share():
    data = load_dataset("digits", image_size=64, channels=3, limit=64, test_limit=16, device="cpu")
    table = analysis.measure_prefixes(
        lambda: build_model("vgg-f", num_classes=10, image_size=64, width=32), data, 4, rounds=2)
    costs = measure.layer_costs(build_model("vgg-f", num_classes=10, image_size=64, width=32), (3, 64, 64), 4)
    macs = costs["forward_macs"].tolist()
    for skipped in range(6):
        # dW of every layer that learns; dX of every one but the first of them.
        wanted = 2 * (sum(macs[skipped:]) + sum(macs[skipped + 1:]))
        assert table["backward_flops"][skipped] == wanted
        assert table["forward_flops"][skipped] == 2 * sum(macs)


@pytest.mark.parametrize("name", [
    "resnet18", "mobilenet_v2", pytest.param("vgg11", marks=slow), pytest.param("densenet121", marks=slow)])
def test_it_works_on_torchvisions_networks(name):
    data = load_dataset("digits", image_size=32, channels=3, limit=16, test_limit=8, device="cpu")
    result = fit(lambda: build_model(name, num_classes=10), data, LarsSkip(alpha=0), epochs=2, batch_size=8,
                 lr=1e-4, progress=False)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in result.model.modules())
    assert result.history[1]["lars-skip/skipped_layers"] == convolutions
    table = measure.layer_costs(result.model, (3, 32, 32), 8)
    linear = table.loc[table["kind"] == "linear", "forward_macs"].tolist()
    # What is left in each of the two steps: dW of the linear layers, dX of all but the first of them.
    assert result.history[1]["cost/backward_flops"] == 2 * 2 * (sum(linear) + sum(linear[1:]))


@pytest.mark.parametrize("settings", [{"alpha": -1}, {"alpha": "much"}, {"rule": "other"}, {"forget_after": 0}])
def test_bad_settings_get_one_sentence(settings):
    with pytest.raises(LayerlabError, match=f"lars-skip: setting '{next(iter(settings))}' .*, got "):
        LarsSkip(**settings)


# ---------------------------------------------------------------------------------------------- other people's networks


def all_convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 10, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )


class Rows(nn.Module):
    """One-dimensional convolutions over an image's rows, and a transposed one."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        weight_norm = nn.utils.parametrizations.weight_norm if normed else lambda module: module
        self.first = weight_norm(nn.Conv1d(16, 8, 3, bias=False))
        self.second = weight_norm(nn.ConvTranspose1d(8, 12, 3, bias=False))
        self.last = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x.squeeze(1)).relu()).relu().mean(2))


class Volume(nn.Module):
    """Three-dimensional convolutions over an image cut in slices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 4, 3, padding=1), nn.ConvTranspose3d(4, 4, 2, 2)
        self.last = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, 1, 4, 8, 8)
        return self.last(self.second(self.first(x).relu()).mean((2, 3, 4)))


def _skipped(result: Any) -> list[float]:
    return [row["lars-skip/skipped_layers"] for row in result.history]


def _frozen(build: Any, *names: str) -> nn.Module:
    model = build()
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


@pytest.mark.parametrize(("build", "layer"), [(network, "4"), (lambda: build_model("lenet"), "conv1")])
def test_a_layer_that_the_user_froze_is_not_taken_for_a_finished_one(build, layer):
    data = load_dataset("digits", image_size=28, limit=128, test_limit=64, device="cpu")
    result = fit(_frozen(build, layer), data, LarsSkip(alpha=1e9), epochs=4, **OPTIONS)
    assert _skipped(result) == [0, 0, 0, 0]
    assert f"lars-skip/nw/{layer}" not in result.final


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("build", "layer"), [(network, "7"), (lambda: Rows(normed=True), "second")])
def test_a_layer_that_another_strategy_freezes_is_not_taken_for_a_finished_one(data, first, build, layer):
    class Other(Strategy):
        name: ClassVar[str] = "other"

        def on_epoch_start(self, run: Run) -> None:
            run.freeze(self.name, [run.model.get_submodule(layer)])

    pair: list[Strategy] = [Other(), LarsSkip(alpha=1e9)]
    result = fit(build(), data, pair if first else pair[::-1], epochs=3, **OPTIONS)
    assert _skipped(result) == [0, 0, 0]


@pytest.mark.parametrize("build", [lambda: Rows(normed=False), lambda: Rows(normed=True), Volume])
def test_convolutions_of_every_dimension_are_seen_with_normed_weights_too(data, build):
    result = fit(build, data, LarsSkip(alpha=0), epochs=3, **OPTIONS)
    assert result.strategies[0].layers == ["first", "second"]
    assert _skipped(result) == [0, 2, 0]
    assert math.isfinite(result.history[0]["lars-skip/nw/second"])
    assert result.history[1]["cost/backward_flops"] < result.history[0]["cost/backward_flops"] / 5


def test_a_convolution_whose_weight_a_hook_makes_is_named(data):
    model = Rows(normed=False)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.first)
    found = LarsSkip().preflight(model, torch.zeros(2, 1, 16, 16))
    assert found.covered == ("second",)
    assert "a hook makes its weight" in found.left_out["first"]


@pytest.mark.parametrize(
    ("build", "names"), [(all_convolutional, ["0", "2", "4"]), (lambda: build_model("squeezenet1_1"), None)])
def test_the_last_layer_that_learns_is_never_skipped(build, names):
    channels = 3 if names is None else 1
    data = load_dataset("digits", image_size=32, channels=channels, limit=32, test_limit=16, device="cpu")
    result = fit(build, data, LarsSkip(alpha=0), epochs=2, **OPTIONS | {"batch_size": 16})
    layers = result.strategies[0].layers
    assert names is None or layers == names
    assert _skipped(result) == [0, len(layers) - 1]
    found = result.preflights["lars-skip"]
    assert layers[-1] in found.left_out
    assert found.notes == (f"{layers[-1]} always learns, so that something is left to learn.",)


@pytest.mark.parametrize(("model", "message"), [
    (nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), "lars-skip needs convolutions, and Sequential has none"),
    (_frozen(network, "0", "4", "7"), "all 3 of Sequential are frozen"),
    (nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "nothing in Sequential learns after"),
    (_frozen(lambda: Rows(normed=True), "second", "last"), "nothing in Rows learns after its first, first"),
])
def test_a_network_that_leaves_nothing_to_skip_or_to_learn_is_refused(data, model, message):
    with pytest.raises(Refused, match=message):
        fit(model, data, LarsSkip(), epochs=1, **OPTIONS)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("vgg11", marks=slow)])
def test_the_preflight_says_what_skipping_all_convolutions_saves(name):
    data = load_dataset("digits", image_size=32, channels=3, limit=16, test_limit=8, device="cpu")
    result = fit(build_model(name, num_classes=10), data, LarsSkip(alpha=0), epochs=2, **OPTIONS | {"batch_size": 8})
    full, skipping = (row["cost/forward_flops"] + row["cost/backward_flops"] for row in result.history)
    found = result.preflights["lars-skip"]
    assert list(found.saves.values()) == [pytest.approx(1 - skipping / full)]
    linear = {name for name, module in result.model.named_modules() if isinstance(module, nn.Linear)}
    assert set(found.left_out) == linear


# ---------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("build", [network, Volume])
def test_the_placebo_alternates_at_the_flops_of_the_run(data, build):
    # Three epochs of skipping, one after the other, are spread over the run.
    strategy = LarsSkip(alpha=0, memory="keep", forget_after=3)
    runs = compare(build, data, {"full": (), "skip": strategy}, epochs=5, placebo=True, **OPTIONS)
    count = len(runs.results["skip", 0].strategies[0].layers)
    assert _skipped(runs.results["skip", 0]) == [0, count, count, count, 0]
    (placebo,) = runs.placebos.values()
    plan = [row["planned-freezing/skipped_layers"] for row in runs.results[placebo, 0].history]
    assert plan == [0, count, 0, count, count]
    assert runs.paired("TFLOP", placebo, "skip").mean == pytest.approx(1)


def test_a_run_that_skipped_nothing_has_no_placebo(data):
    result = fit(network, data, LarsSkip(alpha=math.inf), epochs=2, **OPTIONS)
    assert result.strategies[0].placebo(result) is None


def test_an_alternation_takes_the_prefix_that_comes_nearest():
    def row(count: int, flops: float) -> dict[str, float]:
        return {"lars-skip/skipped_layers": count, "cost/forward_flops": 4, "cost/backward_flops": flops - 4}

    # 6 + 2 + 2 saved: twice 6 misses it by 2, five times 2 by nothing.
    history = [row(0, 10), row(3, 4), row(1, 8), row(1, 8), row(0, 10), row(0, 10)]
    assert alternation(history) == {2: 1, 3: 1, 4: 1, 5: 1, 6: 1}
    # Without costs a convolution counts as much as another: 3 + 1 + 1.
    assert alternation([{"lars-skip/skipped_layers": each["lars-skip/skipped_layers"]} for each in history]) == {
        2: 1, 3: 1, 4: 1, 5: 1, 6: 1}
    assert alternation([row(0, 10), row(3, 4), row(0, 10), row(3, 4)]) == {2: 3, 4: 3}


def test_the_papers_numbers_of_figures_2_and_3():
    model = build_model("vgg-f")
    table = analysis.shares({batch: measure.layer_costs(model, (3, 224, 224), batch) for batch in (1, 32)})
    values = table["share of conv1 and conv2"].tolist()
    # 55.06 %, 53.48 % without conv1's dX, 50.60 % with the FC layers; unique tensors 33 % and 65 %.
    assert values == pytest.approx([55.06, 53.48, 50.60, 55.06, 33, 65], abs=0.6)


def test_savings_of_skipped_prefixes_worked_out():
    costs = measure.layer_costs(build_model("vgg-f"), (3, 224, 224))
    plain = [100 * (1 - analysis.skipping_macs(costs, n, False)) for n in range(6)]
    autograd = [100 * (1 - analysis.skipping_macs(costs, n, True)) for n in range(6)]
    assert plain == pytest.approx([0.0, 6.8, 36.7, 46.7, 56.7, 66.7], abs=0.06)
    assert autograd == pytest.approx([0.0, 21.8, 41.7, 51.7, 61.7, 66.7], abs=0.06)


def _result(accuracies: list[float], seconds: float) -> FitResult:
    fixed = {"time/epoch_seconds": seconds, "cost/forward_flops": 1, "cost/backward_flops": 1}
    history = [{"epoch": epoch, "test/top1": accuracy, **fixed} for epoch, accuracy in enumerate(accuracies, 1)]
    return FitResult(nn.Identity(), history, 0, "", (), Settings())


def test_composers_linear_freezing_at_a_given_cost():
    # Five layers, each a sixth of the step; the schedule of start 0 and level 1 over six epochs freezes 0, 0, 1, …, 4.
    costs = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert linear(costs, 6, 1.0) == {}
    plan = linear(costs, 6, (6 + 6 + 5 + 4 + 3 + 2) / 36)
    assert plan == {3: 1, 4: 2, 5: 3, 6: 4}
    late = linear(costs, 6, 0.8)
    assert list(late.values()) == sorted(late.values())
    assert sum(costs[0] - costs[count] for count in late.values()) / 36 == pytest.approx(0.2, abs=0.03)


def test_accuracy_within_a_budget():
    result = _result([0.2, 0.4, 0.6], 1.0)
    assert [result.within(flops, analysis.FLOPS) for flops in (0, 1, 2, 3, 6, 9)] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.6, 0.6])


def test_the_rule_is_set_beside_the_best_threshold():
    table = pd.DataFrame({"where": ["a"] * 4, "arm": ["full learning", "α = 2", "α = 4", "own history"],
                          "top-1 at equal FLOPs": [0.3, 0.5, 0.6, 0.55]})
    (row,) = analysis.rule_against_sweep(table).to_dict("records")
    assert (row["best α"], row["with it"], row["own history"], row["full learning"]) == ("4", 0.6, 0.55, 0.3)


def test_both_methods_at_the_cost_of_the_cheaper_one():
    full, mine = _result([0.2, 0.4, 0.6], 10.0), _result([0.3, 0.5], 10.0)
    both = Comparison({("full", 0): full, ("mine", 0): mine})
    table = analysis.at_equal_cost({"here": both}, "full", "mine").set_index("at the same")
    assert table.loc["seconds", ["full", "mine"]].tolist() == pytest.approx([0.4, 0.5])
    assert table.loc["FLOPs", ["full", "mine"]].tolist() == pytest.approx([0.4, 0.5])


def _skipping(accuracies: list[float], skipped: list[int], flops: list[int]) -> FitResult:
    result = _result(accuracies, 1.0)
    for row, count, cost in zip(result.history, skipped, flops, strict=True):
        row.update({"lars-skip/skipped_layers": count, "cost/forward_flops": cost, "cost/backward_flops": 0})
    return result


def test_the_threshold_is_chosen_among_those_that_adapt():
    tried = Comparison({
        ("α = 2", 0): _skipping([0.2, 0.9, 0.9], [0, 5, 5], [4, 2, 2]),  # every later epoch skips
        ("α = 8", 0): _skipping([0.2, 0.4, 0.6], [0, 5, 0], [4, 2, 4]),
        ("α = 16", 0): _skipping([0.2, 0.5, 0.9], [0, 0, 1], [4, 4, 4]),
        ("α = 64", 0): _skipping([0.9, 0.9, 0.9], [0, 0, 0], [4, 4, 4]),  # none does
    })
    table = analysis.alpha_table(tried).set_index("α")
    assert table["epochs that skip"].tolist() == pytest.approx([1, 0.5, 0.5, 0])
    # At the 8 FLOPs of the cheapest: halfway through the last epoch, and at the end of the second.
    assert table["top-1 at equal FLOPs"].tolist() == pytest.approx([0.9, 0.5, 0.5, 0.9], abs=1e-6)
    assert table.index[table["chosen"]].tolist() == [8]
    assert analysis.chosen_arm(table.reset_index(), 8.0) == {}
    assert analysis.chosen_arm(table.reset_index(), 2.0) == {"proposed, α = 8": LarsSkip(alpha=8)}


def test_a_sweeps_budget_is_that_of_the_arms_that_were_asked_for():
    results = {
        ("full learning", 0): _skipping([0.2, 0.4, 0.6], [0, 0, 0], [4, 4, 4]),
        ("α = 4", 0): _skipping([0.2, 0.5, 0.7], [0, 5, 0], [4, 2, 4]),
        ("own history", 0): _skipping([0.2, 0.3, 0.4], [0, 5, 5], [4, 2, 2]),
        ("own history · placebo", 0): _skipping([0.2, 0.2, 0.3], [0, 5, 5], [2, 1, 1]),
    }
    run = Comparison(results, placebos={"own history": "own history · placebo"})
    table = analysis.sweep_table(run, "here")
    # 8 FLOPs, the cheapest that was asked for; its placebo ended with 4.
    assert table["top-1 at equal FLOPs"].tolist() == pytest.approx([0.4, 0.6, 0.4, 0.3])
    (row,) = analysis.rule_against_sweep(table).to_dict("records")
    assert (row["own history"], row["its placebo"]) == pytest.approx((0.4, 0.3))


def test_vgg_f_has_its_published_normalisation_where_it_is_asked_for():
    kinds = [type(layer).__name__ for layer in build_model("vgg-f", image_size=64, width=16, lrn=True).features]
    assert kinds[:8] == ["Conv2d", "ReLU", "LocalResponseNorm", "MaxPool2d"] * 2
    plain = build_model("vgg-f", image_size=64, width=16)
    assert not any(isinstance(layer, nn.LocalResponseNorm) for layer in plain.features)
