"""Pruning while training: the penalty, the targets, what the optimizer holds, and going on after an interruption."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

import pytest
import torch
import torchvision
from helpers import slow
from torch import nn

from layerlab import LayerlabError, LayerlabWarning, Refused, Run, Strategy, build_model, evaluate, fit, load_dataset
from layerlab.runs import tracking
from layerlab.training.loop import Fit
from layerlab_adaptive_pruning import AdaptivePruning, NetworkSlimming, TorchPruning, rebuild, structure
from layerlab_adaptive_pruning.method.pruning import ROUNDS, OutOfReach, count, search

OPTIONS: dict[str, Any] = dict(batch_size=64, lr=0.05)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", image_size=8, channels=3, limit=128, test_limit=64, device="cpu")


def network() -> nn.Module:
    return build_model("preact-resnet", depth=11)


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def ready(data, strategy: Strategy, **options: Any) -> Fit:
    """A fit after its first epoch, with scales of all sizes and one layer that is to go."""
    job = Fit(network, data, strategy, **{**OPTIONS, "epochs": 2, **options})
    job.train_epoch()
    with torch.no_grad():
        for name, norm in norms(job.run.model).items():
            norm.weight.copy_(0.1 + 0.9 * torch.rand(norm.num_features))
            norm.bias.zero_()
            if name == "stage2.0.bn2":
                norm.weight.fill_(0.01)
    return job


def test_the_penalty_adds_its_sign_to_the_scales_gradients_and_nothing_else(data):
    job = Fit(network, data, AdaptivePruning(sparsity=0.25), epochs=3, **OPTIONS)
    run = job.run
    frozen = run.model.get_submodule("stage1.0.bn1").weight.requires_grad_(False)
    x, y = next(iter(run.data.batches(64, run.generator, torch.float32, torch.contiguous_format)))
    scales = {f"{name}.weight": module.weight for name, module in norms(run.model).items()}
    with torch.no_grad():
        for weight in scales.values():
            weight[:2] = torch.tensor([0.0, -0.5])
    run.loss(run.model(x), y).backward()
    plain = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    job.strategies[0].on_after_backward(run)
    assert frozen.grad is None
    for name, parameter in run.model.named_parameters():
        if name in plain:
            added = 0.25 * parameter.detach().sign() if name in scales else torch.zeros(())
            assert torch.equal(parameter.grad, plain[name] + added)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", [AdaptivePruning, NetworkSlimming])
def test_the_optimizers_state_follows_the_channels_that_are_left(data, optimizer, kind):
    job = ready(data, kind(targets=[{"parameters": 0.6}]), optimizer=optimizer)
    run = job.run
    # A parameter and its state are made equal, so that they have to be equal afterwards if both were cut alike.
    for parameter, state in run.optimizer.state.items():
        for value in state.values():
            if value.shape == parameter.shape:
                value.copy_(parameter.detach())
    steps = [state.get("step") for state in run.optimizer.state.values()]
    before, schedule = run.optimizer, run.schedule
    run.epoch = 2
    job.strategies[0].on_epoch_start(run)
    live = dict(run.model.named_parameters())
    assert 0.55 * job.strategies[0].stages[0]["parameters"] < count(run.model) <= 0.6 * count(network())
    held = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(live)
    assert set(held) == set(live.values())
    # A layer that got a bias, for what a removed branch left behind, starts without momentum for it.
    old = {name: p for name, p in live.items() if name in dict(network().named_parameters())}
    assert set(run.optimizer.state) == set(old.values())
    for name, parameter in old.items():
        state = run.optimizer.state[parameter]
        for key, value in state.items():
            if key != "step":
                assert torch.equal(value, parameter), (name, key)
        assert state.get("step") == steps[0]
    assert run.optimizer is before is schedule.optimizer
    assert run.schedule is schedule


class Freezes(Strategy):
    """Freezes the first stage, then nothing."""

    name: ClassVar[str] = "freezes"

    def on_epoch_start(self, run: Run) -> None:
        run.freeze(self.name, [run.model.get_submodule("stage1")] if run.epoch < 4 else [])


def test_what_was_frozen_stays_frozen_and_thaws(data):
    def partly_frozen() -> nn.Module:
        model = network()
        model.conv.weight.requires_grad_(False)
        return model

    job = Fit(partly_frozen, data, [AdaptivePruning(targets=[{"ratio": 0.3}], every=1, sparsity=0.01), Freezes()],
              epochs=4, **OPTIONS)
    job.train_epoch()
    model = job.run.model
    with torch.no_grad():
        model.get_submodule("stage1.0.bn2").weight[:8] = 1e-3

    def values() -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    job.train_epoch()
    pruned = values()
    assert len(pruned["stage1.0.bn2.weight"]) <= 8
    job.train_epoch()
    third = values()
    moved = {name for name in third if not torch.equal(third[name], pruned[name])}
    assert not any(name.startswith(("stage1", "conv")) for name in moved)
    assert "fc.weight" in moved
    job.train_epoch()
    assert not torch.equal(values()["stage1.0.bn2.weight"], third["stage1.0.bn2.weight"])
    assert torch.equal(model.conv.weight, third["conv.weight"])


@pytest.mark.parametrize(("strategy", "optimizer"), [
    (AdaptivePruning(targets=[{"ratio": 0.3}, {"threshold": 0.4}], every=1, sparsity=0.05), "sgd"),
    pytest.param(AdaptivePruning(targets=[{"threshold": 0.3}], every=1, sparsity=0.05, bridge="merge"), "adamw",
                 marks=slow),
    pytest.param(NetworkSlimming(targets=[{"parameters": 0.7}], every=1, sparsity=0.05), "sgd", marks=slow),
], ids=["targets", "merge", "peer"])
def test_a_fit_goes_on_across_prunings_bit_by_bit(data, tmp_path, strategy, optimizer):
    options = dict(OPTIONS, epochs=3, optimizer=optimizer, schedule="cosine")

    class Thinning(Strategy):
        """Brings a whole layer below every threshold, so that layers go too."""

        name: ClassVar[str] = "thinning"

        def on_epoch_end(self, run: Run) -> None:
            if "stage2.0.bn2" in norms(run.model):
                with torch.no_grad():
                    run.model.get_submodule("stage2.0.bn2").weight.mul_(1e-3)

    both = [strategy, Thinning()]
    whole = fit(network, data, both, progress=False, **options)
    for stop in (1, 2):
        first = Fit(network, data, both, checkpoint=tmp_path / str(stop), **options)
        for _ in range(stop):
            first.train_epoch()
        again = fit(network, data, both, checkpoint=tmp_path / str(stop), progress=False, **options)
        assert again.history[stop]["train/loss"] == whole.history[stop]["train/loss"]
        states = whole.model.state_dict(), again.model.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert again.strategies[0].stages == whole.strategies[0].stages


def test_a_run_in_mlflow_keeps_all_its_params_when_a_pruned_training_goes_on(data, tmp_path, recwarn):
    both = {"observers": [tracking.track("test")], "checkpoint": tmp_path / "c", **OPTIONS, "epochs": 3}
    strategy = AdaptivePruning(targets=[{"ratio": 0.3}], every=1)
    first = Fit(network, data, strategy, **both)
    begun = sum(parameter.numel() for parameter in network().parameters())
    for _ in range(2):
        first.train_epoch()
    result = fit(network, data, strategy, progress=False, **both)
    assert sum(parameter.numel() for parameter in result.model.parameters()) < begun
    (run,) = tracking.client().search_runs([tracking.experiment_id("test")])
    assert run.data.params["parameters"] == str(begun)
    assert not [each for each in recwarn if "refuses" in str(each.message)]


def test_layers_go_while_training_and_what_comes_out_is_described_by_json(data):
    job = ready(data, AdaptivePruning(targets=[{"threshold": 0.05}]))
    job.train_epoch()
    result = job.finish()
    assert not any("stage2.0.conv" in name for name, _ in result.model.named_modules())
    stages = result.strategies[0].stages
    assert stages[1]["channels"]["stage2.0.bn2"] == stages[1]["channels"]["stage2.0.bn3"] == 0
    again = rebuild(network(), json.loads(json.dumps(structure(result.model))))
    again.load_state_dict(result.model.state_dict())
    assert evaluate(again, data.test) == evaluate(result.model, data.test)


def test_the_map_shows_the_channels_that_are_left_in_each_epoch(data):
    result = fit(network, data, AdaptivePruning(targets=[{"ratio": 0.3}]), **{**OPTIONS, "epochs": 4})
    table = result.layer_maps["adaptive-pruning: channels"].table
    assert (table[[1, 2]] == 100).all(axis=None)
    assert (table[3] == table[4]).all()
    left = norms(result.model)
    first = norms(network())
    assert len(table) == len(first)
    for path, norm in first.items():
        kept = left[path].num_features if path in left else 0
        assert table.loc[path, 4] == pytest.approx(100 * kept / norm.num_features)


@pytest.mark.parametrize("target", [{"ratio": 0.4}, {"parameters": 0.7}, {"parameters": 60_000}])
def test_one_threshold_for_all_layers_meets_the_target(data, target):
    job = ready(data, AdaptivePruning(targets=[target]))
    run, strategy = job.run, job.strategies[0]
    run.epoch = 2
    before = {name: norm.weight.detach().clone() for name, norm in norms(run.model).items()}
    strategy.on_epoch_start(run)
    first, last = strategy.stages
    left = {name: norm.weight.detach() for name, norm in norms(run.model).items()}
    gone = 1 - sum(map(len, left.values())) / sum(map(len, before.values()))
    if "ratio" in target:
        assert 0.4 <= gone < 0.45
    else:
        wanted = target["parameters"] if target["parameters"] > 1 else target["parameters"] * first["parameters"]
        assert 0.9 * wanted < last["parameters"] <= wanted
    assert last["threshold"] > 0.01
    assert "stage2.0.bn2" not in left
    # What is above the threshold is there, unless its branch is gone; what is below is gone where it can go alone.
    for name in ("stage1.0.bn2", "stage3.0.bn2", "stage3.0.bn1", "bn"):
        assert torch.equal(left[name], before[name][before[name] > last["threshold"]])


@pytest.mark.parametrize(("settings", "message"), [
    ({"targets": [{"ratio": 0.2, "parameters": 0.5}]}, "one goal"),
    ({"targets": [{"ratio": 1.5}]}, "out of range"),
    ({"targets": [{"speedup": 0.9}]}, "out of range"),
    ({"targets": [{"latency": 1.2}]}, "out of range"),
    ({"targets": [{"latency": 0}]}, "out of range"),
    ({"targets": [{"share": 0.9}]}, "targets"),
])
def test_targets_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(LayerlabError, match=message):
        AdaptivePruning(**settings)


def test_what_cannot_be_done_is_refused_before_training(data):
    with pytest.raises(LayerlabError, match="leave no epoch of 2 after the last"):
        Fit(network, data, AdaptivePruning(), epochs=2, **OPTIONS)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(LayerlabError, match="has neither"):
        Fit(plain, data, AdaptivePruning(), epochs=4, **OPTIONS)


class Shuffled(nn.Module):
    """Channels become pixels, which torch-pruning does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.norm2 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pixel_shuffle(torch.relu(self.norm1(self.conv1(x))), 2)
        return self.fc(torch.relu(self.norm2(self.conv2(x))).mean((2, 3)))


