"""Killed at any moment and started again, a fit ends with the weights of the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import OrderedDict, defaultdict, deque
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import Freezer, same_weights, slow, small_disk
from pydantic import BaseModel

from layerlab import LayerlabError, Strategy, fit, load_dataset, track
from layerlab.base.files import write_atomically
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


@pytest.mark.parametrize("place", [0.02, 0.3, 0.5, 0.7, 0.98, 0.9999])
def test_one_flipped_bit_is_noticed_wherever_it_is(digits, residual, tmp_path, place):
    options = dict(epochs=1, batch_size=256, checkpoint=tmp_path, progress=False)
    fit(residual, digits, **options)
    content = bytearray((tmp_path / "state.pt").read_bytes())
    content[int(place * len(content))] ^= 0x10
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(LayerlabError, match=r"state.pt (is damaged|was not written by this layerlab)"):
        fit(residual, digits, **options)


@pytest.mark.parametrize("content", [{"a": 1}, torch.zeros(3), [1], {"fingerprint": 0}])
def test_a_state_that_is_none_of_ours_is_named_and_kept(digits, residual, tmp_path, content):
    torch.save(content, tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(LayerlabError, match="was not written by this layerlab; move it, or give another folder"):
        fit(residual, digits, epochs=1, batch_size=256, checkpoint=tmp_path, progress=False)
    assert (tmp_path / "state.pt").read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", '{"attempt": 5}', '{"attempt": "a\' OR 1=1"}', "5"])
def test_an_attempt_that_is_damaged_is_named(digits, residual, tmp_path, text):
    (tmp_path / "attempt.json").write_text(text)
    options = dict(epochs=1, batch_size=256, checkpoint=tmp_path, progress=False)
    with pytest.raises(LayerlabError, match=r"attempt.json does not say which MLflow run .* delete it"):
        fit(residual, digits, **options, observers=[track("damaged")])


class Keeps(Strategy):
    """Has a state that a test gives it."""

    name: ClassVar[str] = "keeps"
    state: ClassVar[Any] = None
    back: ClassVar[Any] = None

    def state_dict(self):
        return {"kept": {"here": type(self).state}}

    def load_state_dict(self, state):
        type(self).back = state["kept"]["here"]


@pytest.mark.parametrize("state", [
    np.float32(0.5), np.zeros(2), np.str_("a"), deque([1]), defaultdict(list), Path("a"), max, lambda: 0,
    {(1, Path()): 2}, OrderedDict(a=[np.int64(1)]),
])
def test_a_state_that_would_not_come_back_is_refused_when_it_is_saved(digits, residual, tmp_path, monkeypatch, state):
    monkeypatch.setattr(Keeps, "state", state)
    job = Fit(residual, digits, Keeps(), epochs=2, batch_size=256, checkpoint=tmp_path)
    with pytest.raises(LayerlabError, match=r"strategy 'keeps' has a .* at 'kept.here.*let its state_dict give"):
        job.train_epoch()
    assert not (tmp_path / "state.pt").exists()


def test_a_state_of_plain_values_comes_back_as_it_was(digits, residual, tmp_path, monkeypatch):
    state = [None, True, 3, 2.5, "a", (1, "b"), {2, 3}, {1: {"x": ()}}, b"c", 1j, torch.int8, OrderedDict(z=1)]
    monkeypatch.setattr(Keeps, "state", state)
    options = dict(epochs=2, batch_size=256, checkpoint=tmp_path)
    Fit(residual, digits, Keeps(), **options).train_epoch()
    assert Fit(residual, digits, Keeps(), **options).run.epoch == 1
    assert repr(Keeps.back) == repr(state)


class Shade(Enum):
    DARK = "dark"
    LIGHT = 2


class Inner(BaseModel):
    size: int = 1
    day: date = date(2020, 2, 29)


class Typed(Strategy):
    """Has settings of the types that pydantic takes."""

    name: ClassVar[str] = "typed"
    shade: Shade = Shade.LIGHT
    place: Path = Path("a/b")
    day: date = date(2024, 1, 2)
    names: set[str] = {"x", "y", "z"}  # noqa: RUF012
    inner: Inner = Inner()
    table: dict[Shade | int | None, Inner] = {Shade.DARK: Inner(), 3: Inner(), None: Inner()}  # noqa: RUF012


def test_settings_of_any_type_resume_and_another_value_is_another_fit(digits, residual, tmp_path):
    options = dict(epochs=2, batch_size=256, checkpoint=tmp_path)
    Fit(residual, digits, Typed(), **options).train_epoch()
    assert Fit(residual, digits, Typed(names={"z", "y", "x"}), **options).run.epoch == 1
    for change in ({"shade": Shade.DARK}, {"place": "a/c"}, {"day": date(2024, 1, 3)}, {"names": {"x"}},
                   {"inner": Inner(day=date(2021, 1, 1))}, {"table": {"3": Inner()}}):
        with pytest.raises(LayerlabError, match="other arguments"):
            Fit(residual, digits, Typed(**change), **options)


@pytest.mark.parametrize(("given", "said"), [
    ("", "is an empty text"), ("a\0b", "cannot be"), ("x" * 300, "cannot be .*too long"), ("file", "is file, which is"),
])
def test_what_is_no_checkpoint_folder_is_refused_at_once(digits, residual, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(LayerlabError, match=f"checkpoint {said}"):
        fit(residual, digits, epochs=1, batch_size=256, checkpoint=given, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


KILLED = """
import os, signal, sys
from pathlib import Path
from layerlab.base.files import write_atomically
def write(stream):
    stream.write(b"half")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), write)
