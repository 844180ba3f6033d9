"""`fit` beside cifar10-airbench's own training loop: the ratio of seconds an epoch, by turns, on the same device.

Run: python benchmarks/airbench.py [../cifar10-airbench], a clone of github.com/KellerJordan/cifar10-airbench
`--smoke` takes a few images and a round, to see that it runs: its ratio says nothing.
Airbench's program (legacy/airbench94.py) runs as it is, but for what it says of CUDA where there is none. `fit` trains
the same network with the same optimizer, schedule, whitening, averaging and data path, the last three in a strategy.
The goal is a ratio of at most 1.05.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from fit_overhead import WARMUP, epochs_by_turns
from pydantic import PrivateAttr
from torch import Tensor, nn

from layerlab import Dataset, Fit, Preflight, Run, Split, Strategy, load_dataset, pass_order
from layerlab.measure import machine_name


class WallClock:
    """A CUDA event where there is no CUDA."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        """Now."""
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: WallClock) -> float:
        """Milliseconds."""
        return 1e3 * (later.seconds - self.seconds)


def load(checkout: Path) -> Any:
    """Airbench's program as a module."""
    spec = importlib.util.spec_from_file_location("airbench94", checkout / "legacy" / "airbench94.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def device_of(airbench: Any, device: torch.device) -> Iterator[None]:
    """On a CPU: its network and its images in float32, where they are, and its clock the wall's."""
    if device.type == "cuda":
        yield
        return

    class Loader(airbench.CifarLoader):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, gpu="cpu")
            self.images: Tensor = self.images.float()

    def as_it_is(module: nn.Module) -> nn.Module:
        return module

    with mock.patch.object(nn.Module, "half", as_it_is), mock.patch.object(nn.Module, "cuda", as_it_is), \
            mock.patch.object(torch.cuda, "Event", WallClock), mock.patch.object(torch.cuda, "synchronize"), \
            mock.patch.object(airbench, "CifarLoader", Loader):
        yield


class Theirs:
    """Airbench's `main`, held after each epoch until it is asked for the next."""

    def __init__(self, airbench: Any) -> None:
        self.go: queue.Queue[None] = queue.Queue()
        self.seconds: queue.Queue[float | BaseException] = queue.Queue()
        self.before = 0.0
        airbench.evaluate = lambda *arguments, **options: 0.0
        airbench.print_training_details = self._told
        self.main = airbench.main
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.go.get()
        try:
            self.main(0)
        except BaseException as error:
            self.seconds.put(error)

    def _told(self, variables: dict[str, Any], is_final_entry: bool) -> None:
        if not is_final_entry:
            self.seconds.put(variables["total_time_seconds"])
            self.go.get()

    def epoch(self) -> float:
        """Train one; returns its seconds, by its own clock."""
        if not self.thread.is_alive():
            self.thread.start()
        self.go.put(None)
        total = self.seconds.get()
        if isinstance(total, BaseException):
            raise total
        seconds, self.before = total - self.before, total
        return seconds