@pytest.mark.parametrize("build", [Shuffled, lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10)],
                         ids=["pixels", "shufflenet"])
def test_what_torch_pruning_cannot_follow_is_refused_in_a_sentence_before_training(data, build):
    with pytest.raises(Refused, match=r"(Shuffled|ShuffleNetV2) cannot be pruned: torch-pruning cannot follow .*; "):
        Fit(build, data, AdaptivePruning(targets=[{"ratio": 0.2}]), epochs=2, **OPTIONS)


def grouped(groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=groups),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(12, 10))


@pytest.mark.parametrize("groups", [2, 4])
def test_what_holds_for_groups_is_said_before_training(data, groups):
    example = torch.randn(4, 3, 8, 8)
    model = grouped(groups)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = AdaptivePruning().preflight(model, example)
    assert not found.left_out
    assert "Convolutions in groups (3) lose as many channels in every group" in found.notes[0]
    assert 0 < found.saves["parameters"] < 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert AdaptivePruning().preflight(grouped(16), example).notes == ()


@pytest.mark.parametrize("strategy", [AdaptivePruning(), NetworkSlimming(), TorchPruning(),
                                      TorchPruning(pruner="GroupNorm")], ids=["paper", "literal", "scale", "norm"])
def test_a_preflight_says_how_much_can_go_at_the_most(strategy):
    found = strategy.preflight(network(), torch.randn(4, 3, 8, 8))
    assert "stage1.0.bn2" in found.covered
    assert 0.3 < found.saves["parameters"] < 1


