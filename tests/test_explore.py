"""Strategies on one's own network: arms, networks by name, who is left out, Pareto fronts, advice, saved models."""

from __future__ import annotations

import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from helpers import Freezer, same_weights, slow
from torch import nn

from layerlab import (
    Comparison,
    FitResult,
    LayerlabError,
    Strategy,
    compare,
    evaluate,
    explore,
    fit,
    load_model,
    save_model,
    strategies,
)
from layerlab.runs.tracking.store import client, experiment_id
from layerlab.training.settings import Settings
from layerlab.workload.builders import network_builder

QUICK = dict(epochs=2, batch_size=256, progress=False)


# ---------------------------------------------------------------------------------------------- networks


def test_a_network_by_name_gets_what_it_takes_of_the_data():
    assert network_builder("resnet-cifar", 7, (1, 8, 8), depth=8)()(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    assert network_builder("mlp", 7, (3, 16, 16), width=8)()(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    assert network_builder("resnet18", 7, (3, 32, 32))()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


OWN = """
    from torch import nn
    from beside_my_network import WIDTH
    def build(num_classes, image_size, width=WIDTH):
        return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, width), nn.ReLU(), nn.Linear(width, num_classes))
    def wrong(num_classes):
        return nn.Linear(num_classes, "ten")
    class Network(nn.Linear):
        def __init__(self, **options):
            super().__init__(options["channels"], options["num_classes"])
    ready = nn.Linear(2, 2)
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    file = tmp_path / "my_network.py"
    file.write_text(textwrap.dedent(OWN))
    (tmp_path / "beside_my_network.py").write_text("WIDTH = 4")
    return file


def test_a_network_of_ones_own_gets_what_it_takes(own):
    build = network_builder(f"{own}:build", 7, (1, 8, 8), width=5)
    assert build()(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    assert build()[1].out_features == 5
    network = network_builder(f"{own}:Network", 7, (3, 8, 8))()
    assert (network.in_features, network.out_features) == (3, 7)
    first, second = (network_builder(f"{own}:ready", 7, (3, 8, 8))() for _ in range(2))
    assert first is not second
    # What was edited counts.
    own.write_text(own.read_text().replace("width=WIDTH", "width=6"))
    assert network_builder(f"{own}:build", 7, (1, 8, 8))()[1].out_features == 6


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("resnet-cifr", r"Unknown network 'resnet-cifr'. Did you mean 'resnet-cifar'\?"),
        ("{file}:biuld", r"Unknown network in .*my_network.py 'biuld'. Did you mean 'build'\? Known: Network, build"),
        ("no_such_file.py:build", r"there is no file .*no_such_file.py; check the path"),
        ("no_such_module:build", r"there is no module 'no_such_module' in .*path/to/no_such_module.py:build"),
        ("{folder}/broken.py:build", r"broken.py does not import \(ZeroDivisionError"),
        ("{file}:wrong", r"cannot be built: TypeError"),
    ],
)
def test_a_network_that_is_written_wrong_gets_one_sentence(own, network, message):
    (own.parent / "broken.py").write_text("1 / 0")
    with pytest.raises(LayerlabError, match=message):
        network_builder(network.format(file=own, folder=own.parent), 7, (1, 8, 8))()


def test_images_get_the_channels_that_the_network_takes():
    assert explore.load_images("digits", "resnet18", limit=20).shape == (3, 8, 8)
    assert explore.load_images("digits", "resnet-cifar", limit=20).shape == (1, 8, 8)
    assert explore.load_images("digits", "mine.py:build", limit=20, channels=3, augment="crop").train.augment == "crop"


# ---------------------------------------------------------------------------------------------- arms


@pytest.fixture
def third_party(fake, monkeypatch):
    """An installed strategy of someone else's whose module does not import."""
    site = fake()
    (site / "fake_plugin" / "__init__.py").write_text("import no_such_library")
    import layerlab

    layerlab.strategies.refresh()


def test_all_installed_strategies_are_arms_and_a_broken_one_has_its_reason(third_party):
    arms = explore.make_arms()
    assert {"lars-skip", "low-bit", "memory-reorder"} <= arms.chosen.keys()
    assert arms.refused.keys() == {"fake"}
    assert "no_such_library" in arms.refused["fake"]
    # Asked for by name it is a mistake of whoever wrote that.
    with pytest.raises(LayerlabError, match="'fake' of distribution 'fake-plugin' is broken"):
        explore.make_arms(["fake"])


def test_combinations_with_the_settings_of_their_parts_or_their_own():
    arms = explore.make_arms("lars-skip", ["lars-skip+ low-bit"], {"lars-skip": {"alpha": 8}})
    assert list(arms.chosen) == ["lars-skip", "lars-skip + low-bit"]
    assert [each.name for each in arms.chosen["lars-skip + low-bit"]] == ["lars-skip", "low-bit"]
    assert [each[0].alpha for each in arms.chosen.values()] == [8, 8]
    own = explore.make_arms([], {"gentle": {"lars-skip": {"alpha": 4}, "low-bit": {"bits": 6}}},
                            {"lars-skip": {"alpha": 8}})
    (gentle,) = own.chosen.values()
    assert (gentle[0].alpha, gentle[1].bits) == (4, 6)
    refused = explore.make_arms([], ["memory-reorder + network-with-subnetworks"]).refused
    assert "both replace the training step" in refused["memory-reorder + network-with-subnetworks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["lars-skp"],), r"Unknown strategy 'lars-skp'. Did you mean 'lars-skip'\?"),
        (([], ["lars-skip + low-bti"]), r"Unknown strategy 'low-bti'. Did you mean 'low-bit'\?"),
        (([], ["lars-skip"]), "Combination 'lars-skip' is none; join two"),
        (([], ["lars-skip +"]), "is none; join two"),
        (([], {"x": "lars-skip"}), "Combination 'x' lists no strategies"),
        (("all", [], {"lars-skp": {}}), "Unknown strategy 'lars-skp'"),
        (("all", [], {"lars-skip": {"alhpa": 1}}), "lars-skip has no setting 'alhpa'"),
        ((["lars-skip"], {"lars-skip": {"low-bit": {}}}), "Two arms are called 'lars-skip'"),
    ],
)
def test_what_is_written_wrong_gets_one_sentence(arguments, message):
    with pytest.raises(LayerlabError, match=message):
        explore.make_arms(*arguments)


# ---------------------------------------------------------------------------------------------- who fails


class Refuses(Strategy):
    name: ClassVar[str] = "refuses"

    def on_fit_start(self, run) -> None:
        raise LayerlabError("refuses needs another network.")


class Breaks(Strategy):
    name: ClassVar[str] = "breaks"
    seed: int = 0
    epoch: int = 2
    error: str = "ValueError"

    def on_epoch_start(self, run) -> None:
        if run.epoch == self.epoch and run.generator.initial_seed() == self.seed:
            raise {"ValueError": ValueError, "SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt}[
                self.error]("broke\nhere")


def test_who_refuses_or_breaks_is_left_out_and_changes_nothing_for_the_others(digits, residual):
    arms = {"plain": (), "refuses": Refuses(), "breaks": Breaks(), "leaves": Breaks(error="SystemExit"),
            "late": Breaks(seed=1, epoch=1), "frozen": Freezer()}
    runs = compare(residual, digits, arms, seeds=[0, 1], keep_going=list(arms)[1:], **QUICK)
    assert runs.arms == ["plain", "frozen"]
    assert runs.seeds == [0, 1]
    assert runs.failures == {
        "refuses": "refuses needs another network.", "breaks": "ValueError: broke here",
        "leaves": "SystemExit: broke here", "late": "ValueError: broke here",
    }
    alone = compare(residual, digits, {"plain": (), "frozen": Freezer()}, seeds=[0, 1], **QUICK)
    for key, result in alone.results.items():
        assert same_weights(result.model, runs.results[key].model)


def test_without_that_wish_and_by_the_users_own_hand_the_comparison_ends(digits, residual):
    with pytest.raises(ValueError, match="broke"):
        compare(residual, digits, {"plain": (), "breaks": Breaks()}, keep_going=["plain"], **QUICK)
    with pytest.raises(KeyboardInterrupt):
        compare(residual, digits, {"breaks": Breaks(error="KeyboardInterrupt")}, keep_going=["breaks"], **QUICK)


def test_a_survey_lists_all_that_was_left_out_and_goes_on_where_it_was_stopped(digits, residual):
    arms = explore.Arms({"breaks": (Breaks(),), "frozen": (Freezer(),)}, {"gone": "it is broken"})

    def once(**settings: Any) -> tuple[Any, Any]:
        session = explore.open_session("compare", digits, "residual", epochs=2)
        return session, explore.survey(session, residual, digits, arms, seeds=[0], **QUICK | settings)

    session, runs = once()
    assert runs.failures == {"breaks": "ValueError: broke here", "gone": "it is broken"}
    found = client().search_runs([experiment_id("compare")])
    assert {run.data.tags.get("arm"): run.info.status for run in found} == {
        None: "RUNNING", "baseline": "FINISHED", "frozen": "FINISHED", "frozen · equal flops": "FINISHED",
        "breaks": "FAILED"}
    # Not closed, so it is taken up again: nothing is trained a second time, and the runs are the same.
    again, same = once()
    assert (again.folder, again.run_id) == (session.folder, session.run_id)
    assert [row["timestamp"] for row in same.results["baseline", 0].history] == [
        row["timestamp"] for row in runs.results["baseline", 0].history]
    assert len(client().search_runs([experiment_id("compare")])) == len(found)
    again.close()
    assert client().get_run(again.run_id).info.status == "FINISHED"
    anew, _ = once()
    assert anew.run_id != session.run_id
    with pytest.raises(LayerlabError, match="batch_size 1000000 is larger"):
        once(batch_size=10**6)


def test_another_parameter_is_another_folder_and_edited_code_begins_anew(digits, own):
    network = f"{own}:build"
    first = explore.open_session("explore", digits, network, epochs=2)
    same = explore.open_session("explore", digits, network, epochs=2)
    assert (same.folder, same.attempt) == (first.folder, first.attempt)
    assert explore.open_session("explore", digits, network, epochs=3).folder != first.folder
    own.write_text(own.read_text().replace("width=WIDTH", "width=6"))
    edited = explore.open_session("explore", digits, network, epochs=2)
    assert edited.folder == first.folder
    assert edited.attempt != first.attempt


# ---------------------------------------------------------------------------------------------- what numbers say


def _comparison(arms: dict[str, dict[str, list[float]]]) -> Comparison:
    """Arm → top1 in per cent, seconds, flops, bytes: a value a seed; what is left out is 90 %, 10 s, 1e9, 1e6.

    An arm called `x · equal` is plain training of x's cost; `before` is top1 after the first of two epochs.
    """
    results = {}
    for arm, values in arms.items():
        count = max(len(each) for each in values.values())
        for seed in range(count):
            def value(name: str, default: float, values=values, seed=seed) -> float:
                return values[name][seed] if name in values else default

            row = {"timestamp": 0, "train/loss": 1.0, "test/loss": 1.0,
                   "test/top1": value("top1", 90) / 100, "test/top5": 1.0,
                   "time/epoch_seconds": value("seconds", 10) / 2, "cost/forward_flops": 0.0,
                   "cost/backward_flops": value("flops", 1e9) / 2, "cost/bytes_moved": 1.0,
                   "cost/peak_memory_bytes": value("bytes", 1e6)}
            if "validation" in values:
                row["validation/top1"] = value("validation", 0) / 100
            first = row | {"epoch": 1, "test/top1": value("before", 100 * row["test/top1"]) / 100}
            results[arm, seed] = FitResult(nn.Linear(1, 1), [first, row | {"epoch": 2}], seed, arm, (), Settings(),
                                           steps=100, chance=0.1)
    equal = {arm.removesuffix(" · equal"): arm for arm in arms if arm.endswith(" · equal")}
    return Comparison(results, {}, "baseline", equal)


PLAIN = {"top1": [90.0, 91.0, 92.0], "seconds": [10.0, 11.0, 12.0]}
WORSE = {"top1": [88.0, 89.1, 90.0]}


def test_against_the_baseline_seed_by_seed():
    runs = _comparison({"baseline": PLAIN, "mine": {"top1": [91.0, 92.0, 93.0], "seconds": [5.0, 5.5, 6.0]}})
    runs.failures["other"] = "it broke"
    frame = explore.against(runs).set_index("arm")
    mine = frame.loc["mine"]
    # The seeds differ by two points, the differences by none: that is what pairing is for.
    assert mine["top-1"] == pytest.approx(1.0)
    assert mine["top-1 ±"] == pytest.approx(0.0, abs=1e-9)
    assert (mine["seconds"], mine["TFLOP"]) == (pytest.approx(0.5), pytest.approx(1.0))
    assert frame.loc["other", "left out"] == "it broke"
    text = explore.against_table(runs).text(120)
    assert "+1.000" in text
    assert "left out: it broke" in text


def test_the_pareto_front_on_a_worked_example():
    frame = pd.DataFrame({"arm": list("abcdefg"), "cost": [1, 2, 3, 2, 1, 4, math.nan],
                          "top-1": [0.5, 0.7, 0.9, 0.6, 0.5, 0.9, 1.0]})
    # d costs as much as b and reaches less, f reaches as much as c and costs more, e is a's equal, g has no cost.
    assert explore.pareto_front(frame, "cost", "top-1") == ["a", "b", "c", "e"]


def test_one_seed_tells_nothing_apart():
    runs = _comparison({"baseline": {"top1": [90.0]}, "mine": {"top1": [99.0], "seconds": [1.0]}})
    advice = explore.advise(runs)
    assert not any(advice.choices.values())
    assert "Nothing can be told apart" in str(advice)
    assert "seeds=[0, 1, 2]" in str(advice)


def test_overlapping_intervals_tell_nothing_apart():
    runs = _comparison({"baseline": PLAIN, "mine": {"top1": [95.0, 90.0, 92.0], "seconds": [4.0, 12.0, 9.0]}})
    advice = explore.advise(runs)
    assert not any(advice.choices.values())
    assert advice.sentences[0].startswith("Stay with the baseline")


def test_a_clear_saving_at_a_kept_accuracy_is_recommended_with_its_numbers_and_its_price():
    runs = _comparison({
        "baseline": PLAIN,
        "fast": {"top1": [89.9, 91.0, 92.1], "seconds": [5.0, 5.5, 6.1], "bytes": [3e6, 3e6, 3e6]},
        "faster": {"top1": [80.0, 81.1, 82.0], "seconds": [1.0, 1.1, 1.2]},
        "good": {"top1": [92.0, 93.1, 94.0], "seconds": [10.1, 11.0, 12.2]},
        "fast · equal": {"top1": [87.0, 88.1, 89.0]}, "faster · equal": {"top1": [77.0, 78.1, 79.0]},
    })
    advice = explore.advise(runs)
    assert advice.choices == {"accuracy": ("good",), "time": ("fast",), "compute": (), "memory": ()}
    assert advice.sentences[0].startswith("Use good for accuracy; fast for less time.")
    text = str(advice)
    assert re.search(r"fast \(0\.50\d ± 0\.0\d+ of the baseline's at \S+ ± \S+ points of top-1, for 3\.000 times the "
                     r"memory\)", text)
    assert "Measurably less accurate than the baseline: faster (-9.97 ± 0.14 points)" in text
    assert "Use" in advice._repr_html_()
    # Who may lose more may go faster.
    assert explore.advise(runs, tolerance=15).choices["time"] == ("faster",)


def test_what_is_not_told_apart_is_named_together():
    runs = _comparison({"baseline": PLAIN, "a": {"top1": [90.1, 91.0, 92.0], "seconds": [5.0, 5.6, 6.0]},
                        "b": {"top1": [90.0, 91.1, 92.0], "seconds": [5.1, 5.4, 6.1]},
                        "c": {"top1": [90.0, 91.0, 92.1], "seconds": [8.0, 8.8, 9.5]},
                        "a · equal": WORSE, "b · equal": WORSE, "c · equal": WORSE})
    advice = explore.advise(runs)
    assert set(advice.choices["time"]) == {"a", "b"}
    assert "which the numbers do not tell apart" in str(advice)


def test_a_saving_whose_loss_is_not_excluded_is_not_recommended():
    runs = _comparison({"baseline": PLAIN, "fast": {"top1": [90.0, 88.0, 92.0], "seconds": [5.0, 5.5, 6.1]}})
    advice = explore.advise(runs)
    assert advice.choices["time"] == ()
    assert "but a loss of more than 1 point of top-1 is not excluded" in str(advice)


def test_some_per_cent_are_no_saving_and_one_test_image_no_difference():
    runs = _comparison({"baseline": PLAIN, "mine": {"top1": [90.2, 91.2, 92.2], "seconds": [9.7, 10.7, 11.7]}})
    assert explore.advise(runs).choices["accuracy"] == ("mine",)
    advice = explore.advise(runs, test_images=300)
    assert not any(advice.choices.values())


FAST = {"top1": [89.9, 91.0, 92.1], "seconds": [5.0, 5.5, 6.1], "flops": [5e8, 5e8, 5e8]}


@pytest.mark.parametrize(("equal", "why"), [
    ({}, "but it was not compared with plain training of the same cost, equal='flops'"),
    ({"fast · equal": {"top1": [91.0, 92.1, 93.0]}},
     "plain training of the same cost is not beaten, pays: no (−1.03 ± 0.29 points against training 100 % as long)"),
    ({"fast · equal": {"top1": [89.0, 92.0, 92.0]}}, "is not beaten, pays: undecided"),
])
def test_a_saving_that_training_less_gives_too_is_not_recommended(equal, why):
    advice = explore.advise(_comparison({"baseline": PLAIN, "fast": FAST, **equal}))
    assert not any(advice.choices.values())
    assert str(advice).count(why) == 2  # for time and for compute
    beaten = explore.advise(_comparison({"baseline": PLAIN, "fast": FAST, "fast · equal": WORSE}))
    assert beaten.choices["time"] == beaten.choices["compute"] == ("fast",)


def test_memory_is_not_saved_by_training_less_so_that_nothing_has_to_be_beaten():
    small = {"top1": [90.0, 91.1, 92.0], "bytes": [5e5, 5e5, 5e5]}
    assert explore.advise(_comparison({"baseline": PLAIN, "small": small})).choices["memory"] == ("small",)


def test_accuracy_that_takes_longer_has_to_beat_training_longer():
    long = {"top1": [92.0, 93.1, 94.0], "flops": [2e9, 2e9, 2e9]}
    runs = _comparison({"baseline": PLAIN, "long": long, "long · equal": {"top1": [92.0, 93.2, 94.1]}})
    assert explore.advise(runs).choices["accuracy"] == ()
    assert "long (+2.03 ± 0.14 points; but plain training of the same cost is not beaten" in str(explore.advise(runs))
    runs = _comparison({"baseline": PLAIN, "long": long, "long · equal": PLAIN})
    assert explore.advise(runs).choices["accuracy"] == ("long",)


def test_of_many_arms_one_that_seems_better_may_be_so_by_chance():
    # Alone: t = 0.5 / (0.173 / √3) = 5.0, p = 0.038 with two degrees of freedom.
    lucky = {"top1": [90.3, 91.6, 92.6]}
    assert explore.advise(_comparison({"baseline": PLAIN, "lucky": lucky})).choices["accuracy"] == ("lucky",)
    others = {f"other {number}": {"top1": [90.1, 90.7, 92.1]} for number in range(4)}
    advice = explore.advise(_comparison({"baseline": PLAIN, "lucky": lucky, **others}))
    assert advice.choices["accuracy"] == ()
    assert "lucky (+0.50 ± 0.43 points; but among 5 strategies and with 3 seeds that may be chance)" in str(advice)


def test_a_baseline_at_chance_recommends_nothing():
    chance = {"top1": [9.0, 11.0, 12.0]}
    runs = _comparison({"baseline": chance, "fast": {**FAST, **chance}, "fast · equal": {"top1": [1.0, 3.0, 4.0]}})
    assert "Nothing can be recommended: the baseline is at chance, with 10.7 ± 3.8 %" in str(explore.advise(runs))


def test_a_baseline_that_still_rises_recommends_nothing():
    rising = {**PLAIN, "before": [88.0, 90.0, 91.0]}
    runs = _comparison({"baseline": rising, "fast": FAST, "fast · equal": WORSE})
    assert "the baseline is still rising, by 1.3 points of top-1 in its last epoch" in str(explore.advise(runs))
    assert explore.advise(runs, tolerance=1.5).choices["time"] == ("fast",)


def test_a_strategy_that_never_acted_is_named_and_left_out():
    runs = _comparison({"baseline": PLAIN, "idle": PLAIN | {"seconds": [5.0, 5.6, 6.0]}, "idle · equal": WORSE})
    advice = explore.advise(runs)
    assert not any(advice.choices.values())
    assert "idle never acted: its history and its costs are the baseline's." in str(advice)


def test_validation_chooses_and_test_reports():
    plain = PLAIN | {"validation": [80.0, 81.0, 82.0]}
    better = {"top1": [88.0, 89.1, 90.0], "validation": [85.0, 86.1, 87.0]}
    advice = explore.advise(_comparison({"baseline": plain, "mine": better}))
    assert advice.choices["accuracy"] == ("mine",)
    assert "mine (-1.97 ± 0.14 points of top-1)" in str(advice)
    assert "Chosen by the validation images" in str(advice)
    assert "no validation half" in str(explore.advise(_comparison({"baseline": PLAIN, "mine": better | PLAIN})))


# ---------------------------------------------------------------------------------------------- maps, saved models

NAMES = [plugin.name for plugin in strategies.every()]


@pytest.mark.parametrize("name", ["learn-and-drop", *(
    pytest.param(name, marks=slow) for name in NAMES if name != "learn-and-drop")])
def test_layer_maps_have_every_epoch_and_name_their_numbers(name, digits):
    kind = strategies[name].load()
    network = kind.example_network(digits.shape, digits.classes) or explore.build_network(
        "resnet-cifar", digits, {"depth": 8})
    result = fit(network, digits, strategies(name), epochs=4, batch_size=256, progress=False)
    for each in result.layer_maps.values():
        assert list(each.table.columns) == [1, 2, 3, 4]
        assert each.table.index.is_unique
        assert len(each.table)
        assert each.label or each.states
        if each.states:
            assert set(each.table.to_numpy().ravel()) <= set(range(len(each.states)))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_built_again_whatever_trained_it(name, digits, tmp_path):
    kind = strategies[name].load()
    example = kind.example_network(digits.shape, digits.classes)
    network, options = ("", {}) if example is not None else ("resnet-cifar", {"depth": 8})
    build = (lambda: kind.example_network(digits.shape, digits.classes)) if example is not None else (
        explore.build_network(network, digits, options))
    result = fit(build, digits, strategies(name), **QUICK | {"epochs": 3})
    file = save_model(tmp_path / "model.pt", result, digits, network, **options)
    saved = load_model(file, None if network else build)
    assert same_weights(saved.model, result.model)
    assert evaluate(saved.model, digits.test) == evaluate(result.model, digits.test)
    assert saved.strategies[0][0] == name
    images = digits.test.images[:5]
    assert torch.allclose(saved.normalise(images), digits.test.normalise(images), atol=1e-5)


def test_a_pruned_network_comes_back_pruned(digits, tmp_path):
    build = explore.build_network("resnet-cifar", digits, {"depth": 8})
    pruning = strategies("adaptive-pruning", targets=[{"ratio": 0.3}])
    result = fit(build, digits, pruning, **QUICK)
    file = save_model(tmp_path / "model.pt", result, digits, "resnet-cifar", depth=8)
    shapes = {name: tuple(each.shape) for name, each in load_model(file).model.named_parameters()}
    assert shapes == {name: tuple(each.shape) for name, each in result.model.named_parameters()}
    assert shapes != {name: tuple(each.shape) for name, each in build().named_parameters()}


def test_code_of_ones_own_is_run_only_if_it_is_named(digits, own, tmp_path):
    network = f"{own}:build"
    result = fit(explore.build_network(network, digits), digits, **QUICK)
    file = save_model(tmp_path / "model.pt", result, digits, network)
    with pytest.raises(LayerlabError, match=r"holds a network of your own; pass network='.*my_network.py:build'"):
        load_model(file)
    assert same_weights(load_model(file, network).model, result.model)
    with pytest.raises(LayerlabError, match="do not fit"):
        load_model(file, nn.Linear(64, 10))


def test_a_file_that_is_no_saved_model_gets_one_sentence(digits, tmp_path):
    with pytest.raises(LayerlabError, match=r"nothing.pt cannot be read \(No such file"):
        load_model(tmp_path / "nothing.pt")
    other = tmp_path / "other.pt"
    torch.save({"weights": 1}, other)
    with pytest.raises(LayerlabError, match="was not written by this layerlab; write one with save_model"):
        load_model(other)
    other.write_bytes(other.read_bytes()[:100])
    with pytest.raises(LayerlabError, match="is damaged"):
        load_model(other)


# ---------------------------------------------------------------------------------------------- the notebooks


@pytest.mark.parametrize("name", ["explore", "compare"])
def test_every_parameter_has_a_comment_and_nothing_was_left_in_the_notebook(name):
    file = Path(__file__).parents[1] / "notebooks" / f"{name}.ipynb"
    cells = json.loads(file.read_text())["cells"]
    (parameters,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert all("  # " in line for line in "".join(parameters["source"]).splitlines())
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