"""


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    file = tmp_path / "state [1].pt"
    subprocess.run([sys.executable, "-c", KILLED, str(file)])
    (left,) = tmp_path.iterdir()
    other = tmp_path / ".state [1].pt.backup12"
    other.touch()

    def write(stream: Any) -> None:
        stream.write(b"outer")
        write_atomically(file, lambda inner: inner.write(b"inner"))

    write_atomically(file, write)
    assert file.read_bytes() == b"outer"
    assert not left.exists()
    assert sorted(tmp_path.iterdir()) == [other, file]


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(digits, residual, tmp_path):
    with small_disk(tmp_path, "200k"):
        options = dict(epochs=3, batch_size=256, checkpoint=tmp_path / "fit")
        job = Fit(residual, digits, **options)
        job.train_epoch()
        before = (tmp_path / "fit" / "state.pt").read_bytes()
        (tmp_path / "filler").write_bytes(bytes(200 * 1024 - len(before) - 16384))
        with pytest.raises(LayerlabError, match=r"Cannot write .*No space left on device.* make room .*"
                                                r"The last state that was written is still there"):
            job.train_epoch()
        assert [path.name for path in (tmp_path / "fit").iterdir()] == ["state.pt"]
        assert (tmp_path / "fit" / "state.pt").read_bytes() == before
        (tmp_path / "filler").unlink()
        assert Fit(residual, digits, **options).run.epoch == 1


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
    (tmp_path / "progress").touch()
    silent = Count()
    alone = fit(residual, digits, observers=[silent], **options)
    # The word that nothing is written goes where a batch reads it.
    assert (silent.told, [file.name for file in tmp_path.iterdir()]) == (0, ["progress"])
    monkeypatch.setenv("RANK", "0")
    Fit(residual, digits, **{key: value for key, value in options.items() if key != "progress"}).train_epoch()
    monkeypatch.setenv("RANK", "1")
    job = Fit(residual, digits, **{key: value for key, value in options.items() if key != "progress"})
    assert job.run.epoch == 1
    job.train_epoch()
    assert same_weights(alone.model, job.finish().model)
    assert job.checkpoint.load(torch.device("cpu"))["epoch"] == 1
