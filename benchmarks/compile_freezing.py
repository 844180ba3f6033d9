"""torch.compile under a strategy that freezes and thaws: seconds an epoch against eager, by turns, and graphs made.

Run: python benchmarks/compile_freezing.py [--rounds 6] [--device cpu]
Every second epoch freezes the first half of a ResNet-18's convolutions. Once both patterns are compiled, no epoch may
make another graph.
"""

from __future__ import annotations

import argparse
from typing import ClassVar

import torch

from layerlab import Fit, Run, Strategy, build_model, noise, prefixes
from layerlab.measure import Turns, machine_name


class Alternate(Strategy):
    """Freeze the first half of the convolutions in every second epoch."""

    name: ClassVar[str] = "alternate"

    def on_epoch_start(self, run: Run) -> None:
        """Freeze or thaw."""
        layers = prefixes(run.model, run.example)
        run.freeze(self.name, layers[len(layers) // 2][1] if run.epoch % 2 == 0 else ())


def main() -> None:
    """Print the ratio for epochs of either kind, and the graphs of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    data = noise(512 if options.device == "cpu" else 12_800, (3, 32, 32), options.device).augmented("crop-flip", 4)
    epochs = 2 * options.rounds + 2
    settings = dict(epochs=epochs, batch_size=64, lr=0.001)
    jobs = {
        "compiled": Fit(lambda: build_model("resnet18", num_classes=10), data, Alternate(), compile=True, **settings),
        "eager": Fit(lambda: build_model("resnet18", num_classes=10), data, Alternate(), **settings),
    }
    rows: dict[str, list[dict]] = {name: [] for name in jobs}
    for _ in range(epochs):
        for name, job in jobs.items():
            rows[name].append(job.train_epoch())
    print(f"{machine_name()}, torch {torch.__version__}")
    print("graphs compiled an epoch:", [row["compile/graphs"] for row in rows["compiled"]])
    for kind, start in (("all learn", 2), ("first half frozen", 3)):
        compiled, eager = (
            Turns(tuple(row["time/epoch_seconds"] for row in rows[name][start::2])) for name in ("compiled", "eager")
        )
        middle, low, high = compiled.ratio(eager)
        print(f"{kind}: compiled / eager = {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {options.rounds} rounds)")


if __name__ == "__main__":
    main()
