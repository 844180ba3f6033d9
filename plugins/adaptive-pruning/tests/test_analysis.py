"""What the notebook computes from its runs: the choice of λ, and the claims."""

from __future__ import annotations

from functools import partial

import pandas as pd
import pytest
import torch

from layerlab import compare, evaluate, load_dataset
from layerlab_adaptive_pruning import analysis
from layerlab_adaptive_pruning.analysis import BASELINE, OURS, PEER
from layerlab_adaptive_pruning.method import outcome


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", image_size=8, channels=3, limit=128, test_limit=64, device="cpu")


def test_both_methods_take_the_dose_with_which_they_are_best_after_the_pruning(data):
    network = partial(analysis.residual_network, data.classes, 3, 11, 0.5)
    doses = {0.2: 0.01, 0.6: 0.1}
    tried = compare(network, data.held_out(), analysis.candidates(doses, 0.8, 1, "zero"), seeds=[7],
                    epochs=2, batch_size=32, lr=0.05, progress=False)
    reached = {(OURS, 0.01): 0.3, (OURS, 0.1): 0.4, (PEER, 0.01): 0.5, (PEER, 0.1): 0.2}  # 0.1 is best for one
    for (name, _), run in tried.results.items():
        (strategy,) = run.strategies
        arm = OURS if strategy.name == "adaptive-pruning" else PEER
        assert name == f"{arm}, dose {0.2 if strategy.sparsity == 0.01 else 0.6}"
        run.history[0]["test/top1"] = 1 - reached[arm, strategy.sparsity]  # before the pruning: does not count
        run.history[1]["test/top1"] = reached[arm, strategy.sparsity]
        strategy.stages[1]["small"] = strategy.sparsity
    table, chosen = analysis.dose_choice(tried)
    assert chosen == 0.2
    assert table.loc[table["chosen"], "top-1 pruned [%]"].tolist() == pytest.approx([30, 50])
    assert table.loc[table["chosen"], "top-1 dense [%]"].tolist() == pytest.approx([70, 50])
    assert table.loc[table["chosen"], "small scales [%]"].tolist() == pytest.approx([1, 1])
    arms = analysis.arms([0.8], 1, 0.01, "merge", ["GroupNorm"])
    assert (arms[OURS].sparsity, arms[OURS].bridge, arms[PEER].sparsity) == (0.01, "merge", 0.01)
    assert arms["torch-pruning's GroupNorm"].pruner == "GroupNorm"


