"""What a low-bit training step takes against a float32 step: the ratio of processor time, by turns.

Run: python benchmarks/low_bit_step.py [NETWORK …] [--batch 128] [--rounds 21]
A step is forward, backward, rounding with its statistics, and the update (SGD with momentum), on batches that are there
beforehand. torchao's int8 training, whose products are int8 and which acts on linear layers only, runs beside it on the
same MLPs. Processor time rather than seconds, so that what else the machine does counts less. The goal is at most 1.44
times a float32 step with 8 bits on the MLP, where torchao's int8 was on a processor without int8 units.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from layerlab import Fit, Strategy, build_model, noise
from layerlab.measure import machine_name, time_by_turns
from layerlab_low_bit import LowBit
from layerlab_low_bit.method.peers import torchao_networks
from layerlab_low_bit.method.products import has_units


class Task(NamedTuple):
    """A network, an image's shape, the steps of a turn, and whether torchao covers its layers."""

    network: str
    options: Mapping[str, Any]
    shape: tuple[int, int, int]
    steps: int
    linear: bool


TASKS: Mapping[str, Task] = {
    "mlp": Task("mlp", {"width": 784}, (1, 28, 28), 5, True),
    "small-mlp": Task("mlp", {"width": 128}, (1, 28, 28), 30, True),
    "lenet": Task("lenet", {"channels": 1}, (1, 28, 28), 2, False),
    "resnet-20": Task("resnet-cifar", {"depth": 20}, (3, 32, 32), 1, False),
}


def steps_of(
    build: Callable[[], nn.Module], strategies: Sequence[Strategy], task: Task, batch: int
) -> Callable[[], None]:
    """What trains for a turn."""
    data = noise(batch * task.steps, task.shape, "cpu")
    job = Fit(build, data, strategies, epochs=2, batch_size=batch, lr=1e-3, measure=False)
    job.train_epoch()
    run = job.run
    run.training_model.train()
    batches = list(run.data.batches(batch, run.generator, torch.float32, run.memory_format))

    def turn() -> None:
        for x, y in batches:
            run.plain_step(x, y)
            run.step += 1

    return turn


def arms_of(task: Task, batch: int) -> dict[str, Callable[[], None]]:
    """Arm → its turn."""

    def build() -> nn.Module:
        return build_model(task.network, **task.options)

    arms = {"float32": steps_of(build, (), task, batch)}
    arms |= {f"{bits} bits": steps_of(build, [LowBit(bits=bits)], task, batch) for bits in (8, 16)}
    if task.linear and importlib.util.find_spec("torchao") is not None:
        arms["torchao int8"] = steps_of(torchao_networks(build)["torchao int8"], (), task, batch)
    return arms


def compare(name: str, batch: int, rounds: int) -> None:
    """Print each arm's time over float32's, round by round by turns, with quartiles."""
    steps = TASKS[name].steps
    turns = time_by_turns(arms_of(TASKS[name], batch), rounds, clock="processor")
    print(f"\n{name}, batch {batch}, {rounds} rounds of {steps} steps: times float32 (quartiles), "
          "processor time of a step")
    for arm, of_arm in turns.items():
        middle, low, high = of_arm.ratio(turns["float32"])
        print(f"{arm:14} {middle:.2f} × ({low:.2f} to {high:.2f})  {of_arm.median / steps * 1e3:9.2f} ms", flush=True)


def main() -> None:
    """The chosen networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(TASKS)}; default: all")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=21)
    chosen = parser.parse_args()
    for name in chosen.networks:
        if name not in TASKS:
            parser.error(f"there is no network {name!r}; choose from {', '.join(TASKS)}")
    torch.set_num_threads(1)
    units = "has" if has_units("int8", torch.device("cpu")) else "has no"
    print(f"{machine_name()}, torch {torch.__version__}, one thread; the processor {units} int8 units")
    if importlib.util.find_spec("torchao") is None:
        print("torchao is left out, since it is not installed: pip install torchao.")
    for name in chosen.networks or TASKS:
        compare(name, chosen.batch, chosen.rounds)


if __name__ == "__main__":
    main()
