"""The small networks that every strategy is checked on."""

from __future__ import annotations

from collections.abc import Callable

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


NETWORKS: dict[str, Network] = {"residual": residual_network, "cnn": plain_cnn, "mlp": mlp}
