"""Learn&Drop's thresholds and score, chosen on training images that are held out."""

from __future__ import annotations

import pytest
from torch import nn

from layerlab import Comparison, Dataset, FitResult, build_model, compare, load_dataset
from layerlab.training.settings import Settings
from layerlab_learn_and_drop import LearnAndDrop, analysis

TRIED = {"settled": [0.3, 0.9], "score": ["weights", "gradients"]}


def result(strategy: LearnAndDrop, accuracies: list[float], dropped: list[int], features: float = 0.0) -> FitResult:
    """Of epochs of 3 FLOPs forward and 6 backward, of which each dropped layer saves a third."""
    history = [
        {"epoch": epoch, "test/top1": top1, "cost/forward_flops": 3.0 - count + features * (count > 0),
         "cost/backward_flops": 6.0 - 2 * count}
        for epoch, (top1, count) in enumerate(zip(accuracies, dropped, strict=True), 1)
    ]
    return FitResult(nn.Identity(), history, 0, "", (strategy,), Settings())


def test_the_thresholds_that_drop_and_are_best_at_equal_flops_are_chosen():
    late, early, never, dear = analysis.threshold_arms(LearnAndDrop(at_most=0.8), TRIED).items()
    run = Comparison({
        (late[0], 0): result(late[1], [0.2, 0.4, 0.7], [0, 0, 1]),  # 24 FLOPs
        (early[0], 0): result(early[1], [0.2, 0.5, 0.6], [0, 1, 1]),  # 21, the cheapest
        (never[0], 0): result(never[1], [0.5, 0.9, 0.9], [0, 0, 0]),
        (dear[0], 0): result(dear[1], [0.2, 0.5, 0.9], [0, 1, 1], features=3.0),  # 27: features cost what they save
    })
    table = analysis.threshold_table(run, list(TRIED))
    assert table["forward FLOPs saved"].tolist() == pytest.approx([100 / 9, 200 / 9, 0, -400 / 9])
    # At 21 FLOPs: halfway through the last epoch, its end, and a third of the way through it; twice.
    assert table["top-1 at equal FLOPs"].tolist() == pytest.approx([0.55, 0.6, 0.9, 0.5 + 0.4 / 3])
    assert table.index[table["chosen"]].tolist() == [1]
    chosen = analysis.chosen(table, list(TRIED), LearnAndDrop(at_most=0.8))
    assert chosen.model_dump() == LearnAndDrop(at_most=0.8, settled=0.3, score="gradients").model_dump()


def test_thresholds_that_save_too_little_for_the_claims_are_not_chosen_where_others_save_enough():
    (a, little), (b, enough) = analysis.threshold_arms(LearnAndDrop(), {"flat": [0.1, 0.2]}).items()
    run = Comparison({(a, 0): result(little, [0.5, 0.6, 0.9], [0, 0, 1]),
                      (b, 0): result(enough, [0.5, 0.6, 0.6], [0, 1, 2])})
    assert analysis.threshold_table(run, ["flat"])["chosen"].tolist() == [False, True]


def test_of_equals_the_one_that_saves_most_is_chosen_and_where_nothing_drops_one_of_all():
    (a, first), (b, second) = analysis.threshold_arms(LearnAndDrop(), {"flat": [0.1, 0.2]}).items()
    equal = Comparison({(a, 0): result(first, [0.5, 0.5, 0.5], [0, 0, 1]),
                        (b, 0): result(second, [0.5, 0.5, 0.5], [0, 1, 1])})
    assert analysis.threshold_table(equal, ["flat"])["chosen"].tolist() == [False, True]
    none = Comparison({(a, 0): result(first, [0.5, 0.6], [0, 0]), (b, 0): result(second, [0.5, 0.7], [0, 0])})
    assert analysis.threshold_table(none, ["flat"])["chosen"].tolist() == [False, True]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset("digits", limit=160, test_limit=40, device="cpu")


@pytest.mark.parametrize(
    ("name", "options"), [("resnet-cifar", {"depth": 8, "channels": 1}), ("mlp", {"image_size": 8})])
def test_scores_from_weights_and_from_gradients_are_tried_side_by_side_on_other_networks(data, name, options):
    tried = {"settled": [10.0], "score": ["weights", "gradients"]}
    arms = analysis.threshold_arms(LearnAndDrop(flat=10.0, window=2, at_most=0.9, flops_per_byte=0.0), tried)
    run = compare(lambda: build_model(name, num_classes=10, **options), data.held_out(), arms, epochs=5, batch_size=32,
                  progress=False)
    table = analysis.threshold_table(run, list(tried))
    assert table["score"].tolist() == ["weights", "gradients"]
    assert (table["forward FLOPs saved"] > 0).all()
    assert table["chosen"].sum() == 1