@pytest.mark.parametrize("build", [network, lambda: torchvision.models.resnet.ResNet(
    torchvision.models.resnet.BasicBlock, [2, 2, 1, 1], num_classes=10)], ids=["preact", "basic"])
def test_a_target_that_only_a_whole_block_passes_is_overshot_with_a_warning(data, build):
    job = Fit(build, data, AdaptivePruning(targets=[{"parameters": 0.97}]), epochs=2, **OPTIONS)
    job.train_epoch()
    run, strategy = job.run, job.strategies[0]
    block = "stage3.0" if build is network else "layer4.0"
    with torch.no_grad():
        for name, norm in norms(run.model).items():
            norm.weight.fill_(1.0)
            if name.startswith(block):
                norm.weight.fill_(0.5)  # all of a block at one threshold
    run.epoch = 2
    with pytest.warns(LayerlabWarning, match=r"parameters 0\.97 allows 97\.0% .*; \d\d\.\d% are left, and pruning "
                                             r"any less leaves 100\.0%, because whole layers, or a channel of every "
                                             r"group, go"):
        strategy.on_epoch_start(run)
    assert strategy.stages[1]["parameters"] < 0.9 * strategy.stages[0]["parameters"]


def test_the_numbers_that_a_gate_reads_are_logged(data):
    job = ready(data, AdaptivePruning(targets=[{"threshold": 0.05}]))
    with torch.no_grad():
        for norm in list(norms(job.run.model).values())[:2]:
            norm.weight[:3] = 0.001
        for name, norm in norms(job.run.model).items():
            if name.startswith("stage2.0"):
                norm.weight.fill_(1e-3)
    total = sum(len(norm.weight) for norm in norms(job.run.model).values())
    small = sum(int((norm.weight.abs() < 0.01).sum()) for norm in norms(job.run.model).values())
    job.train_epoch()
    row = job.finish().history[-1]
    assert row["adaptive-pruning/small_scales"] == pytest.approx(small / total)
    assert row["adaptive-pruning/blocks_removed"] == 1