def test_the_penalty_follows_from_the_dose_and_is_what_the_steps_add_up_to():
    # Four epochs of 10 steps at rates 0.1, 0.1, 0.01, 0.001: Σ = 2.11.
    assert analysis.penalty(0.422, 4, 0.1, 10) == pytest.approx(0.02)
    weight = torch.nn.Parameter(torch.tensor([5.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.5)
    schedule = analysis.Restarts(8)(optimizer)
    for _ in range(8):
        for _ in range(200):
            weight.grad = torch.full_like(weight, analysis.penalty(0.3, 8, 0.1, 200, momentum=0.5))
            optimizer.step()
        schedule.step()
    assert 5 - weight.item() == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize(("stage", "factor"), [(8, 0.5), (4, 2.5)])
def test_the_schedule_of_a_shorter_training_has_as_many_stages(stage, factor):
    rates = {}
    for schedule, calls in ((analysis.Restarts(stage), 2 * stage),
                            (analysis.Restarts(stage).stretched(factor), round(2 * stage * factor))):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        stepped = schedule(optimizer)
        rates[calls] = []
        for _ in range(calls):
            rates[calls].append(round(stepped.get_last_lr()[0], 6))
            optimizer.step()
            stepped.step()
    for calls, found in rates.items():
        assert found[: calls // 2] == found[calls // 2 :]
        assert [found.count(rate) / calls for rate in (0.1, 0.01, 0.001)] == pytest.approx([0.5, 0.25, 0.25], abs=0.11)


def test_a_gate_reads_small_scales_blocks_removed_and_the_accuracy_on_training_images(data):
    network = partial(analysis.residual_network, data.classes, 3, 11, 0.5)
    run = compare(network, data, analysis.arms([0.9, 0.8], 1, 0.001, "zero"), seeds=[0, 1], epochs=3, batch_size=32,
                  lr=0.05, progress=False)
    for seed, small in ((0, 0.1), (1, 0.3)):
        (strategy,) = run.results[OURS, seed].strategies
        first, last = strategy.stages[1:]
        first["small"] = small
        # A block with the first seed by the end, two with the second, one of them at once.
        last["channels"] |= {path: 0 for path in last["channels"] if path.startswith("stage2.0")}
        if seed:
            first["channels"] |= {path: 0 for path in first["channels"] if path.startswith("stage2.0")}
            last["channels"] |= {path: 0 for path in last["channels"] if path.startswith("stage1.0")}
    read = analysis.gate_numbers(run, [1], data)[1]
    trained = [100 * evaluate(each.model, data.train)["test/top1"] for each in run.of(BASELINE)]
    wanted = {"small scales": 20, "removed blocks": 0.5, "removed blocks in the end": 1.5,
              "baseline train top-1": sum(trained) / 2}
    assert read == pytest.approx(wanted, abs=0.01)


def test_each_bridge_takes_the_weakest_layer_and_leaves_the_trained_network_alone(data):
    torch.manual_seed(0)
    network = analysis.residual_network(10, 3, 11, 0.5).eval()
    torch.nn.init.constant_(network.get_submodule("stage2.0.bn2").weight, 0.1)
    example = next(data.test.batches(4))[0]
    before = network(example)
    found = outcome.bridged(network, example)
    assert torch.equal(network(example), before)
    assert sorted(found) == ["merge", "random", "relu", "zero"]
    outputs = [model.eval()(example) for model in found.values()]
    assert all(not torch.allclose(a, b) for number, a in enumerate(outputs) for b in outputs[:number])
    assert not any(name.startswith("stage2.0.conv") for name, _ in found["zero"].named_parameters())
    assert all(model.get_submodule("stage2.0.conv2").kernel_size == (1, 1) for name, model in found.items()
               if name != "zero")


def test_accuracy_turns_down_where_it_was_best():
    table = pd.DataFrame([{"arm": arm, "seed": 0, "top-1": top, "parameters": left} for arm, tops in (
        (OURS, (0.5, 0.6, 0.4)), (PEER, (0.7, 0.6, 0.5))) for top, left in zip(tops, (100, 80, 50), strict=True)])
    found = analysis.inflections(table, 100)
    assert found["parameters left [%]"].to_dict() == {OURS: "80.00", PEER: "100.0"}
    assert found["top-1 [%]"].to_dict() == {OURS: "60.00", PEER: "70.00"}


def measured(labels: list[str]) -> pd.DataFrame:
    """Two seeds; by stage s: 50 + s, 52 + s and 51 + s %, and 1, s + 1 and 2 times as fast."""
    return pd.DataFrame([
        {"arm": arm, "seed": seed, "stage": stage, "top-1": (first + stage) / 100, "megabytes": size,
         "parameters": 1000 * size, "batch 1 ×": speed, "batch 128 ×": 2 * speed}
        for stage in range(len(labels)) for seed in (0, 1)
        for arm, first, size, speed in ((BASELINE, 50, 8.0, 1.0), (OURS, 52, 8.0 / (stage + 1), stage + 1.0),
                                        (PEER, 51, 8.0, 2.0))
    ])


def test_claims_are_of_the_papers_shares_wherever_these_stand():
    labels = analysis.stage_labels([0.9, 0.845, 0.646, 0.558, 0.25])
    assert labels == ["dense", "90% left", "84.5% left", "64.6% left", "55.8% left", "25% left"]
    values = analysis.claim_values(measured(labels), labels, [1, 128])
    assert {name: value.values[0] for name, (value, _) in values.items()} == pytest.approx({
        "gain-40": 2, "peer-40": 1, "gain-60": 2, "peer-60": 1, "gain-most": 2, "size": 1 / 5,
        "speed-1": 5, "peer-speed-1": 2.5, "speed-128": 10, "peer-speed-128": 2.5})
    assert all(len(value.values) == 2 for value, _ in values.values())
    assert {name: stage for name, (_, stage) in values.items()} | {"gain-40": 2, "gain-60": 3} == {
        name: 2 if name.endswith("40") else 3 if name.endswith("60") else 4 for name in values}
    others = analysis.stage_labels([0.7, 0.4, 0.2])
    assert analysis.claim_values(measured(others), others, [1, 128]) == {}
    assert "speed-1" not in analysis.claim_values(measured(labels), labels, [128])
    assert analysis.comparison_line(measured(labels), 5, "25% left", [1]) == (
        "25% left, 1,333 against 8,000 parameters: 1.000 points against network slimming, 3.000 × as fast at batch 1")


def test_removing_dead_channels_from_known_networks_changes_nothing_and_none_may_be_asked_for():
    table = outcome.exactness(["resnet18"])
    assert table.loc["resnet18", "difference"] < 1e-5
    assert table.loc["resnet18", "left"] < 0.8 * table.loc["resnet18", "parameters"]
    assert outcome.exactness([]).empty
