"""The small networks that every strategy is checked on."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

SHAPE = (1, 8, 8)
CLASSES = 10
Network = Callable[[], nn.Module]


def mlp() -> nn.Module:
    """Two linear layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def plain_cnn() -> nn.Module:
    """Two convolutions without batch norm, pooling, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )


def residual_network() -> nn.Module:
    """A convolution, two residual blocks with batch norm and a classifier, whose class is a new one at each call."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
            self.conv2, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
            self.block1, self.block2 = Block(), Block()
            self.classifier = nn.Linear(12, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.block2(self.block1(self.stem(x))).mean((2, 3)))

    return Residual()


def relu_thrice(shared: bool = True) -> nn.Module:
    """A chain of linear layers with one ReLU object after each, or with one of its own."""
    parts: list[nn.Module] = [nn.Flatten()]
    relu = nn.ReLU()
    for width in (64, 32, 32):
        parts += [nn.Linear(width, 32), relu if shared else nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(32, CLASSES))


def block_twice() -> nn.Module:
    """A block of convolution, batch norm and ReLU that runs under two names."""

    class BlockTwice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
            self.block1 = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
            self.block2 = self.block1
            self.classifier = nn.Linear(12, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.block2(self.block1(self.stem(x))).mean((2, 3)))

    return BlockTwice()


def tied_linear() -> nn.Module:
    """A chain of linear layers, the second and third of which have one weight."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                            nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    cast(nn.Linear, network[5]).weight = cast(nn.Linear, network[3]).weight
    return network


def tied_convolutions() -> nn.Module:
    """Three convolutions with batch norms, the second and third of which have one weight."""
    network = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1),
        nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES),
    )
    cast(nn.Conv2d, network[6]).weight = cast(nn.Conv2d, network[3]).weight
    return network


def two_modes() -> nn.Module:
    """A network that runs other operations in training than in evaluation."""

    class TwoModes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
            self.conv2, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
            self.classifier = nn.Linear(12, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm1(self.conv1(x)))
            if self.training:
                x = 0.9 * x
            return self.classifier(torch.relu(self.norm2(self.conv2(x))).mean((2, 3)))

    return TwoModes()


def pixel_shuffle() -> nn.Module:
    """A network that turns channels into pixels in between."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.PixelShuffle(2),
        nn.Conv2d(4, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES),
    )


def weight_normed() -> nn.Module:
    """Two convolutions and a classifier whose weights are made of a size and a direction in each step."""
    made = nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        made(nn.Conv2d(1, 8, 3, padding=1)), nn.ReLU(), nn.MaxPool2d(2),
        made(nn.Conv2d(8, 12, 3, padding=1, bias=False)), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), made(nn.Linear(12, CLASSES)),
    )


SHARED: dict[str, Network] = {"relu-thrice": relu_thrice, "block-twice": block_twice}
TIED: dict[str, Network] = {"tied-linear": tied_linear, "tied-convolutions": tied_convolutions}
UNUSUAL: dict[str, Network] = {"two-modes": two_modes, "pixel-shuffle": pixel_shuffle,
                               "weight-normed": weight_normed}
NETWORKS: dict[str, Network] = {"residual": residual_network, "cnn": plain_cnn, "mlp": mlp}
