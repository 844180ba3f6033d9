"""comm-overlap: N workers end with one process's weights whatever overlaps; nothing hangs when one of them dies."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import cloudpickle
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from helpers import Freezer, Residual, slow
from torch import nn

from layerlab import LayerlabError, Refused, Run, Split, Strategy, build_model, fit, forward_order, load_dataset
from layerlab_comm_overlap import CommOverlap, analysis, launch
from layerlab_comm_overlap.method.choosing import Choice, Way
from layerlab_comm_overlap.method.model import AllReduce, Measured, fit_link, margins, scaling, step_seconds
from layerlab_comm_overlap.method.stock import STOCK, StockDDP
from layerlab_comm_overlap.method.transport import Bucket, Link, Transport, order_of_segments

# Workers cannot import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WORKERS = 3
SMALL = {"bucket_mb": 0.05, "segment_mb": 0.02}
SWITCHES = ("overlap_backward", "overlap_forward", "pipeline_segments")
COMBINATIONS = [dict(zip(SWITCHES, on, strict=True)) for on in itertools.product((False, True), repeat=3)]
# 50 images among 3 workers: 16, 17 and 17. A schedule a step, so that a late update with a later rate would show.
SETTINGS = dict(epochs=2, batch_size=50, lr=0.05, schedule="cosine", schedule_each="step", progress=False,
                measure=False)


def digits():
    return load_dataset("digits", image_size=16, limit=200, device="cpu").augmented("crop", 1)


def lenet() -> nn.Module:
    return build_model("lenet", num_classes=10, channels=1, image_size=16)


def chain() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(256, 32)]
    for _ in range(5):
        layers += [nn.ReLU(), nn.Linear(32, 32)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 10))


class Borrowing(nn.Module):
    """Reads the weights of a layer that it never calls, before those of one that it calls late, and shares some."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.never = nn.Linear(256, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.same = nn.Linear(64, 64)
        self.same.weight = self.late.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        x = x + nn.functional.linear(x, self.late.weight)
        return nn.functional.linear(self.same(torch.relu(self.late(x))), self.never.weight, self.never.bias)


class Changing(nn.Module):
    """Leaves out some of its parameters: one always, one in two of three workers where these tests run."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.unused, self.some = lenet(), nn.Linear(3, 3), nn.Parameter(torch.ones(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.network(x)
        # Of a batch of 50 the first of three workers has 16.
        rows = 16 if not dist.is_initialized() else len(x) if dist.get_rank() == 0 else 0
        return torch.cat([logits[:rows] * self.some, logits[rows:]]) if rows and self.training else logits


class Uneven(Strategy):
    """Batches of 50 of which the last has only two images, one fewer than there are workers."""

    name: ClassVar[str] = "uneven"

    def on_fit_start(self, run: Run) -> None:
        run.data = _Uneven(run.data)


class _Uneven:
    def __init__(self, data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, *arguments):
        batches = list(self.data.batches(*arguments))
        *whole, (x, y) = batches
        return iter([*whole, (x[:2], y[:2])])


class Whole(Strategy):
    """Puts other data there at an epoch's start, after comm-overlap: their batches come whole."""

    name: ClassVar[str] = "whole"

    def on_epoch_start(self, run: Run) -> None:
        if isinstance(run.data, Split):
            run.data = replace(run.data, share=(0, 1), padding=2)


class Still(Strategy):
    """Freezes the whole network in the second of three epochs."""

    name: ClassVar[str] = "still"

    def on_epoch_start(self, run: Run) -> None:
        order = [module for _, module in forward_order(run.model, run.example)]
        run.freeze(self.name, order if run.epoch == 2 else [])


class Hooked(Strategy):
    """Changes all gradients after backward."""

    name: ClassVar[str] = "hooked"

    def on_after_backward(self, run: Run) -> None:
        for parameter in run.training_model.parameters():
            parameter.grad += 0.1 * parameter.grad.mean()