@pytest.mark.parametrize("pruner", ["BNScale", "GroupNorm"])
def test_torch_prunings_own_pruners_meet_the_target_and_prune_the_trunk(data, tmp_path, pruner):
    options = dict(OPTIONS, epochs=3)
    strategy = TorchPruning(pruner=pruner, targets=[{"parameters": 0.6}], sparsity=0.01)
    result = fit(network, data, strategy, progress=False, **options)
    dense, pruned = result.strategies[0].stages
    assert 0.5 < pruned["parameters"] / dense["parameters"] <= 0.6
    assert result.model.get_submodule("stage1.0.conv3").out_channels < 64
    first = Fit(network, data, strategy, checkpoint=tmp_path, **options)
    first.train_epoch()
    again = fit(network, data, strategy, checkpoint=tmp_path, progress=False, **options)
    states = result.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    with pytest.raises(Refused, match="has no threshold of its own"):
        Fit(network, data, TorchPruning(pruner=pruner, targets=[{"threshold": 0.1}]), epochs=2, **OPTIONS)


def test_network_slimming_has_one_threshold_and_keeps_the_trunk_and_every_layer(data):
    job = ready(data, NetworkSlimming(targets=[{"threshold": 0.5}]))
    before = {name: norm.weight.detach().clone() for name, norm in norms(job.run.model).items()}
    job.run.epoch = 2
    job.strategies[0].on_epoch_start(job.run)
    left = {name: norm.weight.detach() for name, norm in norms(job.run.model).items()}
    assert left.keys() == before.keys()
    for name, weight in before.items():
        kept = weight[weight > 0.5] if (weight > 0.5).any() else weight[weight.argmax()][None]
        assert torch.equal(left[name], kept), name
    assert job.run.model.get_submodule("stage2.0.conv3").out_channels == 128