class Alternating:
    """Airbench's data path: normalised and padded once, shifted all together each epoch, mirrored every other one."""

    def __init__(self, data: Split, padding: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        assert isinstance(data.images, Tensor)
        self.labels, self.padding, self.passes = data.labels, padding, 0
        images = data.normalise(data.images).to(dtype)
        mirrored = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        self.padded = nn.functional.pad(images, [padding] * 4, "reflect").contiguous(memory_format=memory_format)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Split.batches`, in the type that the images are kept in."""
        device, width = self.labels.device, self.padded.shape[-1] - 2 * self.padding
        shifts = torch.randint(2 * self.padding + 1, (2, len(self)), generator=generator).to(device)
        images = torch.empty((len(self), 3, width, width), dtype=self.padded.dtype, device=device)
        for row in range(2 * self.padding + 1):
            for column in range(2 * self.padding + 1):
                here = (shifts[0] == row) & (shifts[1] == column)
                images[here] = self.padded[here, :, row : row + width, column : column + width]
        if self.passes % 2:
            images = images.flip(-1)
        self.passes += 1
        order, count = pass_order(len(self), batch_size, generator)
        for indices in order.to(device)[: count * batch_size].split(batch_size):
            yield images[indices], self.labels[indices]


class Recipe(Strategy):
    """What of airbench's recipe is no setting of `fit`: its data path, the frozen whitening bias, averaged weights."""

    name: ClassVar[str] = "airbench"
    bias_epochs: int
    """After which the whitening layer's bias stays."""
    _kept: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _decays: Tensor = PrivateAttr(default_factory=lambda: torch.empty(0))

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """All layers; nothing is tried, since its data path takes the images of a `Split`."""
        return Preflight.of(network)

    def on_fit_start(self, run: Run) -> None:
        assert isinstance(run.data, Split)
        run.data = Alternating(run.data, 2, next(run.model.parameters()).dtype, torch.channels_last)
        self._kept = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        steps = run.epochs * (len(run.data) // run.batch_size)
        self._decays = 0.95**5 * (torch.arange(steps + 1) / steps) ** 3

    def on_epoch_start(self, run: Run) -> None:
        if run.epoch > self.bias_epochs:
            run.freeze(self.name, [run.model[1][0]])  # type: ignore[index]

    def training_step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        loss = run.plain_step(x, y)
        step = run.step + 1
        if step % 5 == 0:
            decay = self._decays[step].item()
            for kept, tensor in zip(self._kept.values(), run.model.state_dict().values(), strict=True):
                if tensor.is_floating_point():
                    kept.lerp_(tensor, 1 - decay)
                    tensor.copy_(kept)
        return loss


class Cast(nn.Module):
    """Images into the network's type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, 3, height, width)."""
        return x.to(self.dtype)


def ours(airbench: Any, data: Dataset, epochs: int) -> Fit:
    """The same training through layerlab's public interface."""
    chosen = airbench.hyp["opt"]
    kilostep = 1024 * (1 + 1 / (1 - chosen["momentum"]))
    rate, decay = chosen["lr"] / kilostep, chosen["weight_decay"] * chosen["batch_size"] / kilostep
    bias_rate = rate * chosen["bias_scaler"]
    steps = epochs * (len(data.train) // chosen["batch_size"])
    norm_biases: set[Tensor] = set()

    def network() -> nn.Module:
        made = airbench.make_net()
        norm_biases.update(p for name, p in made.named_parameters() if "norm" in name and p.requires_grad)
        assert isinstance(data.train.images, Tensor)
        airbench.init_whitening_conv(made[0], data.train.normalise(data.train.images[:5000]))
        return nn.Sequential(Cast(made[0].weight.dtype), made)

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        learning = [p for p in parameters if p.requires_grad]
        return torch.optim.SGD([
            {"params": [p for p in learning if p in norm_biases], "lr": bias_rate, "weight_decay": decay / bias_rate},
            {"params": [p for p in learning if p not in norm_biases], "lr": rate, "weight_decay": decay / rate},
        ], momentum=chosen["momentum"], nesterov=True)

    def factor(step: int) -> float:
        warm = int(steps * 0.23)
        return 0.2 + 0.8 * step / warm if step < warm else 1 - 0.93 * (step - warm) / (steps - warm)

    def schedule(of: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(of, factor)

    criterion = nn.CrossEntropyLoss(label_smoothing=chosen["label_smoothing"], reduction="none")
    loss: Callable[[Tensor, Tensor], Tensor] = lambda logits, labels: criterion(logits, labels).sum()  # noqa: E731
    return Fit(network, data, Recipe(bias_epochs=chosen["whiten_bias_epochs"]), epochs=epochs, loss=loss,
               batch_size=chosen["batch_size"], optimizer=optimizer, schedule=schedule, schedule_each="step",
               channels_last=True, measure=False, deterministic=False)


def main() -> None:
    """Warm up, then epochs by turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path("../cifar10-airbench"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--images", type=int, help="of CIFAR-10's training images; default: all on a GPU, 512 on a CPU")
    parser.add_argument("--batch-size", type=int, help="default: airbench's 1024 on a GPU, 128 on a CPU")
    parser.add_argument("--smoke", action="store_true", help="a few images, one round: only to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.images, options.batch_size = 1, 128, 32
    if not (options.checkout / "legacy" / "airbench94.py").exists():
        parser.error(f"{options.checkout} is no clone of cifar10-airbench; make one, or name its folder")
    device = torch.device(options.device)
    small = device.type == "cpu"
    data = load_dataset("cifar10", limit=options.images or (512 if small else None), test_limit=500, device=device)
    airbench = load(options.checkout)
    epochs = options.rounds + WARMUP
    airbench.hyp["opt"] |= {"train_epochs": epochs, "batch_size": options.batch_size or (128 if small else 1024)}
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, device_of(airbench, device):
        (Path(folder) / "cifar10").mkdir()
        for name, split in (("train", data.train), ("test", data.test)):
            assert isinstance(split.images, Tensor)
            torch.save({"images": split.images.permute(0, 2, 3, 1).cpu(), "labels": split.labels.cpu(),
                        "classes": list(range(data.classes))}, Path(folder) / "cifar10" / f"{name}.pt")
        os.chdir(folder)  # where it looks for its data
        try:
            job, theirs = ours(airbench, data, epochs), Theirs(airbench)
            fit, by_airbench = epochs_by_turns(job, theirs.epoch, options.rounds)
        finally:
            os.chdir(here)
    if options.smoke:
        print("Both trained by turns; a ratio of so few images says nothing.")
        return
    middle, low, high = fit.ratio(by_airbench)
    steps = ceil(len(data.train) // airbench.hyp["opt"]["batch_size"])
    print(f"{machine_name()}, torch {torch.__version__}; {len(data.train):,} images, {steps} steps an epoch")
    print(f"airbench94's network: fit / airbench = {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {options.rounds} "
          f"epochs each); {fit.median:.3f} against {by_airbench.median:.3f} s an epoch")


if __name__ == "__main__":
    main()
