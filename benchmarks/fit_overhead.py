"""What `fit` costs over a hand-written PyTorch loop that does the same work: the ratio of seconds an epoch, by turns.

Run: python benchmarks/fit_overhead.py [--rounds 21] [--device cpu]
The goal is a ratio of at most 1.01 on both networks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from layerlab import Dataset, Fit, build_model, noise
from layerlab.measure import Turns, machine_name, synchronise

WARMUP = 2


class ByHand:
    """The loop that a practitioner would write: resident uint8 tensor, crop and flip, forward, backward, step."""

    def __init__(self, model: nn.Module, data: Dataset, batch_size: int, lr: float) -> None:
        assert isinstance(data.train.images, torch.Tensor)
        self.images, self.labels = data.train.images, data.train.labels
        self.model, self.batch_size = model.to(self.labels.device).train(), batch_size
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, foreach=True)
        self.generator = torch.Generator().manual_seed(0)
        device, channels = self.labels.device, self.images.shape[1]
        mean, std = torch.tensor(data.train.mean, device=device), torch.tensor(data.train.std, device=device)
        self.shift, self.scale = (-mean / std).view(1, channels, 1, 1), (1 / std).view(1, channels, 1, 1)

    def epoch(self) -> float:
        """Train one epoch; returns its seconds."""
        images, labels, batch_size, device = self.images, self.labels, self.batch_size, self.labels.device
        n, height, width = len(labels), *images.shape[-2:]
        synchronise(device)
        start = time.perf_counter()
        order = torch.randperm(n, generator=self.generator).to(device)
        rows, columns = torch.randint(9, (2, n), generator=self.generator).to(device)
        flips = torch.rand(n, generator=self.generator).to(device) < 0.5
        total = torch.zeros((), device=device)
        for i in range(n // batch_size):
            part = slice(i * batch_size, (i + 1) * batch_size)
            index = order[part]
            padded = nn.functional.pad(images[index], [4] * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
            batch = windows[torch.arange(batch_size, device=device), rows[part], columns[part]]
            batch = torch.where(flips[part].view(-1, 1, 1, 1), batch.flip(-1), batch)
            x, y = torch.addcmul(self.shift, batch.float(), self.scale), labels[index]
            self.optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        synchronise(device)
        return time.perf_counter() - start


def epochs_by_turns(job: Fit, other: Callable[[], float], rounds: int) -> tuple[Turns, Turns]:
    """Seconds of the epochs of a fit and of another loop, in alternating order; those of the first turns do not count.

    Args:
        job: of `rounds + WARMUP` epochs.
        other: trains an epoch and gives its seconds.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    sides = (lambda: job.train_epoch()["time/epoch_seconds"], other)
    for turn in range(rounds + WARMUP):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            taken = sides[side]()
            if turn >= WARMUP:
                seconds[side].append(taken)
    return Turns(tuple(seconds[0])), Turns(tuple(seconds[1]))


def compare(name: str, build, data: Dataset, batch_size: int, rounds: int) -> None:
    """Print fit's seconds an epoch over the hand-written loop's, round by round by turns."""
    job = Fit(build, data, epochs=rounds + WARMUP, batch_size=batch_size, lr=0.001)
    torch.manual_seed(0)
    hand = ByHand(build(), data, batch_size, 0.001)
    fit, by_hand = epochs_by_turns(job, hand.epoch, rounds)
    middle, low, high = fit.ratio(by_hand)
    steps = len(data.train) // batch_size
    print(f"{name}: fit / by hand = {middle:.3f} (quartiles {low:.3f} to {high:.3f}, "
          f"{rounds} rounds of {steps} steps); "
          f"{fit.median / steps * 1e3:.3f} against {by_hand.median / steps * 1e3:.3f} ms a step", flush=True)


def main() -> None:
    """Both networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{machine_name()}, torch {torch.__version__}")
    compare("MLP 784-128-128-10, batch 128", lambda: build_model("mlp", image_size=28, width=128),
            noise(6_400, (1, 28, 28), device).augmented("crop-flip", 4), 128, 5 * options.rounds)
    images = 640 if device.type == "cpu" else 12_800
    compare("VGG-F at 64×64, batch 32", lambda: build_model("vgg-f", num_classes=10, image_size=64, width=1024),
            noise(images, (3, 64, 64), device).augmented("crop-flip", 4), 32, options.rounds)


if __name__ == "__main__":
    main()