class Sixteenths(Strategy):
    """Gradients travel as bytes, in sixteenths of a power of two of their own."""

    name: ClassVar[str] = "sixteenths"

    def on_fit_start(self, run: Run) -> None:
        run.wire = self

    def encode(self, name: str, gradient: torch.Tensor) -> tuple[torch.Tensor, int]:
        exponent = int(torch.frexp(gradient.abs().max())[1]) - 7
        return (gradient * 2.0**-exponent).round().clamp(-127, 127).to(torch.int8), exponent

    def decode(self, codes: torch.Tensor, exponent: int) -> torch.Tensor:
        return codes.float() * 2.0**exponent


def late(**more) -> CommOverlap:
    """Every message comes 5 ms late, so that whatever is not waited for is missed."""
    return CommOverlap(link_latency_ms=5, **SMALL, **more)


# name: (network, strategies besides ours, ours, other settings)
CASES = {
    "late": (lenet, [], late(), {}),
    "late, weights used elsewhere": (Borrowing, [], late(overlap_backward=False, in_flight=1), {"lr": 0.01}),
    "slow": (lenet, [], CommOverlap(link_megabits=200, **SMALL), {}),
    "adamw": (lenet, [], CommOverlap(**SMALL), {"optimizer": "adamw", "lr": 0.002}),
    "uneven": (lenet, [Uneven()], CommOverlap(**SMALL), {}),
    "whole": (lenet, [Whole()], CommOverlap(**SMALL), {}),
    "hooked": (lenet, [Hooked()], CommOverlap(**SMALL), {}),
    "frozen": (chain, [Freezer()], CommOverlap(bucket_mb=0.004), {"epochs": 4, "measure": True}),
    "nothing learns": (lenet, [Still()], CommOverlap(**SMALL), {"epochs": 3}),
    "nothing learns in a chain": (chain, [Still()], CommOverlap(bucket_mb=0.004), {"epochs": 3}),
    "unused": (Changing, [], CommOverlap(find_unused_parameters=True, **SMALL), {}),
    # 33 steps an epoch, of which each of ten visits takes nine.
    "chosen": (lenet, [], CommOverlap(choose=True, **SMALL), {"batch_size": 6, "epochs": 4, "lr": 0.01}),
    "DDP as it comes": (lenet, [], StockDDP(bucket_mb=0.05), {"batch_size": 30}),
    "DDP over a slow link": (chain, [], StockDDP(bucket_mb=0.02, link_megabits=100, link_latency_ms=2),
                             {"batch_size": 30}),
} | {f"switches {number}": (lenet, [], CommOverlap(**on, **SMALL), {}) for number, on in enumerate(COMBINATIONS)
       if number in (2, 7) or os.environ.get("LAYERLAB_SLOW")}
ALONE = {
    "wire": (lenet, [Sixteenths()], CommOverlap(**SMALL), {}),
    "batch norm and dropout": (Residual, [], CommOverlap(**SMALL), {}),
}


def train(network, others, ours, more):
    strategies = sorted([*others, *([ours] if ours else [])], key=lambda each: isinstance(each, Whole))
    result = fit(network, digits(), strategies, **(SETTINGS | more))
    hooks = any(module._forward_pre_hooks or module._forward_hooks for module in result.model.modules())
    # `launch(fit, …)` sends whole results home.
    result = cloudpickle.loads(cloudpickle.dumps(result))
    found = {"weights": result.model.state_dict(), "history": result.history, "hooks": hooks}
    for each in result.strategies:
        if isinstance(each, CommOverlap):
            found |= {"chosen": each.chosen, "tried": each.tried}
    return found


def staged_sum() -> torch.Tensor:
    """A bucket that travels in segments through memory of their own, as it does from a GPU."""
    transport = Transport(dist.new_group(backend="gloo"), torch.device("cpu"), 64, staged=True)
    bucket = Bucket(0, [], [], torch.arange(100.0) * (dist.get_rank() + 1))
    transport.begin()
    transport.send(bucket)
    transport.wait(bucket)
    transport.close()
    return bucket.buffer


