"""The networks that layerlab brings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from layerlab.base.errors import LayerlabError


def vgg_f(
    num_classes: int = 1000, image_size: int = 224, channels: int = 3, width: int = 4096, lrn: bool = False
) -> nn.Sequential:
    """VGG-F (CNN-F; Chatfield et al., BMVC 2014).

    Weights start from He et al.'s normal distribution, biases from zero.

    Args:
        num_classes: outputs.
        image_size: pixels of a side, at least 48. At 224 the convolutions see 54, 27, 13, 13 and 13 pixels a side.
        channels: of the image.
        width: of the two hidden fully connected layers; 4096 in the paper.
        lrn: the published network's local response normalisation behind the first two convolutions, with the
            constants of AlexNet: k = 2, n = 5, β = 0.75, and α = 1e-4 for each of the n neighbours.
    """
    if image_size < 48:
        raise LayerlabError(f"vgg-f needs images of at least 48 pixels a side, got {image_size}; enlarge them.")
    features = nn.Sequential()
    before = channels
    shapes = [(64, 11, 4, 0), (256, 5, 1, 2), (256, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)]
    for number, (after, kernel, stride, padding) in enumerate(shapes, 1):
        features.add_module(f"conv{number}", nn.Conv2d(before, after, kernel, stride, padding))
        features.add_module(f"relu{number}", nn.ReLU(inplace=True))
        if lrn and number < 3:
            # torch divides alpha by the size.
            features.add_module(f"norm{number}", nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0))
        if number in (1, 2, 5):
            # Caffe's pooling rounds up for pool1 and pool2: 27 and 13 pixels, as in the published network.
            features.add_module(f"pool{number}", nn.MaxPool2d(3, 2, ceil_mode=number < 5 or image_size < 64))
        before = after
    with torch.no_grad():
        flat = features(torch.zeros(1, channels, image_size, image_size)).flatten(1).shape[1]
    classifier = nn.Sequential()
    for number, (inputs, outputs) in enumerate([(flat, width), (width, width), (width, num_classes)], 6):
        classifier.add_module(f"fc{number}", nn.Linear(inputs, outputs))
        if number < 8:
            classifier.add_module(f"relu{number}", nn.ReLU(inplace=True))
            classifier.add_module(f"drop{number}", nn.Dropout(0.5))
    network = nn.Sequential()
    network.add_module("features", features)
    network.add_module("flatten", nn.Flatten())
    network.add_module("classifier", classifier)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return network


def mlp(
    num_classes: int = 10, image_size: int = 28, channels: int = 1, width: int = 784, depth: int = 2
) -> nn.Sequential:
    """A multilayer perceptron on the flattened image: `depth` hidden layers of `width` with ReLU."""
    network = nn.Sequential()
    network.add_module("flatten", nn.Flatten())
    inputs = channels * image_size**2
    for number in range(1, depth + 1):
        network.add_module(f"fc{number}", nn.Linear(inputs, width))
        network.add_module(f"relu{number}", nn.ReLU(inplace=True))
        inputs = width
    network.add_module("output", nn.Linear(inputs, num_classes))
    return network


def lenet(num_classes: int = 10, image_size: int = 28, channels: int = 1) -> nn.Sequential:
    """LeNet as Caffe's MNIST example has it: two convolutions, two linear layers, max pooling and one ReLU.

    431,080 parameters for ten classes and images of 28 pixels.

    Args:
        num_classes: outputs.
        image_size: pixels of a side, at least 16.
        channels: of the image.
    """
    if image_size < 16:
        raise LayerlabError(f"lenet needs images of at least 16 pixels a side, got {image_size}; enlarge them.")
    side = -(-(-(-(image_size - 4) // 2) - 4) // 2)  # poolings round up, as Caffe's do
    network = nn.Sequential()
    network.add_module("conv1", nn.Conv2d(channels, 20, 5))
    network.add_module("pool1", nn.MaxPool2d(2, ceil_mode=True))
    network.add_module("conv2", nn.Conv2d(20, 50, 5))
    network.add_module("pool2", nn.MaxPool2d(2, ceil_mode=True))
    network.add_module("flatten", nn.Flatten())
    network.add_module("fc1", nn.Linear(50 * side * side, 500))
    network.add_module("relu1", nn.ReLU(inplace=True))
    network.add_module("fc2", nn.Linear(500, num_classes))
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return network


class _Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut without parameters (He et al., CVPR 2016, Section 4.2, option A)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu2 = nn.ReLU(inplace=True)
        self.stride, self.missing = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        """Images of (batch, before, height, width) → (batch, after, height / stride, width / stride)."""
        shortcut = x
        if self.stride > 1 or self.missing:
            shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + shortcut)


class _Bottleneck(nn.Module):
    """BN–ReLU–convolution three times: 1 × 1, 3 × 3, 1 × 1 (He et al., ECCV 2016)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.bn1 = nn.BatchNorm2d(before)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.downsample = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 or before != after else None

    def forward(self, x: Tensor) -> Tensor:
        """Images of (batch, before, height, width) → (batch, 4 · width, height / stride, width / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv1(self.relu1(self.bn1(x)))
        x = self.conv2(self.relu2(self.bn2(x)))
        return self.conv3(self.relu3(self.bn3(x))) + shortcut


def _residual(
    block: Callable[[int, int, int], nn.Module], blocks: int, widths: tuple[int, int, int], expansion: int,
    channels: int, start: int, num_classes: int, preactivation: bool,
) -> nn.Sequential:
    """Stem, three stages and classifier of the CIFAR residual networks."""
    network = nn.Sequential()
    network.add_module("conv", nn.Conv2d(channels, start, 3, 1, 1, bias=False))
    if not preactivation:
        network.add_module("bn", nn.BatchNorm2d(start))
        network.add_module("relu", nn.ReLU(inplace=True))
    before = start
    for stage, width in enumerate(widths, 1):
        network.add_module(f"stage{stage}", nn.Sequential())
        for number in range(blocks):
            stride = 2 if stage > 1 and number == 0 else 1
            network.get_submodule(f"stage{stage}").add_module(str(number), block(before, width, stride))
            before = expansion * width
    if preactivation:
        network.add_module("bn", nn.BatchNorm2d(before))
        network.add_module("relu", nn.ReLU(inplace=True))
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("fc", nn.Linear(before, num_classes))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network


def resnet_cifar(num_classes: int = 10, channels: int = 3, depth: int = 20) -> nn.Sequential:
    """The residual network for small images (He et al., CVPR 2016, Section 4.2): 6n + 2 layers, widths 16, 32, 64.

    Shortcuts have no parameters: 269,722 parameters with 20 layers, 853,018 with 56.

    Args:
        num_classes: outputs.
        channels: of the image, whose sides are any multiple of 4.
        depth: 20, 32, 44, 56, 110, …
    """
    if depth < 8 or (depth - 2) % 6:
        raise LayerlabError(f"resnet-cifar has 6n + 2 layers (8, 14, 20, …, 56, 110), got depth={depth}.")
    return _residual(_Block, (depth - 2) // 6, (16, 32, 64), 1, channels, 16, num_classes, preactivation=False)


def preact_resnet(num_classes: int = 10, channels: int = 3, depth: int = 164) -> nn.Sequential:
    """The pre-activation residual network of bottlenecks for small images (He et al., ECCV 2016): 9n + 2 layers.

    1,703,258 parameters and 247.65 M multiply-accumulates (32 pixels) with 164 layers.

    Args:
        num_classes: outputs.
        channels: of the image, whose sides are any multiple of 4.
        depth: 11, 20, 29, 56, 110, 164, …
    """
    if depth < 11 or (depth - 2) % 9:
        raise LayerlabError(f"preact-resnet has 9n + 2 layers (11, 20, 29, 56, 110, 164), got depth={depth}.")
    return _residual(_Bottleneck, (depth - 2) // 9, (16, 32, 64), 4, channels, 16, num_classes, preactivation=True)


def vgg_cifar(
    num_classes: int = 10, channels: int = 3, depth: int = 11, batch_norm: bool = True
) -> nn.Sequential:
    """VGG (Simonyan & Zisserman, ICLR 2015, Table 1, A or D) for small images, with one linear layer behind it.

    The usual form for CIFAR-10: 3 × 3 convolutions, five poolings, a classifier of 512 inputs.

    Args:
        num_classes: outputs.
        channels: of the image, whose sides are at least 32 pixels.
        depth: 11 or 16.
        batch_norm: behind every convolution.
    """
    plans = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}
    if depth not in plans:
        raise LayerlabError(f"vgg-cifar has 11 or 16 layers, got depth={depth}.")
    network, features = nn.Sequential(), nn.Sequential()
    before = channels
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512, 512), plans[depth], strict=True), 1):
        for number in range(1, count + 1):
            features.add_module(f"conv{stage}_{number}", nn.Conv2d(before, width, 3, 1, 1, bias=not batch_norm))
            if batch_norm:
                features.add_module(f"bn{stage}_{number}", nn.BatchNorm2d(width))
            features.add_module(f"relu{stage}_{number}", nn.ReLU(inplace=True))
            before = width
        features.add_module(f"pool{stage}", nn.MaxPool2d(2))
    network.add_module("features", features)
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("fc", nn.Linear(before, num_classes))
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


class _LargestOfEach(nn.Module):
    """The largest value of each channel: `nn.AdaptiveMaxPool2d(1)` is not deterministic on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) → (batch, channels)."""
        return x.amax((2, 3))


class _Scaled(nn.Linear):
    """A linear layer without a bias whose outputs are multiplied by a constant."""

    def __init__(self, inputs: int, outputs: int, scale: float) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs) → (batch, outputs)."""
        return super().forward(x) * self.scale


