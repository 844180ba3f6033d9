"""A strategy that spoils what others train with is named, and spoils nothing but its own runs."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import pytest
import torch
from helpers import Freezer, same_weights

from layerlab import Comparison, LayerlabError, Refused, Strategy, compare, fit
from layerlab.testing.checks import CHECKS

OPTIONS: dict[str, Any] = dict(epochs=2, batch_size=256, progress=False, measure=False)


class Spoiler(Strategy):
    """Does something wrong at the beginning of an epoch."""

    name: ClassVar[str] = "spoiler"

    def on_epoch_start(self, run):
        self.spoil(run)

    def spoil(self, run):
        raise NotImplementedError


class ZeroesImages(Spoiler):
    def spoil(self, run):
        run.data.images.zero_()


class ZeroesView(Spoiler):
    def spoil(self, run):
        run.data.images[:100].numpy()[:] = 0


class ShiftsLabels(Spoiler):
    def spoil(self, run):
        run.data.labels.data.add_(1).remainder_(10)


class ZeroesTest(Spoiler):
    def spoil(self, run):
        run.test_data.images.data.zero_()


class TurnsThreads(Spoiler):
    def spoil(self, run):
        torch.set_num_threads(torch.get_num_threads() + 1)


class HooksAll(Spoiler):
    def spoil(self, run):
        torch.nn.modules.module.register_module_forward_hook(lambda *_: None)


@pytest.fixture(scope="module")
def alone(digits) -> Comparison:
    from helpers import Residual

    return compare(Residual, digits, {"plain": ()}, **OPTIONS)


@pytest.mark.parametrize(("kind", "what"), [
    (ZeroesImages, "training images in place"), (ZeroesView, "training images in place"),
    (ShiftsLabels, "training labels in place"), (ZeroesTest, "test images in place"),
    (TurnsThreads, "torch.get_num_threads changed"), (HooksAll, "hooks of all modules changed"),
])
def test_what_spoils_data_or_settings_is_named_and_hurts_no_other_arm(digits, residual, alone, kind, what):
    threads, images = torch.get_num_threads(), digits.train.images.clone()
    with pytest.raises(Refused, match=f"'spoiled'.*{what}"):
        compare(residual, digits, {"spoiled": kind(), "plain": ()}, **OPTIONS)
    both = compare(residual, digits, {"spoiled": kind(), "plain": ()}, keep_going=["spoiled"], **OPTIONS)
    assert what in both.failures["spoiled"]
    assert same_weights(both.results["plain", 0].model, alone.results["plain", 0].model)
    assert torch.equal(digits.train.images, images)
    assert torch.get_num_threads() == threads


def test_what_patches_torch_ends_the_comparison_also_where_others_may_fail(digits, residual, monkeypatch):
    right = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", right)

    class Patches(Spoiler):
        def spoil(self, run):
            torch.nn.functional.linear = lambda *arguments: 1.001 * right(*arguments)

    with pytest.raises(Refused, match=r"'patches'.*no longer bit-equal"):
        compare(residual, digits, {"plain": (), "patches": Patches()}, keep_going=["patches"], **OPTIONS)


def test_a_comparison_says_that_nothing_was_touched(digits, residual):
    both = compare(residual, digits, {"plain": (), "mine": Freezer()}, **OPTIONS)
    assert both.untouched == ("mine",)
    assert "bit-equal before and after mine." in str(both)
    assert "bit-equal" not in str(compare(residual, digits, {"plain": ()}, **OPTIONS))


def test_data_that_an_arm_only_reads_are_not_copied(digits, residual):
    from layerlab import Fit

    training = Fit(residual, digits, Freezer(), **{name: OPTIONS[name] for name in ("epochs", "batch_size")})
    while not training.finished:
        training.train_epoch()
    training.finish()
    assert torch._C._is_cow_tensor(training.data.train.images)


class Hangs(Strategy):
    name: ClassVar[str] = "hangs"

    def on_epoch_end(self, run):
        if run.epoch == 2:
            time.sleep(600)


class Loops(Strategy):
    name: ClassVar[str] = "loops"

    def on_after_backward(self, run):
        while run.epoch == 2:
            pass


@pytest.mark.parametrize(("kind", "where"), [(Hangs, "on_epoch_end of 'hangs'"), (Loops, "A training step of 'loops'")])
def test_a_hook_that_never_comes_back_is_named_and_the_other_arms_go_on(digits, residual, monkeypatch, kind, where):
    monkeypatch.setenv("LAYERLAB_HOOK_LIMIT", "1.5")
    both = compare(residual, digits, {"plain": (), kind.name: kind()}, keep_going=[kind.name], **OPTIONS)
    assert both.failures[kind.name].startswith(f"{where} did not come back within 1.5 s")
    assert len(both.results["plain", 0].history) == 2
    with pytest.raises(LayerlabError, match="did not come back"):
        fit(residual, digits, kind(), **OPTIONS)


def test_the_kit_names_what_writes_into_the_data():
    with pytest.raises(Refused, match="training images in place"):
        CHECKS["data_untouched"](ZeroesImages())
