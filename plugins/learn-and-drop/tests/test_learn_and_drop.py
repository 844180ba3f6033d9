"""Learn&Drop: scores, decisions, cuts, stored features, going on after an interruption, a full disk."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from layerlab import LayerlabError, Preflight, Run, Strategy, build_model, compare, fit, load_dataset, measure
from layerlab.training.loop import Fit
from layerlab_lars_skip import LarsSkip
from layerlab_learn_and_drop import LearnAndDrop
from layerlab_learn_and_drop.method.cutting import features_of, make_plan, split
from layerlab_learn_and_drop.method.features import Making, decode, encode
from layerlab_learn_and_drop.method.scores import relative_change, trend

OPTIONS: dict[str, Any] = dict(batch_size=32, lr=0.02)
# Every layer is done as soon as it has two scores; half of the FLOPs may go.
EAGER: dict[str, Any] = dict(settled=10.0, flat=10.0, window=2, at_most=0.6)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=128, test_limit=64, device="cpu").augmented("crop", 1)


def network() -> nn.Module:
    return build_model("resnet-cifar", channels=1, depth=8)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------- scores


def test_the_scores_on_worked_examples():
    # ‖(3, 4)‖ = 5; moved by (0, 0, 2, 1.5): 2.5.
    before = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])]
    after = [torch.tensor([3.0, 4.0]), torch.tensor([2.0, 1.5])]
    assert relative_change(after, before) == 0.5
    assert relative_change(before, before) == 0
    assert trend([9.0, 8.0, 4.0, 2.0], 3) == pytest.approx(-math.log(2))
    assert trend([0.1, 0.1, 0.1], 3) == 0
    assert math.isnan(trend([0.1, 0.1], 3))
    # Not monotonous: slope of the least-squares line through (0, 0), (1, 1), (2, 0), (3, 1).
    assert trend([1.0, math.e, 1.0, math.e], 4) == pytest.approx(0.2)


def _observed(script: list[list[float | None]], **settings: Any) -> list[int]:
    """Length of the done prefix after each epoch of a script of changes; None where a layer did not learn."""
    strategy = LearnAndDrop(**settings)
    model = nn.Sequential(*[nn.Conv2d(1, 1, 1) for _ in script[0]], nn.Flatten(), nn.Linear(64, 10))
    Fit(model, load_dataset("digits", limit=64, device="cpu"), strategy, batch_size=64)
    return [strategy.observe({i: value for i, value in enumerate(epoch) if value is not None}) for epoch in script]


def test_a_layer_is_done_when_its_change_is_small_and_flat_and_stays_so():
    settings = dict(settled=0.5, flat=0.1, window=2)
    # Falls by half each epoch: small, never flat. Then flat: done.
    assert _observed([[1.0], [0.5], [0.25], [0.24]], **settings) == [0, 0, 0, 1]
    # Flat but as large as ever.
    assert _observed([[1.0], [1.0], [0.9], [0.9]], **settings) == [0, 0, 0, 0]
    # Small but rising, as after a plateau: it has only begun.
    assert _observed([[1.0], [0.1], [0.2], [0.4]], **settings) == [0, 0, 0, 0]
    # Done once is done for good, also when it changes again.
    assert _observed([[1.0], [0.4], [0.4], [0.9]], **settings) == [0, 0, 1, 1]


def test_drops_are_a_prefix_and_never_a_hole():
    settings = dict(settled=0.5, flat=0.1, window=2)
    # The second and third layer are done from the third epoch on, and wait for the first.
    script = [[1.0, 1.0, 1.0, 1.0], [1.0, 0.4, 0.4, 1.0], [1.0, 0.4, 0.4, 1.0], [0.4, 0.4, 0.4, 1.0],
              [0.4, 0.4, 0.4, 1.0]]
    assert _observed(script, **settings) == [0, 0, 0, 0, 3]
    # A layer that did not learn in an epoch is not judged by it.
    assert _observed([[1.0, 1.0], [None, 0.4], [0.4, 0.4], [0.4, 0.4]], **settings) == [0, 0, 0, 2]


def test_a_falling_learning_rate_does_not_pass_for_having_learned(data):
    kept = {}
    for schedule, options in {"constant": {}, "step": {"milestones": (1, 2, 3), "gamma": 1e-3}}.items():
        result = fit(network, data, LearnAndDrop(settled=1e-9), epochs=3, schedule=schedule, progress=False,
                     momentum=0, weight_decay=0, **OPTIONS, **options)
        kept[schedule] = [row["learn-and-drop/change/conv"] for row in result.history]
    assert kept["step"][0] == kept["constant"][0]
    assert kept["step"][2] > 0.1 * kept["constant"][2]  # unscaled it would be a millionth


def test_a_layer_that_another_strategy_freezes_is_not_judged(data):
    result = fit(network, data, [LearnAndDrop(**EAGER), LarsSkip(alpha=0)], epochs=2, progress=False, **OPTIONS)
    assert [row["lars-skip/skipped_layers"] for row in result.history] == [0, 7]
    assert "learn-and-drop/change/conv" in result.history[0]
    assert "learn-and-drop/change/conv" not in result.history[1]
    assert "learn-and-drop/change/fc" in result.history[1]


# ---------------------------------------------------------------------------------------------- cuts

NETWORKS: dict[str, dict[str, Any]] = {
    "vgg11": {"init_weights": False}, "resnet50": {}, "densenet121": {}, "mobilenet_v2": {},
    "vit_b_16": {"image_size": 32}, "preact-resnet": {"depth": 29},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tail_on_features_gives_the_networks_logits(name):
    torch.manual_seed(0)
    size = 32
    model = build_model(name, num_classes=10, **NETWORKS[name])
    x = torch.randn(2, 3, size, size)
    if name == "vit_b_16":
        nn.init.normal_(model.heads.head.weight)  # torchvision starts it from zero, where every logit is
    # Batch norms that are not the identity.
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, size, size))
    plan = make_plan(model, x)
    assert all(module.training for module in model.modules())
    model.eval()
    with torch.no_grad():
        wanted = model(x)
    counts = sorted(plan.cuts)
    several = [count for count in counts if len(plan.cuts[count].shapes) > 1]
    assert several or name.startswith("vgg")
    for count in {counts[0], *several[len(several) // 2 :][:1], counts[-1]}:
        cut = plan.cuts[count]
        prefix, tail = split(model, cut)
        with torch.no_grad():
            features = prefix.eval()(x)
            logits = tail.eval()(features)
        assert sorted(tuple(value.shape[1:]) for value in features_of(features)) == sorted(cut.shapes)
        assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        # Each parameter is on one side, and none is missing.
        parts = [{id(parameter) for parameter in part.parameters()} for part in (prefix, tail)]
        assert not parts[0] & parts[1]
        assert parts[0] | parts[1] == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("name", ["vgg16", "resnet152"])
def test_the_papers_other_networks_can_be_cut_behind_every_layer(name):
    with torch.device("meta"):
        plan = make_plan(build_model(name), torch.empty(1, 3, 224, 224))
    assert list(plan.cuts) == list(range(1, len(plan.layers)))
    assert len(plan.layers) == {"vgg16": 16, "resnet152": 156}[name]  # with the four shortcuts that have weights


class Reused(nn.Module):
    """One dropout module before and after the only cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(64, 64), nn.Linear(64, 10), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(self.drop(self.first(x.flatten(1))).reshape(-1, 64).relu()))