def test_a_target_out_of_reach_leaves_the_network_as_it_is_and_training_goes_on(data):
    with pytest.raises(OutOfReach, match=r"out of reach: at the least, the network has 40\.0%"):
        search(lambda level: 1 - level, [0.0, 0.3, 0.6], 0.2, "ratio 0.8", "channels")
    with pytest.warns(LayerlabWarning, match=r"parameters 0\.0001 is out of reach.*stays as it is at this pruning"):
        result = fit(network, data, AdaptivePruning(targets=[{"ratio": 0.2}, {"parameters": 1e-4}], every=1), epochs=3,
                     progress=False, **OPTIONS)
    dense, pruned, left = (stage["parameters"] for stage in result.strategies[0].stages)
    assert left == pruned < dense
    assert [row["epoch"] for row in result.history] == [1, 2, 3]


def test_without_batch_norms_a_convolution_of_one_channel_is_bridged(data):
    plain = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    result = fit(plain, data, AdaptivePruning(targets=[{"threshold": 0.0}]), epochs=2, progress=False, **OPTIONS)
    (conv,) = [module for module in result.model.modules() if isinstance(module, nn.Conv2d)]
    assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (3, 8, (1, 1))


@pytest.mark.parametrize("build", [network, lambda: build_model("resnet-cifar", depth=8)], ids=["preact", "basic"])
def test_the_placebo_leaves_as_many_channels_but_others(data, build):
    options = dict(OPTIONS, epochs=3, progress=False)
    shrinking = AdaptivePruning(targets=[{"ratio": 0.2}, {"ratio": 0.35}], sparsity=0.05)
    result = fit(build, data, shrinking, **options)
    (strategy,) = result.strategies
    placebo = fit(build, data, strategy.placebo(result), **options)
    assert [stage["channels"] for stage in placebo.strategies[0].stages] == [
        stage["channels"] for stage in strategy.stages]
    assert placebo.strategies[0].stages[-1]["parameters"] == strategy.stages[-1]["parameters"]
    assert placebo.total("cost/forward_flops") == result.total("cost/forward_flops")
    assert placebo.history[0]["train/loss"] == result.history[0]["train/loss"]
    assert placebo.history[1]["train/loss"] != result.history[1]["train/loss"]


# ------------------------------------------------------------------------------- a target in latency


class Clock:
    """A clock that only `Ticking` moves."""

    now = 0.0
    batches: ClassVar[set[int]] = set()


