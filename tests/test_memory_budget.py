"""`fit(memory=…)`: the strategy that can hold a budget takes it, whichever that is."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from pydantic import ByteSize

from layerlab import Refused, Run, Strategy, build_model, fit, load_dataset
from layerlab.contract.registry import Plugin, strategies
from layerlab.training.budget import with_memory

OPTIONS: dict[str, Any] = dict(epochs=1, batch_size=64, progress=False)


class Thrifty(Strategy):
    """Holds nothing, and logs what it was told to hold."""

    name: ClassVar[str] = "thrifty"
    memory_setting: ClassVar[str] = "limit"

    limit: ByteSize | None = None
    share: float = 0.5

    def on_epoch_end(self, run: Run) -> None:
        assert self.limit is not None
        run.log("thrifty/limit", int(self.limit))


class Spendthrift(Strategy):
    name: ClassVar[str] = "spendthrift"


def installed(monkeypatch: pytest.MonkeyPatch, *kinds: type[Strategy]) -> None:
    """Have these strategies installed, and no others."""
    found = {}
    for kind in kinds:
        plugin = Plugin(kind.name, f"{kind.__module__}:{kind.__name__}", "dist", "1")
        vars(plugin)["_loaded"] = (kind, "")
        found[kind.name] = [plugin]
    monkeypatch.setitem(vars(strategies), "_plugins", found)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=128, test_limit=64, device="cpu")


def network():
    return build_model("mlp", num_classes=10, image_size=8, width=16)


def test_the_installed_strategy_that_can_hold_a_budget_is_added(data, monkeypatch):
    installed(monkeypatch, Spendthrift, Thrifty)
    result = fit(network, data, memory="2MB", **OPTIONS)
    assert result.final["thrifty/limit"] == 2_000_000
    both = fit(network, data, Spendthrift(), memory=3_000_000, **OPTIONS)
    assert [each.name for each in both.strategies] == ["spendthrift", "thrifty"]
    assert both.final["thrifty/limit"] == 3_000_000
    assert fit(network, data, **OPTIONS).strategies == ()


def test_a_given_strategy_takes_the_budget_and_keeps_its_other_settings(data, monkeypatch):
    installed(monkeypatch)
    mine = Thrifty(share=0.25)
    (told,) = fit(network, data, mine, memory="2MB", **OPTIONS).strategies
    assert dict(told) == {"limit": 2_000_000, "share": 0.25}
    assert mine.limit is None
    (same,) = with_memory((Thrifty(limit="2MB"),), 2_000_000)
    assert dict(same)["limit"] == 2_000_000


def test_a_budget_that_nobody_can_hold_is_refused_with_the_remedy(data, monkeypatch):
    installed(monkeypatch, Spendthrift)
    with pytest.raises(Refused, match=r"memory='2GB' needs a strategy .* installed \(spendthrift\) .*; install one"):
        fit(network, data, memory="2GB", **OPTIONS)

    class Other(Thrifty):
        name: ClassVar[str] = "other"

    installed(monkeypatch, Thrifty, Other)
    with pytest.raises(Refused, match="can be held by 'other' and 'thrifty'; give one of them as a strategy"):
        fit(network, data, memory="2GB", **OPTIONS)
    with pytest.raises(Refused, match="thrifty has limit=1000000 already, and memory='2MB' is another one"):
        fit(network, data, Thrifty(limit="1MB"), memory="2MB", **OPTIONS)
    with pytest.raises(Refused, match=r"thrifty: setting 'limit' .* got 'much'"):
        fit(network, data, Thrifty(), memory="much", **OPTIONS)