def test_features_are_made_in_inference_mode_though_a_module_is_on_both_sides(data):
    model = Reused()
    prefix, tail = split(model, make_plan(model, torch.randn(1, 1, 8, 8)).cuts[1])
    tail.train()
    images = data.augmented("none").train
    making = Making(prefix, images, "compute", 0, 0, 64, nullcontext, torch.contiguous_format)
    features = making.make(torch.device("cpu"), math.inf, Path("unused"))
    x, y = next(features.batches(8))
    first, labels = next(images.batches(8))
    model.eval()
    with torch.no_grad():
        assert torch.equal(x, prefix(first))
    assert torch.equal(y, labels)


def test_flops_of_a_prefix_are_those_of_its_layers():
    model = build_model("vgg-cifar")
    plan = make_plan(model, torch.randn(1, 3, 32, 32))
    macs = measure.layer_costs(model, (3, 32, 32))["forward_macs"].tolist()
    assert plan.flops == 2 * sum(macs)
    assert [plan.cuts[count].flops for count in range(1, 9)] == [2 * sum(macs[:count]) for count in range(1, 9)]


class Tied(nn.Module):
    """One layer before and after another; batch norm without parameters does the same with its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied, self.between = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.last = nn.BatchNorm1d(8, affine=False), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tied(self.between(self.tied(self.first(x.flatten(1)))))
        return self.last(self.norm(x))


def test_no_parameter_is_on_both_sides_of_a_cut():
    plan = make_plan(Tied(), torch.randn(2, 1, 8, 8))
    assert [layer.name for layer in plan.layers] == ["first", "tied", "between", "last"]
    assert list(plan.cuts) == [1, 3]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1))
        return self.second(x) if x.sum() > 0 else self.second(-x)


def test_networks_that_cannot_be_cut_are_refused_with_the_reason(data):
    with pytest.raises(LayerlabError, match=r"Branching cannot be traced \(symbolically traced variables"):
        fit(Branching(), data, LearnAndDrop(), epochs=1, progress=False, **OPTIONS)
    with pytest.raises(LayerlabError, match="two layers or more, and Sequential has 1"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data, LearnAndDrop(), epochs=1, progress=False, **OPTIONS)


# ---------------------------------------------------------------------------------------------- training


def test_dropping_saves_the_prefixs_forward_and_leaves_the_whole_network(data):
    strategy = LearnAndDrop(**EAGER)
    runs = compare(network, data, {"plain": (), "dropped": strategy, "frozen": strategy.same_layers_frozen()},
                   epochs=4, progress=False, **OPTIONS)
    plain, dropped, frozen = (runs.results[arm, 0] for arm in runs.arms)
    layers = int(dropped.final["learn-and-drop/dropped_layers"])
    assert layers > 0
    assert [row["learn-and-drop/dropped_layers"] for row in dropped.history] == [0, 0, layers, layers]
    share = make_plan(network(), torch.randn(1, 1, 8, 8))
    left = 1 - share.cuts[layers].flops / share.flops
    images = len(data.train)
    for row, whole, ice in zip(dropped.history, plain.history, frozen.history, strict=True):
        after = row["epoch"] > 2
        # A pass over the images for the batch norms' statistics, and one for the features; frozen, for the statistics
        # alone, and through the whole network. Both count to the epoch.
        drops = row["epoch"] == 3
        made = 2 * share.cuts[layers].flops * images if drops else 0
        assert row["learn-and-drop/feature_flops"] == made
        assert row["cost/forward_flops"] == pytest.approx((left if after else 1) * whole["cost/forward_flops"] + made)
        assert ice["cost/forward_flops"] == whole["cost/forward_flops"] + (share.flops * images if drops else 0)
        assert row["cost/backward_flops"] == ice["cost/backward_flops"]
        assert (row["cost/backward_flops"] < whole["cost/backward_flops"]) == after
    # Until the drop both see the same; the whole network is left, and what it predicts is what was reported.
    assert dropped.history[1]["test/top1"] == frozen.history[1]["test/top1"] == plain.history[1]["test/top1"]
    assert dropped.model.state_dict().keys() == network().state_dict().keys()
    with torch.no_grad():
        correct = sum(int((dropped.model(x).argmax(1) == y).sum()) for x, y in data.test.batches(32))
    assert correct / len(data.test) == pytest.approx(dropped.final["test/top1"])


class Watch(Strategy):
    """Keeps copies of the network's state at each epoch's start."""

    name: ClassVar[str] = "watch"

    def preflight(self, network: nn.Module, example: torch.Tensor) -> Preflight:
        # Watch the epochs of the fit alone.
        return Preflight.of(network)

    def on_epoch_start(self, run: Run) -> None:
        seen.append({name: value.clone() for name, value in run.model.state_dict().items()})


seen: list[dict[str, torch.Tensor]] = []


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_dropped_layers_stand_still_and_the_tail_learns(data, optimizer):
    seen.clear()
    result = fit(network, data, [LearnAndDrop(**EAGER), Watch()], epochs=4, optimizer=optimizer, progress=False,
                 **OPTIONS)
    moved = {name for name, value in seen[-1].items() if not torch.equal(value, seen[-2][name])}
    assert {"fc.weight", "stage3.0.conv2.weight", "stage3.0.bn2.running_mean"} <= moved
    assert not any(name.startswith(("conv", "stage1")) for name in moved)
    final = result.model.state_dict()
    assert {name for name, value in final.items() if not torch.equal(value, seen[-2][name])} == moved


def test_a_drop_that_would_not_pay_is_not_made(data):
    # In the last epoch but one everything is done: what is left to save is less than the features cost.
    result = fit(network, data, LearnAndDrop(**EAGER | {"at_most": 1.0, "augmentation": "copies", "copies": 5}),
                 epochs=3, progress=False, **OPTIONS)
    assert [row["learn-and-drop/dropped_layers"] for row in result.history] == [0, 0, 0]


class Work(nn.Module):
    """A first layer whose work and whose result's size are given."""

    def __init__(self, rounds: int, times: int) -> None:
        super().__init__()
        self.weight, self.rounds, self.times = nn.Parameter(torch.eye(64)), rounds, times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for _ in range(self.rounds):
            x = x + 1e-6 * (x @ self.weight)
        return (x + self.weight[0]).unsqueeze(1).expand(-1, self.times, -1)


