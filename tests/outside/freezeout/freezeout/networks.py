"""The paper's networks for small images: DenseNet-BC, Wide ResNet and VGG."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from layerlab import LayerlabError, build_model


class _Dense(nn.Module):
    """BN-ReLU-conv1×1-BN-ReLU-conv3×3, whose result is put beside its input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.body(x)), 1)


class _Wide(nn.Module):
    """The pre-activated residual block of two 3×3 convolutions."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
        )
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.body(y) + (x if self.shortcut is None else self.shortcut(y))


def densenet_bc(classes: int, channels: int, depth: int = 76, growth: int = 12) -> nn.Module:
    """DenseNet-BC (Huang et al., CVPR 2017) for small images: three dense blocks, compression ½.

    Args:
        classes: outputs.
        channels: of the image.
        depth: 6n + 4 layers, n a block; the paper's 76.
        growth: channels that each layer adds; the paper's 12.
    """
    if depth < 10 or (depth - 4) % 6:
        raise LayerlabError(f"densenet-bc has 6n + 4 layers (10, 16, 22, …, 76), got depth={depth}.")
    width = 2 * growth
    parts: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
    for block in range(3):
        for _ in range((depth - 4) // 6):
            parts.append(_Dense(width, growth))
            width += growth
        if block < 2:
            parts += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return _initialised(nn.Sequential(*parts, nn.BatchNorm2d(width), *_head(width, classes)))


def wide_resnet(classes: int, channels: int, depth: int = 40, width: int = 4) -> nn.Module:
    """Wide ResNet (Zagoruyko & Komodakis, BMVC 2016) for small images.

    Args:
        classes: outputs.
        channels: of the image.
        depth: 6n + 4 layers, n blocks a stage; the paper's 40.
        width: factor of the stages' 16, 32 and 64 channels; the paper's 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise LayerlabError(f"wide-resnet has 6n + 4 layers (10, 16, 22, 28, 40, …), got depth={depth}.")
    before = 16
    parts: list[nn.Module] = [nn.Conv2d(channels, before, 3, padding=1, bias=False)]
    for stage, base in enumerate((16, 32, 64)):
        for block in range((depth - 4) // 6):
            parts.append(_Wide(before, base * width, 2 if stage and not block else 1))
            before = base * width
    return _initialised(nn.Sequential(*parts, nn.BatchNorm2d(before), *_head(before, classes)))


def vgg(classes: int, channels: int, depth: int = 16) -> nn.Module:
    """VGG for small images, from layerlab; the paper's has 16 layers."""
    return build_model("vgg-cifar", num_classes=classes, channels=channels, depth=depth)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"densenet-bc": densenet_bc, "wide-resnet": wide_resnet, "vgg": vgg}


def build(name: str, classes: int, channels: int, **options: int) -> nn.Module:
    """A network of the paper by name.

    Raises:
        LayerlabError: an unknown name, or an option that the network does not have.
    """
    if name not in NETWORKS:
        raise LayerlabError(f"Unknown network {name!r}; freezeout's are {', '.join(NETWORKS)}.")
    try:
        return NETWORKS[name](classes, channels, **options)
    except TypeError as error:
        raise LayerlabError(f"Network {name!r} cannot be built: {error}.") from None


def _head(width: int, classes: int) -> list[nn.Module]:
    return [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def _initialised(network: nn.Module) -> nn.Module:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network