def airnet(
    num_classes: int = 10, channels: int = 3, widths: tuple[int, int, int] = (32, 128, 128)
) -> nn.Sequential:
    """A fast network for small images, after airbench94's (Jordan, arXiv 2404.00498, Section 3.1).

    A 2 × 2 convolution with two filters for each value of a patch, which `fit(whitening=True)` whitens the images with;
    three blocks of convolution, pooling, batch norm, GELU and again convolution, batch norm, GELU; the maximum over
    each map; a linear layer, scaled by 1/9. Convolutions begin as the identity on their first channels; the batch
    norms' scales are constants. 498,104 parameters and 33.1 M multiply-accumulates at 32 pixels with the widths that it
    has by default; `airbench94` has airbench's own.

    Args:
        num_classes: outputs.
        channels: of the image, whose sides are at least 9 pixels.
        widths: channels of the three blocks.
    """
    if len(widths) != 3:
        raise LayerlabError(f"airnet has three blocks, got widths={tuple(widths)}; give three widths.")
    network = nn.Sequential()
    before = 8 * channels
    network.add_module("whiten", nn.Conv2d(channels, before, 2))
    network.add_module("activation", nn.GELU())
    for number, after in enumerate(widths, 1):
        block = nn.Sequential()
        for place, inputs in enumerate((before, after), 1):
            block.add_module(f"conv{place}", nn.Conv2d(inputs, after, 3, padding=1, bias=False))
            if place == 1:
                block.add_module("pool", nn.MaxPool2d(2))
            # The statistics follow quickly (0.4 a step), since a training has few steps.
            norm = nn.BatchNorm2d(after, momentum=0.4)
            norm.weight.requires_grad_(False)
            block.add_module(f"bn{place}", norm)
            block.add_module(f"activation{place}", nn.GELU())
        network.add_module(f"block{number}", block)
        before = after
    network.add_module("pool", _LargestOfEach())
    network.add_module("fc", _Scaled(before, num_classes, 1 / 9))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is None:
            nn.init.dirac_(layer.weight.data[: layer.in_channels])
    return network


def airbench94(num_classes: int = 10, channels: int = 3) -> nn.Sequential:
    """`airnet` with airbench94's own widths, 64, 256, 256 (Jordan, arXiv 2404.00498, Section 3.1): for a GPU.

    1,972,792 parameters and 118.1 M multiply-accumulates at 32 pixels.

    Args:
        num_classes: outputs.
        channels: of the image, whose sides are at least 9 pixels.
    """
    return airnet(num_classes, channels, (64, 256, 256))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg-f": vgg_f, "mlp": mlp, "lenet": lenet, "resnet-cifar": resnet_cifar, "preact-resnet": preact_resnet,
    "vgg-cifar": vgg_cifar, "airnet": airnet, "airbench94": airbench94,
}
