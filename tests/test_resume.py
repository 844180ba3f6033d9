"""Killed at any moment and started again, a fit ends with the weights of the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import Freezer, same_weights, slow

from layerlab import LayerlabError, fit, load_dataset
from layerlab.training.loop import Fit

SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from helpers import Freezer, Residual
from layerlab import fit, load_dataset
torch.set_num_threads(1)
result = fit(Residual, load_dataset("digits", device="cpu").augmented("crop", 1), Freezer(seconds=0.01), epochs=6,
             batch_size=256, optimizer=sys.argv[2], lr=0.01, schedule="cosine", seed=3,
             checkpoint=sys.argv[3] or None, progress=False)
torch.save(result.model.state_dict(), sys.argv[4])
"""


def _start(optimizer: str, checkpoint: str, out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(Path(__file__).parent), optimizer, checkpoint, str(out)])


@slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_sigkill_at_random_moments_changes_nothing(optimizer, tmp_path):
    assert _start(optimizer, "", tmp_path / "undisturbed.pt").wait() == 0
    wanted = torch.load(tmp_path / "undisturbed.pt")
    seconds = random.Random(optimizer)
    folder, kills = tmp_path / "checkpoint", 0
    for _ in range(40):
        process = _start(optimizer, str(folder), tmp_path / "killed.pt")
        if kills < 4:
            # Wait for the training to be under way: its first checkpoint, or a new one, then a random moment.
            stamp = (folder / "state.pt").stat().st_mtime_ns if (folder / "state.pt").exists() else 0
            while process.poll() is None:
                if (folder / "state.pt").exists() and (folder / "state.pt").stat().st_mtime_ns > stamp:
                    time.sleep(seconds.uniform(0, 0.08))
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.002)
        if process.wait() == 0:
            break
    assert kills >= 3, "the fit was over before it could be interrupted"
    ended = torch.load(tmp_path / "killed.pt")
    assert all(torch.equal(wanted[name], ended[name]) for name in wanted)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resume_after_each_epoch_is_bit_identical(digits, residual, tmp_path, stop):
    options = dict(epochs=5, batch_size=256, lr=0.05, schedule="step", milestones=(2, 4))
    data = digits.augmented("crop", 1)
    whole = fit(residual, data, Freezer(), **options, progress=False)
    epochs = {tuple(row[name] for name in ("train/loss", "test/loss")) for row in whole.history}
    assert len(epochs) == 5, "epochs must differ, or equality proves nothing"
    first = Fit(residual, data, Freezer(), checkpoint=tmp_path, **options)
    for _ in range(stop):
        first.train_epoch()
    second = fit(residual, data, Freezer(), checkpoint=tmp_path, **options, progress=False)
    assert same_weights(whole.model, second.model)
    keep = ("epoch", "train/loss", "test/top1", "freezer/frozen", "cost/backward_flops")
    assert [[row[k] for k in keep] for row in whole.history] == [[row[k] for k in keep] for row in second.history]


def test_a_finished_fit_is_not_trained_again(digits, residual, tmp_path):
    options = dict(epochs=2, batch_size=256, checkpoint=tmp_path, progress=False)
    first = fit(residual, digits, **options)
    second = fit(residual, digits, **options)
    assert second.history == first.history
    assert same_weights(first.model, second.model)


def test_the_checkpoint_of_other_arguments_is_refused(digits, residual, tmp_path):
    fit(residual, digits, epochs=1, batch_size=256, checkpoint=tmp_path, progress=False)
    options = {"epochs": 1, "batch_size": 256, "checkpoint": tmp_path, "progress": False}
    for change in ({"lr": 0.1}, {"seed": 1}, {"strategies": Freezer()}):
        with pytest.raises(LayerlabError, match="belongs to a fit with other arguments"):
            fit(residual, digits, **options | change)
    with pytest.raises(LayerlabError, match="other arguments"):
        fit(residual, load_dataset("digits", limit=1000, device="cpu"), epochs=1, batch_size=256, checkpoint=tmp_path,
            progress=False)


def test_a_truncated_checkpoint_is_named_and_not_read(digits, residual, tmp_path):
    fit(residual, digits, epochs=1, batch_size=256, checkpoint=tmp_path, progress=False)
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:-500])
    with pytest.raises(LayerlabError, match=r"state.pt is damaged .*delete the folder"):
        fit(residual, digits, epochs=1, batch_size=256, checkpoint=tmp_path, progress=False)


def test_a_write_that_fails_leaves_the_previous_checkpoint(digits, residual, tmp_path, monkeypatch):
    options = dict(epochs=3, batch_size=256, checkpoint=tmp_path)
    job = Fit(residual, digits, **options)
    job.train_epoch()
    before = (tmp_path / "state.pt").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LayerlabError, match=r"Cannot write .*state.pt .*No space left.*make room"):
        job.train_epoch()
    monkeypatch.undo()
    assert (tmp_path / "state.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.pt"]


def test_of_a_torchrun_job_the_first_process_alone_writes_and_all_read(digits, residual, tmp_path, monkeypatch):
    class Count:
        told = 0

        def on_fit_start(self, fit): self.told += 1
        def on_epoch_end(self, fit, row): self.told += 1
        def on_fit_end(self, fit, result): self.told += 1
        def on_exception(self, fit, error): self.told += 1

    options = dict(epochs=2, batch_size=256, checkpoint=tmp_path, progress=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LAYERLAB_PROGRESS", str(tmp_path / "progress"))
    silent = Count()
    alone = fit(residual, digits, observers=[silent], **options)
    assert (silent.told, list(tmp_path.iterdir())) == (0, [])
    monkeypatch.setenv("RANK", "0")
    Fit(residual, digits, **{key: value for key, value in options.items() if key != "progress"}).train_epoch()
    monkeypatch.setenv("RANK", "1")
    job = Fit(residual, digits, **{key: value for key, value in options.items() if key != "progress"})
    assert job.run.epoch == 1
    job.train_epoch()
    assert same_weights(alone.model, job.finish().model)
    assert job.checkpoint.load(torch.device("cpu"))["epoch"] == 1