class Ticking(nn.Module):
    """Takes as long as its input has numbers: it moves the clock and passes its input on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Clock.now += x.numel()
        if not self.training:
            Clock.batches.add(len(x))
        return x * 1.0


def timed() -> nn.Module:
    """Two convolutions, the time of each as long as its output; their scales are of all sizes."""
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), Ticking(), nn.Conv2d(40, 40, 1),
                          nn.BatchNorm2d(40), nn.ReLU(), Ticking(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(40, 10))
    with torch.no_grad():
        for norm in norms(model).values():
            norm.weight.copy_(0.1 + 0.9 * torch.rand(40))
    return model


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: Clock.now)
    # It moves without work, which no process does that runs.
    monkeypatch.setattr("layerlab.measure.running.LONGEST", math.inf)
    Clock.batches.clear()
    return Clock


@pytest.mark.parametrize("kind", [AdaptivePruning, NetworkSlimming])
@pytest.mark.parametrize(("target", "limit"), [({"latency": 0.55}, 0.55), ({"speedup": 2.5}, 0.4)])
def test_a_target_in_latency_is_met_at_the_batch_that_the_user_names(data, clock, kind, target, limit):
    job = Fit(timed, data, kind(targets=[target], speed_batch=7), epochs=2, **OPTIONS)
    job.train_epoch()
    before = {name: norm.weight.detach().clone() for name, norm in norms(job.run.model).items()}
    job.run.epoch = 2
    clock.batches.clear()
    job.strategies[0].on_epoch_start(job.run)
    stage = job.strategies[0].stages[1]
    left = {name: norm.weight.detach() for name, norm in norms(job.run.model).items()}
    share = sum(map(len, left.values())) / 80  # both outputs have as many pixels
    assert limit - 0.03 < share <= limit
    assert stage["latency"] == pytest.approx(share)
    assert 7 in clock.batches
    # Which channels go is still decided by one threshold for all layers.
    assert all(torch.equal(left[name], weight[weight.abs() > stage["threshold"]]) for name, weight in before.items())


def test_a_latency_is_written_into_the_history_and_out_of_reach_is_one_sentence(data, clock):
    strategy = AdaptivePruning(targets=[{"latency": 0.7}, {"latency": 0.001}], every=1)
    said = (r"latency 0\.001 at batch 1 is out of reach: at the least, the network has \d\.\d% of the first one's "
            r"latency, and 0\.1% is wanted; ask for less, or .* wider network\. It stays as it is at this pruning")
    with pytest.warns(LayerlabWarning, match=said):
        result = fit(timed, data, strategy, epochs=3, progress=False, **OPTIONS)
    dense, pruned, left = result.strategies[0].stages
    assert 0.65 < pruned["latency"] <= 0.7
    assert dense["latency"] is left["latency"] is None
    assert left["parameters"] == pruned["parameters"] < dense["parameters"]
    assert result.history[1]["adaptive-pruning/latency"] == pruned["latency"]


class Lucky(AdaptivePruning):
    """Measures too little while it searches, as a single measurement among many does, and right in the end."""

    name: ClassVar[str] = "lucky"

    def latency(self, network: nn.Module, run: Run, rounds: int = ROUNDS) -> float:
        right = count(network) / self.stages[0]["parameters"]
        return right if rounds > ROUNDS else 0.8 * right


def test_a_latency_that_was_met_by_luck_is_measured_again_and_more_goes_until_it_holds(data):
    job = ready(data, Lucky(targets=[{"latency": 0.6}]))
    job.run.epoch = 2
    job.strategies[0].on_epoch_start(job.run)
    share = count(job.run.model) / count(network())
    assert 0.5 < share <= 0.6
    assert job.strategies[0].stages[1]["latency"] == pytest.approx(share)


class Slow(Lucky):
    """Within its limit as long as it searches, and never when it is measured again."""

    name: ClassVar[str] = "slow"

    def latency(self, network: nn.Module, run: Run, rounds: int = ROUNDS) -> float:
        return 0.75 if rounds > ROUNDS else super().latency(network, run, rounds)


def test_a_latency_that_no_second_measurement_confirms_is_out_of_reach(data):
    job = ready(data, Slow(targets=[{"latency": 0.6}]))
    job.run.epoch = 2
    with pytest.warns(LayerlabWarning, match=r"slow: latency 0\.6 at batch 1 is out of reach: .* has 75\.0% of"):
        job.strategies[0].on_epoch_start(job.run)
    dense, left = job.strategies[0].stages
    assert left["parameters"] == dense["parameters"]
    assert left["latency"] is None
