"""The papers' networks that torchvision does not have, torchvision's by name, and the order in which layers run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision import models as torchvision_models

from layerlab.errors import LayerlabError, unknown

NORMALISATION = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def vgg_f(num_classes: int = 1000, image_size: int = 224, channels: int = 3, width: int = 4096) -> nn.Sequential:
    """VGG-F (CNN-F; Chatfield et al., BMVC 2014), without its two local response normalisations.

    Weights start from He et al.'s normal distribution, biases from zero.

    Args:
        num_classes: outputs.
        image_size: pixels of a side, at least 48. At 224 the convolutions see 54, 27, 13, 13 and 13 pixels a side.
        channels: of the image.
        width: of the two hidden fully connected layers; 4096 in the paper.
    """
    if image_size < 48:
        raise LayerlabError(f"vgg-f needs images of at least 48 pixels a side, got {image_size}; enlarge them.")
    features = nn.Sequential()
    before = channels
    shapes = [(64, 11, 4, 0), (256, 5, 1, 2), (256, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)]
    for number, (after, kernel, stride, padding) in enumerate(shapes, 1):
        features.add_module(f"conv{number}", nn.Conv2d(before, after, kernel, stride, padding))
        features.add_module(f"relu{number}", nn.ReLU(inplace=True))
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


MODELS: dict[str, Callable[..., nn.Module]] = {"vgg-f": vgg_f, "mlp": mlp}


def build_model(name: str, **options: Any) -> nn.Module:
    """A network by name: layerlab's (`vgg-f`, `mlp`) or any classification network of torchvision, untrained.

    Args:
        name: as in `model_names()`.
        options: for layerlab's: num_classes, image_size, channels and what its function takes besides. For
            torchvision's: num_classes and what its builder takes; image_size and channels are checked only where the
            network has a fixed image size.

    Raises:
        LayerlabError: unknown name (with the nearest spelling) or an option that the network does not have.
    """
    build = MODELS.get(name)
    if build is None:
        if name not in torchvision_models.list_models(module=torchvision_models):
            raise unknown("model", name, model_names())
        if options.pop("channels", 3) != 3:
            raise LayerlabError(f"torchvision's {name} takes 3-channel images; load the dataset with channels=3.")
        size = options.pop("image_size", None)
        if size and name.startswith(("vit", "maxvit")):
            options["image_size" if name.startswith("vit") else "input_size"] = (
                size if name.startswith("vit") else (size, size)
            )
        if name in ("googlenet", "inception_v3"):
            # Their auxiliary heads return a tuple in training, which no plain loss takes.
            options.setdefault("aux_logits", False)
            options.setdefault("init_weights", True)
        return _call(torchvision_models.get_model, name, name, weights=None, **options)
    return _call(build, name, **options)


def _call(build: Callable[..., nn.Module], label: str, *arguments: Any, **options: Any) -> nn.Module:
    try:
        return build(*arguments, **options)
    except (TypeError, ValueError) as error:
        takes = "" if arguments else f"; it takes {', '.join(inspect.signature(build).parameters)}"
        raise LayerlabError(f"Network {label!r} cannot be built: {error}{takes}.") from None


def model_names() -> list[str]:
    """Every name that `build_model` knows."""
    return sorted([*MODELS, *torchvision_models.list_models(module=torchvision_models)])


def forward_order(model: nn.Module, example: Tensor) -> list[tuple[str, nn.Module]]:
    """Modules with parameters of their own in the order in which the forward pass reaches them.

    Traced once in evaluation mode; the order of declaration does not matter. A module that is called several times
    stands where its last call is, since what precedes that call can only be left out of backward with it. A module
    with both parameters and children (a transformer's class token) stands where its call ends.

    Args:
        model: any network.
        example: images as the network takes them; the first two are used.

    Returns:
        (qualified name, module) pairs. Modules that the forward pass does not reach are left out.
    """
    calls: dict[nn.Module, int] = {}
    clock = iter(range(10**9))
    handles = [
        module.register_forward_hook(lambda module, *_: calls.__setitem__(module, next(clock)))
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(example[:2])
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    names = {module: name for name, module in model.named_modules()}
    return [(names[module], module) for module in sorted(calls, key=calls.__getitem__)]


def prefixes(
    model: nn.Module, example: Tensor, kind: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Conv2d
) -> list[tuple[str, list[nn.Module]]]:
    """For each layer of `kind` in forward order: its name, and every module that learns no later than it.

    A layer takes the normalisations that follow it along, up to the next layer that is none.
    """
    order = forward_order(model, example)
    found = []
    for index, (name, module) in enumerate(order):
        if not isinstance(module, kind):
            continue
        end = index + 1
        while end < len(order) and isinstance(order[end][1], NORMALISATION):
            end += 1
        found.append((name, [inner for _, inner in order[:end]]))
    return found
