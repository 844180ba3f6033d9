"""Seeds that train side by side, each in a process of its own."""

from __future__ import annotations

import os
import threading
import time
import warnings

import pytest
from helpers import Freezer, same_weights, slow

from layerlab import LayerlabError, LayerlabWarning, Run, compare
from layerlab.training.ahead import Ahead

QUICK = dict(batch_size=256, progress=False)


class Stumbles(Freezer):
    """Fails with seed 1 alone."""

    def on_epoch_start(self, run: Run) -> None:
        if run.generator.initial_seed() == 1:
            raise LayerlabError("It stumbled with seed 1.")


def test_seeds_side_by_side_give_what_one_after_the_other_gives(digits, residual, tmp_path):
    arms = {"plain": (), "frozen": Freezer()}

    def trained(folder, at_once):
        return compare(residual, digits, arms, seeds=[3, 4], equal="flops", epochs=2, checkpoint=tmp_path / folder,
                       at_once=at_once, **QUICK)

    alone, together = trained("alone", 1), trained("together", 2)
    assert alone.results.keys() == together.results.keys()
    for key, result in alone.results.items():
        assert same_weights(result.model, together.results[key].model)
        assert result.final["test/top1"] == together.results[key].final["test/top1"]


@slow
def test_a_seed_is_trained_in_a_process_of_its_own(digits, residual, tmp_path):
    built = tmp_path / "built"
    built.mkdir()

    def network():
        (built / str(os.getpid())).touch()
        return residual()

    compare(network, digits, {"plain": ()}, seeds=[0, 1], epochs=1, checkpoint=tmp_path / "runs", at_once=2, **QUICK)
    # That process, and this one, which finds the training finished.
    assert len(list(built.iterdir())) == 2
    compare(network, digits, {"plain": ()}, seeds=[0, 1], epochs=1, checkpoint=tmp_path / "more", **QUICK)
    assert len(list(built.iterdir())) == 2


def test_while_this_process_waits_another_seed_takes_its_place(tmp_path):
    def train(seed: int) -> None:
        (tmp_path / str(seed)).touch()
        for _ in range(600):
            if len(list(tmp_path.iterdir())) == 2:
                return
            time.sleep(0.1)
        raise LayerlabError(f"Seed {seed} trained alone.")

    # Seed 0 is the caller's, which has trained it already.
    with warnings.catch_warnings(), Ahead(train, [0, 1, 2], at_once=2) as ahead:
        warnings.simplefilter("error")
        for seed in (0, 1, 2):
            ahead.wait(seed)


def test_what_cannot_be_sent_to_another_process_trains_here_and_says_so(digits, residual, tmp_path):
    lock = threading.Lock()

    def network():
        with lock:
            return residual()

    with pytest.warns(LayerlabWarning, match="one after the other, since what is trained cannot be sent"):
        run = compare(network, digits, {"plain": ()}, seeds=[0, 1], epochs=1, checkpoint=tmp_path, at_once=2, **QUICK)
    assert run.seeds == [0, 1]


@slow
def test_a_seed_that_fails_ahead_fails_here_with_its_own_error(digits, residual, tmp_path):
    with pytest.warns(LayerlabWarning, match="Seed 1 could not be trained ahead and is trained here: .*It stumbled"), \
            pytest.raises(LayerlabError, match="It stumbled with seed 1"):
        compare(residual, digits, {"plain": (), "odd": Stumbles()}, seeds=[0, 1], epochs=1, checkpoint=tmp_path,
                at_once=2, **QUICK)
