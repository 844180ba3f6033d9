"""What only a GPU shows: its random numbers, allocator, energy counter and streams, and what a checkpoint carries."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers import Freezer, same_weights
from PIL import Image
from torch import nn

from layerlab import Fit, build_model, compare, fit, load_dataset, measure, strategies
from layerlab.runs.batch.machine import Machine
from layerlab.runs.jobs import Job

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

QUICK = dict(epochs=3, batch_size=128, progress=False)


@pytest.fixture(scope="module")
def scans():
    return load_dataset("digits", image_size=16, device="cuda")


def network():
    return build_model("resnet-cifar", num_classes=10, channels=1, depth=8)


def chain():
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def test_auto_is_the_gpu():
    data = load_dataset("digits", limit=100)
    assert data.train.labels.is_cuda
    assert data.train.images.is_cuda
    assert torch.cuda.get_device_name() in measure.machine_name()


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"precision": "bfloat16"}, {"channels_last": "auto"}])
def test_two_runs_give_identical_weights_without_a_warning_of_nondeterminism(scans, options):
    data = scans.augmented("crop-flip", 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*determinis.*")
        first = fit(network, data, Freezer(), **QUICK | options)
        torch.rand(3, device="cuda")  # the global random state must not matter
        second = fit(network, data, Freezer(), **QUICK | options)
    if options.get("channels_last") != "auto":  # what is measured may be chosen otherwise
        assert same_weights(first.model, second.model)
    assert first.final["test/top1"] > 0.2


def test_the_fast_recipe_trains(scans):
    data = load_dataset("digits", image_size=16, channels=3, device="cuda")
    result = fit(lambda: build_model("airnet", num_classes=10, widths=(16, 32, 32)), data, recipe="fast", epochs=4,
                 batch_size=100, progress=False)
    assert result.final["test/top1"] > 0.2


def test_joules_are_counted_of_what_takes_a_second_and_of_nothing_shorter():
    matrix = torch.rand(4096, 4096, device="cuda")
    energy = measure.Energy(matrix.device)
    assert energy.joules() is None
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        matrix @ matrix
        torch.cuda.synchronize()
    # An idle GPU takes some 50 watts, the largest one under 2,000.
    assert 20 < energy.joules() < 6000


def test_an_epoch_has_the_allocators_peak(scans):
    result = fit(network, scans, **QUICK)
    for row in result.history:
        # At least the batch, the weights, their gradients and their momentum.
        assert row["cost/peak_memory_bytes"] > 3 * sum(4 * p.numel() for p in network().parameters())


def test_an_arms_peak_does_not_depend_on_what_trains_beside_it(scans):
    alone = fit(network, scans, **QUICK).history[-1]["cost/peak_memory_bytes"]
    wide = {"big": lambda: build_model("resnet-cifar", num_classes=10, channels=1, depth=20), "small": network}
    beside = compare(wide, scans, {"big": (), "small": ()}, **QUICK).results["small", 0]
    assert beside.history[-1]["cost/peak_memory_bytes"] == pytest.approx(alone, rel=0.02)


def test_a_step_costs_as_many_flops_as_on_a_cpu(scans):
    there = fit(network, scans, Freezer(), **QUICK)
    here = fit(network, load_dataset("digits", image_size=16, device="cpu"), Freezer(), **QUICK)
    for kind in ("forward", "backward"):
        assert there.total(f"cost/{kind}_flops") == here.total(f"cost/{kind}_flops")


def test_an_interrupted_fit_goes_on_to_the_same_weights(scans, tmp_path):
    data = scans.augmented("crop", 2)

    def job(folder: Path | None) -> Fit:
        return Fit(network, data, Freezer(), epochs=4, batch_size=128, checkpoint=folder)

    whole = job(None)
    while not whole.finished:
        whole.train_epoch()
    for _ in range(4):  # a new process each time, as far as the fit can tell
        torch.rand(7, device="cuda")
        job(tmp_path).train_epoch()
    assert same_weights(job(tmp_path).finish().model, whole.finish().model)


def test_images_that_are_streamed_arrive_as_those_in_memory(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for half, count in (("train", 40), ("test", 10)):
        for label in ("a", "b"):
            folder = tmp_path / half / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (20, 20, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    kept, streamed = (load_dataset(tmp_path, image_size=16, device="cuda", memory_budget=budget)
                      .augmented("crop-flip", 2) for budget in (None, 0))
    for one, other in zip(*(data.train.batches(16, torch.Generator().manual_seed(1)) for data in (kept, streamed)),
                          strict=True):
        assert one[0].is_cuda
        assert other[0].is_cuda
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_compiled_blocks_learn_again_after_they_were_frozen(scans):
    eager = fit(network, scans, Freezer(), **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old torch trains eagerly, and says so
        compiled = fit(network, scans, Freezer(), compile=True, **QUICK)
    for name in ("train/loss", "test/top1"):
        assert compiled.final[name] == pytest.approx(eager.final[name], abs=0.1)


@pytest.mark.parametrize("name", sorted(strategies))
def test_a_strategy_trains_is_interrupted_and_saved(name, scans, tmp_path):
    if name == "comm-overlap":
        pytest.skip("its workers have tests of their own")
    images = load_dataset("digits", image_size=32, limit=512, test_limit=200, device="cuda")
    built = chain if name == "network-with-subnetworks" else network
    strategy = strategies(name)

    def job(folder: Path | None) -> Fit:
        return Fit(built, images, strategy.model_copy(deep=True), epochs=3, batch_size=64, checkpoint=folder)

    whole = job(None)
    while not whole.finished:
        whole.train_epoch()
    expected = whole.finish()
    for _ in range(3):
        job(tmp_path).train_epoch()
    result = job(tmp_path).finish()
    assert result.final["test/top1"] == expected.final["test/top1"]
    assert result.history[-1]["cost/peak_memory_bytes"] > 0


def test_a_notebook_of_a_batch_has_a_gpu_to_itself():
    machine = Machine()
    assert len(set(machine.gpus)) == torch.cuda.device_count()
    first, give_back = machine.take(Job("a.ipynb", "a"), 1)
    assert first["CUDA_VISIBLE_DEVICES"] not in machine.gpus
    give_back()
    assert len(machine.gpus) == torch.cuda.device_count()
