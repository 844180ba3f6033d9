"""The first convolution as a whitening of the training images' patches, frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerlab.base.errors import Refused
from layerlab.contract.run import Run
from layerlab.workload.dataset import Split
from layerlab.workload.order import forward_order
from layerlab.workload.sources import Streamed

OWNER = "whitening"
# Training images whose patches are looked at, and what is added to each variance, in units of normalised pixels.
IMAGES, LEAST_VARIANCE = 5000, 5e-4
# Share of the epochs in which the bias learns.
BIAS_LEARNS = 0.3


def whiten(network: nn.Module, example: Tensor, split: Split) -> None:
    """Set and freeze the weight of a network's first layer.

    Filters are the eigenvectors of the patches' covariance, each over the square root of its eigenvalue, the largest
    first, and their negatives (Page, "How to train your ResNet", part 8, 2019; Jordan, arXiv 2404.00498, Section 3.2).

    Args:
        network: whose first layer is a convolution with at most twice as many filters as a patch has values.
        example: images as the network takes them.
        split: the training images.

    Raises:
        Refused: the first layer is none that can be set so.
    """
    name, layer = forward_order(network, example)[0]
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        raise Refused(f"whitening sets the first layer, which has to be a plain convolution, and {name!r} is "
                      f"{type(layer).__name__}; leave whitening=False.")
    most = 2 * layer.weight[0].numel()
    if len(layer.weight) > most:
        raise Refused(f"whitening gives the first layer at most {most} filters, two for each value of a patch, and "
                      f"{name!r} has {len(layer.weight)}; leave whitening=False.")
    vectors = _whitening(_first_images(split), layer)  # (values of a patch, values of a patch)
    half = -(-len(layer.weight) // 2)
    filters = torch.cat([vectors[:half], -vectors[:half]])[: len(layer.weight)]
    with torch.no_grad():
        layer.weight.copy_(filters.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.zero_()
    layer.weight.requires_grad_(False)


def _first_images(split: Split) -> Tensor:
    """The first training images, normalised, (n, channels, height, width)."""
    rows = torch.arange(min(IMAGES, len(split)))
    images = split.images
    raw = next(images.stream([rows])) if isinstance(images, Streamed) else images[: len(rows)]
    return split.normalise(raw.to(split.labels.device))


def _whitening(images: Tensor, layer: nn.Conv2d) -> Tensor:
    """Eigenvectors of the covariance of a layer's patches over their standard deviation, a row each, largest first."""
    size = layer.kernel_size
    covariance = torch.zeros((), dtype=torch.float64, device=images.device)
    count = 0
    # A few images at a time: their patches take as many times their memory as a kernel has pixels.
    for some in images.split(500):
        patches = nn.functional.unfold(some, size).transpose(1, 2).flatten(0, 1)  # (patches, values of a patch)
        covariance = covariance + (patches.T @ patches).double()
        count += len(patches)
    values, vectors = torch.linalg.eigh(covariance / count)
    scaled = vectors.T / (values.clamp_min(0) + LEAST_VARIANCE).sqrt()[:, None]
    return scaled.flip(0).float()


def freeze_bias(run: Run) -> None:
    """From a share of the epochs on, freeze what is left to learn of the whitening, for backward to end behind it."""
    if run.epoch > max(1, round(BIAS_LEARNS * run.epochs)):
        # Looked for anew, since a strategy may have put another layer in its place.
        run.freeze(OWNER, [forward_order(run.model, run.example)[0][1]])