# Both give more bytes than the image has. One does 200 products for each result; the other does one product and shows
# its result 1,000 times, where reading has to fetch each.
@pytest.mark.parametrize(("rounds", "times", "dropped"), [(200, 1, 1), (1, 1000, 0)])
def test_large_features_of_little_work_are_frozen_instead(data, rounds, times, dropped):
    model = nn.Sequential(Work(rounds, times), nn.Flatten(), nn.Linear(64 * times, 10))
    strategy = LearnAndDrop(**EAGER | {"at_most": 1.0, "augmentation": "none"})
    row = fit(model, data, strategy, epochs=4, progress=False, batch_size=64, lr=1e-4).final
    assert (row["learn-and-drop/dropped_layers"], row["learn-and-drop/frozen_layers"]) == (dropped, 1 - dropped)


@pytest.mark.parametrize("storage", ["compute", "bfloat16", "int8"])
def test_stored_numbers_come_back(storage):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(16, 8, 4, 4, generator=generator).relu_() * torch.logspace(-3, 3, 16).view(-1, 1, 1, 1)
    values[3] = 0
    back = decode(encode(values, storage), values.dtype)
    assert back.shape == values.shape
    assert torch.equal(back == 0, values == 0) if storage != "int8" else (back[values == 0] == 0).all()
    top = values.flatten(1).amax(1).view(-1, 1, 1, 1)
    # bfloat16 has 8 significant bits; 8 bits of an image's range: half a step.
    bound = {"compute": 0 * values, "bfloat16": values / 256, "int8": top / 255 / 2 * 1.001}[storage]
    assert ((back - values).abs() <= bound).all()
    flags = torch.tensor([[True], [False]])
    assert torch.equal(decode(encode(flags, storage), flags.dtype), flags)