def busy_when_back() -> float:
    """Seconds in which the link was busy, as whoever waits for a bucket reads them; a message takes 10 ms longer."""
    transport = Transport(dist.new_group(backend="gloo"), torch.device("cpu"), None, link=Link(latency=0.01))
    bucket, read = Bucket(0, [], [], torch.ones(100)), []

    class Arrival(threading.Event):
        def set(self) -> None:
            read.append(transport.busy)
            super().set()

    bucket.arrived = Arrival()
    transport.begin()
    transport.send(bucket)
    transport.wait(bucket)
    transport.close()
    return read[0]


def all_cases(folder: Path) -> None:
    """In each worker: train every case, then worker 1 fails while the others wait for its gradients."""
    found = {name: train(*case) for name, case in (CASES | ALONE).items()}
    with pytest.raises(LayerlabError, match="leaves some of 3 workers without an image"):
        fit(lenet, digits(), CommOverlap(), batch_size=2, progress=False)
    with pytest.raises(Refused, match=r"take no part in a step \(.*unused.weight.*\); set find_unused_parameters"):
        fit(Changing, digits(), CommOverlap(), batch_size=50, progress=False)
    found["staged"], found["busy"] = staged_sum(), busy_when_back()
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    if dist.get_rank() == 1:
        raise ValueError("the disk of this machine is full")
    fit(lenet, digits(), CommOverlap(), **SETTINGS)


JOB = """
import os, signal, sys, torch
from layerlab import build_model, fit, load_dataset
from layerlab_comm_overlap import CommOverlap

torch.set_num_threads(1)
folder = sys.argv[1]

class Killed:
    def on_fit_start(self, fit): pass
    def on_fit_end(self, fit, result):
        torch.save(result.model.state_dict(), f"{folder}/weights.pt")
    def on_exception(self, fit, error): pass
    def on_epoch_end(self, fit, row):
        if row["epoch"] == 2 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

data = load_dataset("digits", image_size=16, limit=200, device="cpu").augmented("crop", 1)
fit(lambda: build_model("lenet", num_classes=10, channels=1, image_size=16), data, CommOverlap(), epochs=4,
    batch_size=50, checkpoint=f"{folder}/state", observers=[Killed()], progress=False)
"""


