"""What an epoch takes by the model, and products in integers against floats."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerlab_low_bit import analysis
from layerlab_low_bit.method.products import has_units


@pytest.mark.parametrize(("width", "classes"), [(16, 10), (200, 3)])
def test_the_update_counts_with_masters_and_momentum_in_float32(width, classes):
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, classes))

    table = analysis.energy(build, (1, 4, 4), images=64, batch_size=16).set_index("arithmetic")
    parameters = 17 * width + (width + 1) * classes
    # 4 steps; 2 products of 3.7 pJ and 2 sums of 0.9; 20 bytes of float32, and the codes; 162.5 pJ a byte.
    for form, codes in (("float32", 0), ("16 bits", 2), ("8 bits", 1)):
        wanted = 4 * parameters * (2 * 4.6 + (20 + codes) * 162.5) * 1e-12
        assert table.loc[form, "update [J]"] == pytest.approx(wanted)
    parts = table[["operations [J]", "memory traffic [J]", "update [J]"]].sum(axis=1)
    assert table["together [J]"].tolist() == pytest.approx(parts.tolist())
    # These products move more than they multiply, so that the saving stays below the three quarters of the bytes.
    assert 0 < table.loc["16 bits", "saved [%]"] < table.loc["8 bits", "saved [%]"] < 75


@pytest.mark.parametrize("build", [
    lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10)),
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Linear(12, 3))])
def test_each_layer_s_product_is_timed_where_there_are_units(build):
    table = analysis.int8_products(build, (1, 4, 4), batch_size=64, rounds=2)
    if not has_units("int8", torch.device("cpu")):
        assert table.empty
        return
    first = build()[0]
    wanted = ["256 × 9 × 6", "64 × 24 × 10"] if isinstance(first, nn.Conv2d) else ["64 × 16 × 12", "64 × 12 × 3"]
    assert table["product"].tolist() == wanted
    assert (table["low"] <= table["high"]).all()