@pytest.mark.parametrize("storage", ["compute", "bfloat16", "int8"])
@pytest.mark.parametrize("memory_budget", [None, 0])
def test_every_way_of_storing_trains(data, storage, memory_budget, tmp_path):
    strategy = LearnAndDrop(**EAGER, storage=storage, memory_budget=memory_budget, folder=str(tmp_path))
    result = fit(network, data, strategy, epochs=4, progress=False, **OPTIONS)
    row = result.final
    assert row["learn-and-drop/dropped_layers"] > 0
    assert row["learn-and-drop/features_in_file"] == (memory_budget == 0)
    cut = make_plan(network(), torch.randn(1, 1, 8, 8)).cuts[int(row["learn-and-drop/dropped_layers"])]
    width = {"compute": 4, "bfloat16": 2, "int8": 1}[storage]
    overhead = 8 * len(cut.shapes) if storage == "int8" else 0
    stored = 128 * (cut.elements * width + overhead + 8)
    assert stored <= row["learn-and-drop/feature_bytes"] <= stored + 64 * 8
    # What lies in memory counts to the peak, what lies in a file does not.
    smaller = row["cost/peak_memory_bytes"] - (row["learn-and-drop/feature_bytes"] if memory_budget is None else 0)
    assert 0 < smaller < result.history[0]["cost/peak_memory_bytes"]
    states = result.layer_maps["learn-and-drop: layers"].table
    assert [int((states[epoch] == 2).sum()) for epoch in states] == [
        each["learn-and-drop/dropped_layers"] for each in result.history]
    assert not list(tmp_path.glob("*"))


