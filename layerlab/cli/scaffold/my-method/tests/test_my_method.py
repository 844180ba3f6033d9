"""my-method: the contract, and what the method itself does."""

from __future__ import annotations

import pytest
from torch import nn

from layerlab import LayerlabError, fit, load_dataset
from layerlab.testing import parametrize_with_checks
from layerlab_my_method import MyMethod


# One test for each check of the contract. A check that cannot be passed is declared with its reason, on the class:
# expected_failed_checks: ClassVar[dict[str, str]] = {"compiles": "…"}
@parametrize_with_checks([MyMethod()])
def test_contract(strategy, check):
    check(strategy)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=256, test_limit=64, device="cpu")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10),
    )


def test_half_of_the_layers_rest_in_every_second_epoch(data):
    result = fit(network(), data, MyMethod(share=0.5, every=2), epochs=4, batch_size=64, progress=False)
    assert [row["my-method/rests"] for row in result.history] == [0, 1, 1, 2]
    learning, resting, *_ = [row["cost/backward_flops"] for row in result.history]
    # Both convolutions rest, so backward ends at the first fully connected layer.
    assert resting < 0.2 * learning


def test_a_network_of_one_layer_is_refused(data):
    with pytest.raises(LayerlabError, match="needs a network of two layers or more"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data, MyMethod(), epochs=1, progress=False)