HANG = """
import os, signal, sys
import torch.distributed as dist
from layerlab import LayerlabError, Strategy, build_model, fit, load_dataset
from layerlab_comm_overlap import CommOverlap, launch

class Stopped(Strategy):
    def on_epoch_start(self, run):
        if run.epoch == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

def job(name, options):
    data = load_dataset("digits", image_size=16, limit=200, device="cpu")
    network = build_model(name, num_classes=10, channels=1, image_size=16)
    fit(network, data, [Stopped(), CommOverlap(time_limit_s=4, **options)], epochs=3, batch_size=50, progress=False)

if __name__ == "__main__":
    for name, options in (("lenet", {}), ("mlp", {"pipeline_segments": False})):
        try:
            launch(job, 2, name, options, threads=1, time_limit=60)
        except LayerlabError as error:
            print(error)
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, LayerlabError]:
    """One job for all cases, because every worker imports torch anew: its folder, and the error with which it ends."""
    folder = tmp_path_factory.mktemp("launched")
    with pytest.raises(LayerlabError) as raised:
        launch(all_cases, WORKERS, folder, threads=1)
    return folder, raised.value


@pytest.fixture(scope="module")
def workers(launched) -> list[dict]:
    """What every worker of the launched job found before one of them failed."""
    folder, error = launched
    files = [folder / f"{rank}.pt" for rank in range(WORKERS)]
    assert all(file.exists() for file in files), str(error)
    return [torch.load(file) for file in files]


def run_script(text: str, folder: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """A script in a Python of its own, with what it printed on both streams."""
    (folder / "job.py").write_text(text)
    return subprocess.run([sys.executable, *before, str(folder / "job.py"), str(folder)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=180,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def one_process():
    """Each distinct case in one process."""
    known = {}

    def of(name: str) -> dict:
        network, others, _, more = CASES[name]
        key = (network, tuple(other.name for other in others), tuple(more.items()))
        if key not in known:
            known[key] = train(network, others, None, more)
        return known[key]

    return of


@pytest.mark.parametrize("name", CASES)
def test_workers_end_with_the_weights_of_one_process(name, workers, one_process):
    alone, first = one_process(name), workers[0][name]
    assert first["weights"].keys() == alone["weights"].keys()
    for key, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][key], weight, rtol=2e-4, atol=2e-6)
        assert all(torch.equal(first["weights"][key], other[name]["weights"][key]) for other in workers)
    # The losses of some are means over other batches, or a share's alone, or of other networks.
    if name not in ("uneven", "unused", "DDP as it comes", "DDP over a slow link"):
        for row, wanted in zip(first["history"], alone["history"], strict=True):
            assert row["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-4)
            assert row["test/top1"] == pytest.approx(wanted["test/top1"], abs=0.01)
    assert not any(each[name]["hooks"] for each in workers)


def test_all_workers_stay_with_the_same_of_all_ways(workers):
    ways = {"DDP, 1 MB buckets", "DDP, 5 MB buckets", "DDP, 25 MB buckets"}
    wanted, first = ways | {"1 + 2, 1 MB buckets", "1 + 2, 5 MB buckets"}, workers[0]["chosen"]
    assert set(first["tried"]) == wanted
    assert first["chosen"] in wanted
    for each in workers:
        assert (each["chosen"]["tried"], each["chosen"]["chosen"]) == (first["tried"], first["chosen"])
    # Nothing is chosen where the settings say how.
    assert workers[0]["switches 7"]["chosen"] == "1 + 2 + 3, 0.05 MB buckets"
    assert workers[0]["switches 7"]["tried"] == {}


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("epoch", [20, 33, 1000])
@pytest.mark.parametrize(("seconds", "wanted"), [
    ({"DDP": (1.0, 1.1), "1 + 2": (0.9, 0.95)}, 2),
    ({"DDP": (1.0, 1.1), "1 + 2": (1.2, 0.99)}, 0),
    ({"DDP": (1.2, 1.1), "1 + 2": (1.3, 1.2)}, 1),
])
def test_the_fastest_way_is_chosen_over_epochs_of_any_length(alone, monkeypatch, seconds, wanted, epoch):
    ways = [Way(1), Way(5), Way(1, (True, True, False)), Way(5, (True, True, False))]
    cost = dict(zip(ways, [*seconds["DDP"], *seconds["1 + 2"]], strict=True))
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    choice, visited = Choice(ways, torch.device("cpu")), []
    for _ in range(40):
        choice.interrupt()
        # What happens between two epochs belongs to no way.
        now += 100
        for step in range(epoch):
            choice.before_step(epoch - step)
            visited.append(choice.way)
            now += cost[choice.way]
    assert choice.over
    assert choice.way == ways[wanted]
    assert choice.seconds == pytest.approx({way.name: value for way, value in cost.items()})
    assert set(visited) == set(ways)


def test_epochs_too_short_for_a_visit_choose_nothing(alone):
    choice = Choice([Way(1), Way(5)], torch.device("cpu"))
    for _ in range(50):
        choice.interrupt()
        for step in range(9):
            assert not choice.before_step(9 - step)
    assert choice.way == Way(1)
    assert not choice.over


def test_a_wire_of_8_bits_carries_a_quarter_and_all_workers_end_alike(workers):
    cut, full = (workers[0][name]["history"][0]["comm-overlap/gradient_bytes"] for name in ("wire", "switches 7"))
    assert 0.25 <= cut / full < 0.26
    for each in workers[1:]:
        assert all(torch.equal(each["wire"]["weights"][key], weight)
                   for key, weight in workers[0]["wire"]["weights"].items())
    rounded, exact = (workers[0][name]["history"][-1]["train/loss"] for name in ("wire", "switches 7"))
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_segments_through_host_memory_come_back_summed(workers):
    assert all(torch.equal(each["staged"], torch.arange(100.0) * 6) for each in workers)


def test_whoever_waits_for_a_bucket_finds_its_seconds(workers):
    # Four messages one after the other on a ring of three, 10 ms each.
    assert all(each["busy"] >= 0.04 for each in workers)


def test_running_statistics_are_the_same_in_all_workers(workers):
    first = workers[0]["batch norm and dropout"]["weights"]
    assert any(key.endswith("running_var") for key in first)
    for each in workers[1:]:
        assert all(torch.equal(each["batch norm and dropout"]["weights"][key], value) for key, value in first.items())


# ------------------------------------------------------------------------------------ jobs that die


def test_a_worker_that_fails_ends_the_job_with_its_rank_its_error_and_its_traceback(launched, workers):
    _, error = launched
    assert str(error).startswith("Worker 1 of 3 died: ValueError: the disk of this machine is full")
    assert 'raise ValueError("the disk of this machine is full")' in str(error.__cause__)


@slow
def test_a_worker_that_stops_ends_the_job_with_its_rank_after_the_time_limit(tmp_path):
    # Nothing else is printed: neither the launcher's logs nor the other worker's traceback.
    first, second = run_script(HANG, tmp_path).stdout.splitlines()
    for line in (first, second):
        assert line.startswith("Worker 1 of 2 does not answer: worker 0 waited 4 s for it.")
        assert "CommOverlap(time_limit_s=…)" in line


@slow
def test_after_a_kill_torchrun_goes_on_from_the_last_checkpoint(tmp_path):
    job = run_script(JOB, tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                     "--max-restarts=1", "--monitor-interval=0.1")
    assert job.returncode == 0, job.stdout
    assert "exitcode: -9" in job.stdout
    undisturbed = fit(lenet, digits(), epochs=4, batch_size=50, progress=False).model.state_dict()
    resumed = torch.load(tmp_path / "weights.pt")
    for key, weight in undisturbed.items():
        torch.testing.assert_close(resumed[key], weight, rtol=2e-4, atol=2e-6)
    state = torch.load(tmp_path / "state" / "state.pt", weights_only=True)
    assert [row["epoch"] for row in state["history"]] == [1, 2, 3, 4]


def test_bad_numbers_are_named():
    with pytest.raises(LayerlabError, match="workers must be at least 1, got 0"):
        launch(print, 0)
    with pytest.raises(LayerlabError, match=r"comm-overlap: setting 'segment_mb' .*greater than 0"):
        CommOverlap(segment_mb=0)


# ------------------------------------------------------------------------------------ the order and the model


def test_the_order_takes_what_the_next_forward_needs_first_and_never_idles():
    # Two buckets of the last layers are ready early, the first layer's late: it overtakes what is left of them.
    order = order_of_segments([1.0, 2.0, 5.0], [2, 1, 0], [4, 4, 2], [1.0, 1.0, 1.0])
    assert order == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (1, 3), (0, 1), (0, 2), (0, 3)]
    assert order_of_segments([0.0, 0.0], [1, 0], [2, 1], [1.0, 1.0]) == [(1, 0), (0, 0), (0, 1)]


LAYERS = pd.DataFrame({"layer": ["a", "b"], "forward": [1.0, 1.0], "backward": [2.0, 2.0], "bytes": [1, 1]})
BUCKETS = [[0, 1], [1, 0]]


@pytest.mark.parametrize(("on", "seconds"), [
    # Two buckets of a second each over 6 seconds of computing: one after the other 8; the first under the backward of
    # layer a: 7; the last arrives under the forward of a: 7; the best: only a's own second cannot be hidden.
    ((False, False, False), 8.0), ((True, False, False), 7.0), ((False, True, False), 7.0), ((True, True, False), 7.0),
])
def test_the_model_counts_what_can_be_hidden(on, seconds):
    link = AllReduce(0.0, 1.0)
    switches = dict(zip(SWITCHES, on, strict=True))
    # Between two workers a ring carries each byte once.
    assert step_seconds(LAYERS, BUCKETS, link, 2, switches, 1.0) == pytest.approx(seconds)
    assert step_seconds(LAYERS, BUCKETS, link, 1, switches, 1.0) == pytest.approx(6.0)


def test_latency_and_bandwidth_are_found_again_in_times_of_rings():
    true = AllReduce(1e-3, 1e7)
    sizes = [2**12, 2**16, 2**20, 2**22]
    times = pd.DataFrame({"bytes": sizes, "seconds": [true.delay(4) + true.busy(size, 4) for size in sizes]})
    found = fit_link(times, 4)
    assert (found.latency, found.bandwidth) == (pytest.approx(1e-3), pytest.approx(1e7))
    tree = AllReduce(1e-3, 1e7, "tree")
    assert tree.delay(4096) == pytest.approx(24e-3)
    assert true.delay(4096) == pytest.approx(8.19)


def measured(layers: pd.DataFrame, workers: int, factors: dict[str, float]) -> Measured:
    """Steps that take so many times what the model says of them, and `STOCK` between the two."""
    link = AllReduce(1e-3, 1e7)
    sizes = (2**12, 2**18, 2**22)
    times = [{"bytes": size, "seconds": link.delay(workers) + link.busy(size, workers)} for size in sizes]
    buckets = [[size if number == layer else 0 for number in range(len(layers))]
               for layer, size in reversed(list(enumerate(layers["bytes"])))]
    seconds = {"compute alone": [layers[["forward", "backward"]].to_numpy().sum()], "communicate alone": [0.5]}
    results = {"layers": layers, "link": pd.DataFrame(times), "buckets": buckets, "seconds": seconds}
    found = Measured(workers, results, {"segment_mb": 0.25, "in_flight": 2})
    for name, factor in factors.items():
        seconds[name] = [factor * found.predict(name)]
    for part, name in enumerate(STOCK):
        seconds[name] = [seconds["no overlap"][0] * (0.8 - 0.1 * part)]
    return found


TWO_LAYERS = pd.DataFrame({"layer": ["a", "b"], "forward": [0.1, 0.1], "backward": [0.2, 0.2],
                           "bytes": [2**20, 2**22]})
FOUR_LAYERS = pd.DataFrame({"layer": list("abcd"), "forward": [0.2, 0.1, 0.05, 0.02],
                            "backward": [0.4, 0.2, 0.1, 0.04], "bytes": [2**16, 2**19, 2**21, 2**23]})
PAIR = ("no overlap", "all together")


@pytest.mark.parametrize("layers", [TWO_LAYERS, FOUR_LAYERS])
def test_what_the_model_says_is_as_uncertain_as_it_was_wrong(layers):
    found = [measured(layers, 2, {"no overlap": 1.1, "all together": 1.4}),
             measured(layers, 4, {"no overlap": 1.2, "all together": 0.9})]
    off = margins(found, PAIR)
    assert off.seconds == (pytest.approx(0.9), pytest.approx(1.4))
    assert off.gain == (pytest.approx(1.1 / 1.4), pytest.approx(1.2 / 0.9))
    curves = scaling(found[0], [1, 16, 64], PAIR, off)
    at = curves[(curves["variant"] == "all together") & (curves["algorithm"] == "ring")].set_index("workers")
    assert at["speed low"][16] == pytest.approx(at["speed"][16] / 1.4)
    assert at["speed high"][16] == pytest.approx(at["speed"][16] / 0.9)
    assert at["gain low"][64] == pytest.approx(at["gain"][64] * 1.1 / 1.4)
    assert at["speed low"][1] == at["speed high"][1] == pytest.approx(1.0)
    # A model that was never wrong is still only a model: its own word is within.
    assert margins([measured(layers, 2, dict.fromkeys(PAIR, 1.3))], PAIR).seconds[0] == 1.0


@pytest.mark.parametrize("layers", [TWO_LAYERS, FOUR_LAYERS])
def test_the_announced_speeds_and_their_trend_stand_beside_the_models(layers):
    found = measured(layers, 2, {"no overlap": 1.0, "all together": 1.25})
    published = pd.DataFrame({"GPUs": [16, 64], "speed": [14.7, 27.0], "more than without [%]": [46, 71]})
    off = margins([found], PAIR)
    table = analysis.announced(scaling(found, [16, 64], PAIR, off), published.set_index("GPUs"))
    assert table["quantity"].tolist() == ["speed", "gain [%]", "speed", "gain [%]", "trend [points]"]
    assert table["published"].tolist() == [14.7, 46, 27.0, 71, 25]
    assert (table["low"] <= table["model"]).all()
    assert (table["model"] <= table["high"]).all()
    gain = table[table["quantity"] == "gain [%]"].set_index("GPUs")["model"]
    assert table["model"].iloc[-1] == pytest.approx(gain[64] - gain[16])


@pytest.mark.parametrize("layers", [TWO_LAYERS, FOUR_LAYERS])
def test_gains_over_ddp_are_over_its_fastest_buckets(layers):
    found = measured(layers, 2, dict.fromkeys(PAIR, 1.0))
    assert analysis.best_stock(found) == "DDP, 25 MB buckets"
    table = analysis.against_bounds({2: found}).set_index("variant")
    assert table["over DDP"]["DDP, 25 MB buckets"] == pytest.approx(1.0)
    assert table["over DDP"]["no overlap"] == pytest.approx(0.6)
    assert table["gain"]["DDP, 5 MB buckets"] == pytest.approx(1 / 0.7)


def test_gates_read_what_overlap_could_gain_and_how_far_weights_are_apart():
    # Compute takes 0.6 s, communicating 0.5 s.
    found = measured(TWO_LAYERS, 2, dict.fromkeys(PAIR, 1.0))
    weights = pd.DataFrame({"workers": [1, 2, 2, 4], "difference": [0.0, 1e-15, 3e-15, 1.0]})
    assert analysis.gate_numbers(found, weights) == {
        "possible gain": pytest.approx(1.1 / 0.6), "weights differ by": 3e-15}


@pytest.mark.parametrize(("factor", "steps"), [(0.5, 8), (1.25, 20)])
def test_stock_ddp_takes_the_steps_that_the_seconds_of_overlap_buy(factor, steps):
    found = measured(TWO_LAYERS, 2, dict.fromkeys(PAIR, 1.0))
    seconds = found.results["seconds"]
    # 16 steps take the fastest DDP 16, and all together so many times as long.
    seconds["all together"] = [factor * value for value in seconds["DDP, 25 MB buckets"]]
    runs = analysis.equal_seconds(
        found, {"name": "digits", "image_size": 16, "limit": 400, "device": "cpu"},
        {"name": "lenet", "num_classes": 10, "channels": 1, "image_size": 16},
        {"epochs": 2, "batch_size": 50, "lr": 0.05, "device": "cpu"}, [0, 1])
    whole, short = (runs.results[arm, 1] for arm in ("all together", "all together · equal seconds"))
    assert (whole.steps, short.steps) == (16, steps)
    assert runs.pays("all together").length == steps / 16
    assert runs.seeds == [0, 1]


# ------------------------------------------------------------------------------------ before the first step


@pytest.mark.parametrize("network", [lenet, chain])
def test_a_frozen_network_has_no_idle_parameters(network):
    found = CommOverlap().preflight(network().requires_grad_(False), torch.zeros(2, 1, 16, 16))
    assert not found.covered
    assert set(found.left_out.values()) == {"frozen before the fit"}


def test_a_preflight_says_which_parameters_take_no_part_and_what_a_share_of_the_batch_changes():
    example = torch.zeros(2, 1, 16, 16)
    found = CommOverlap().preflight(Changing(), example)
    assert found.left_out == dict.fromkeys(("unused.weight", "unused.bias"), "it takes no part in a step")
    assert "On several workers, comm-overlap waits for" in found.notes[0]
    assert not CommOverlap(find_unused_parameters=True).preflight(Changing(), example).notes
    residual = CommOverlap().preflight(Residual(), example)
    assert not residual.left_out
    assert any("batch norms normalise by a worker's share" in note for note in residual.notes)


@pytest.mark.parametrize("network", [Borrowing, Residual])
def test_a_preflight_leaves_network_and_random_numbers_as_they_were(network):
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    CommOverlap().preflight(model, torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