def test_a_file_trains_as_memory_does(data):
    both = [fit(network, data, LearnAndDrop(**EAGER, memory_budget=budget), epochs=4, progress=False, **OPTIONS)
            for budget in (None, 0)]
    assert both[1].final["learn-and-drop/features_in_file"] == 1
    assert same_weights(both[0].model, both[1].model)


def test_augmentation_settings_differ_and_without_augmentation_they_do_not(data):
    def losses(images: Any, **settings: Any) -> tuple[float, ...]:
        result = fit(network, images, LearnAndDrop(**EAGER, **settings), epochs=5, progress=False, **OPTIONS)
        assert result.final["learn-and-drop/dropped_layers"] > 0
        makings[str(settings)] = sum(row["learn-and-drop/feature_flops"] > 0 for row in result.history)
        return tuple(row["train/loss"] for row in result.history)

    makings: dict[str, int] = {}
    ways: list[dict[str, Any]] = [
        {"augmentation": "none"}, {"augmentation": "copies", "copies": 2}, {"augmentation": "refresh"},
        {"augmentation": "refresh", "refresh_every": 2},
    ]
    assert len({losses(data, **way) for way in ways}) == 4
    assert list(makings.values()) == [1, 1, 1, 2]
    plain = data.augmented("none")
    assert len({losses(plain, **way) for way in (ways[0], ways[2])}) == 1


@pytest.mark.parametrize("order", [0, 1])
def test_it_composes_with_skipping(data, order):
    pair: list[Strategy] = [LearnAndDrop(**EAGER), LarsSkip(alpha=4.0)]
    result = fit(network, data, pair[::-1] if order else pair, epochs=5, progress=False, **OPTIONS)
    assert result.final["learn-and-drop/dropped_layers"] > 0
    assert all(parameter.requires_grad for parameter in result.model.parameters())


def test_it_trains_in_bfloat16(data):
    result = fit(network, data, LearnAndDrop(**EAGER), epochs=3, precision="bfloat16", progress=False, **OPTIONS)
    row = result.final
    assert row["learn-and-drop/dropped_layers"] > 0
    cut = make_plan(network(), torch.randn(1, 1, 8, 8)).cuts[int(row["learn-and-drop/dropped_layers"])]
    # The compute type is what the prefix gives.
    assert row["learn-and-drop/feature_bytes"] < 128 * (4 * cut.elements)


def test_a_strategy_that_replaces_the_step_is_refused(data):
    from layerlab_memory_reorder import MemoryReorder

    with pytest.raises(LayerlabError, match=r"'learn-and-drop' and 'memory-reorder' cannot run together"):
        fit(network, data, [LearnAndDrop(), MemoryReorder()], epochs=1, progress=False, **OPTIONS)


