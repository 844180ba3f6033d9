"""The paper's multilayer perceptron, and a convolutional chain for its future work."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn


def perceptron(
    num_classes: int = 10,
    image_size: int = 28,
    channels: int = 1,
    depth: int = 2,
    dropout: Sequence[float] = (0.2, 0.5),
    pixel_dropout: float = 0.0,
    initial: Literal["xavier", "torch"] = "xavier",
) -> nn.Sequential:
    """Model 0, 1, 2, … of the paper (Section 4): a perceptron whose hidden layers are as wide as the image has pixels.

    They have to be: without its first layer, the network must take the image itself. With 28 × 28 pixels and 10
    classes it has 7,850, 623,290 and 1,238,730 parameters for `depth` 0, 1 and 2.

    Args:
        num_classes, image_size, channels: of the data.
        depth: hidden layers.
        dropout: rate behind each hidden layer, from the input on; the last one holds for any further. The text's 0.8
            is the share that is kept.
        pixel_dropout: rate on the image itself.
        initial: `xavier`: uniform weights after Glorot & Bengio, biases 0.01; `torch`: as nn.Linear starts.

    Returns:
        A chain with layers `fc1`, `fc2`, …, `output`; logits, without the log-softmax.
    """
    width = channels * image_size**2
    children: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    if pixel_dropout:
        children["pixels"] = nn.Dropout(pixel_dropout)
    for number in range(1, depth + 1):
        children[f"fc{number}"] = nn.Linear(width, width)
        children[f"relu{number}"] = nn.ReLU(inplace=True)
        if dropout:
            children[f"drop{number}"] = nn.Dropout(dropout[min(number, len(dropout)) - 1])
    children["output"] = nn.Linear(width, num_classes)
    network = nn.Sequential(children)
    if initial == "xavier":
        for module in network.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.constant_(module.bias, 0.01)
    return network


def convolutional_chain(num_classes: int = 10, channels: int = 3, width: int = 32, depth: int = 4) -> nn.Sequential:
    """A chain of convolution blocks with matched shapes, for Section 5's future work.

    A stem (3×3 convolution with stride 2) that every sub-network keeps, `depth` blocks that leave the shape as it is
    (3×3 convolution, group norm, ReLU), global average pooling and a linear classifier. Group norm, because the
    sub-networks cannot share a batch norm's statistics.

    Args:
        num_classes, channels: of the data; its images may have any size.
        width: channels of every block, a multiple of 4.
        depth: blocks that can be detached: `block1`, `block2`, ….
    """
    def block(inputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, width, 3, stride, 1), nn.GroupNorm(width // 4, width),
                             nn.ReLU(inplace=True))

    children: OrderedDict[str, nn.Module] = OrderedDict(stem=block(channels, 2))
    for number in range(1, depth + 1):
        children[f"block{number}"] = block(width, 1)
    children["pool"] = nn.AdaptiveAvgPool2d(1)
    children["flatten"] = nn.Flatten()
    children["output"] = nn.Linear(width, num_classes)
    network = nn.Sequential(children)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(torch.as_tensor(module.bias))
    return network