# ---------------------------------------------------------------------------------------------- interruptions


@pytest.fixture(scope="module")
def whole(data):
    strategy = LearnAndDrop(**EAGER, memory_budget=0, refresh_every=2)
    return fit(network, data, strategy, epochs=6, progress=False, **OPTIONS)


def _stopped(data: Any, folder: Path, epochs: int) -> Fit:
    strategy = LearnAndDrop(**EAGER, memory_budget=0, refresh_every=2)
    first = Fit(network, data, strategy, checkpoint=folder, epochs=6, **OPTIONS)
    for _ in range(epochs):
        first.train_epoch()
    return first


def _gone_on(data: Any, folder: Path) -> Any:
    strategy = LearnAndDrop(**EAGER, memory_budget=0, refresh_every=2)
    return fit(network, data, strategy, checkpoint=folder, epochs=6, progress=False, **OPTIONS)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_resume_before_at_and_after_a_drop_is_bit_identical(data, whole, tmp_path, stop):
    # Decided at the end of the second epoch, made at the start of the third, refreshed at that of the fifth.
    made = [row["epoch"] for row in whole.history if row["learn-and-drop/feature_flops"] > 0]
    assert made == [3, 5]
    _stopped(data, tmp_path, stop)
    again = _gone_on(data, tmp_path)
    assert same_weights(whole.model, again.model)
    assert [row["train/loss"] for row in whole.history] == [row["train/loss"] for row in again.history]


@pytest.mark.parametrize("damage", ["kept", "missing", "truncated", "altered", "without its note"])
def test_a_feature_file_is_checked_before_it_is_trusted(data, whole, tmp_path, damage, recwarn):
    _stopped(data, tmp_path, 3)
    (file,) = tmp_path.glob("features-*.bin")
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "altered":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "without its note":
        file.with_suffix(".json").unlink()
    # The fourth epoch reads the third's features.
    again = _stopped(data, tmp_path, 1)
    assert again.run.epoch == 4
    said = [str(warning.message) for warning in recwarn if "made again" in str(warning.message)]
    assert bool(said) == (damage in ("truncated", "altered", "without its note"))
    assert (again.run.history[-1]["learn-and-drop/feature_flops"] == 0) == (damage == "kept")
    assert same_weights(whole.model, _gone_on(data, tmp_path).model)


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is full beyond that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_nothing_is_dropped_and_training_goes_on(data, tmp_path):
    strategy = LearnAndDrop(**EAGER, memory_budget=0, folder=str(tmp_path))
    with _files_of_at_most(4096), pytest.warns(UserWarning, match=r"MB of feature maps do not fit into .*not dropped"):
        result = fit(network, data, strategy, epochs=5, progress=False, **OPTIONS)
    assert [row["learn-and-drop/dropped_layers"] for row in result.history] == [0] * 5
    plain = fit(network, data, epochs=2, progress=False, **OPTIONS)
    assert result.history[1]["train/loss"] == plain.history[1]["train/loss"]
    assert result.history[4]["cost/forward_flops"] == plain.history[1]["cost/forward_flops"]
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"settled": 0}, "greater than 0"), ({"storage": "int4"}, "compute.*bfloat16.*int8"),
     ({"at_most": 1.5}, "less than or equal to 1"), ({"window": 1}, "greater than or equal to 2"),
     ({"copies": 0}, "greater than or equal to 1"), ({"memory_budget": -1}, "greater than or equal to 0")],
)
def test_bad_settings_get_one_sentence(settings, message):
    with pytest.raises(LayerlabError, match=f"learn-and-drop: setting '{next(iter(settings))}' .*{message}.*, got "):
        LearnAndDrop(**settings)


def test_the_freezing_arm_needs_the_arm_that_decides(data):
    with pytest.raises(LayerlabError, match="same-layers-frozen takes its decisions from learn-and-drop"):
        fit(network, data, LearnAndDrop().same_layers_frozen(), epochs=1, progress=False, **OPTIONS)
