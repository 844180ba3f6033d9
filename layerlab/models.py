"""The papers' networks that torchvision does not have, torchvision's by name, and the order in which layers run."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision import models as torchvision_models

from layerlab.errors import LayerlabError, reason, unknown

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


MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg-f": vgg_f, "mlp": mlp, "lenet": lenet, "resnet-cifar": resnet_cifar, "preact-resnet": preact_resnet,
    "vgg-cifar": vgg_cifar,
}


def build_model(name: str, **options: Any) -> nn.Module:
    """A network by name, untrained: layerlab's own or any classification network of torchvision.

    Args:
        name: as in `model_names()`.
        options: for layerlab's: num_classes, channels, image_size where its weights depend on it, and what its
            function takes besides. For torchvision's: num_classes and what its builder takes; channels may only be 3,
            and image_size goes to the networks that are built for one (vision transformers).

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

    It is run once, eagerly, in evaluation mode; the order of declaration does not matter. A module that is called
    several times stands where its last call is, since what precedes that call can only be left out of backward with it.
    A module with both parameters and children (a transformer's class token) stands where its call ends.

    Args:
        model: any network.
        example: images as the network takes them; the first two are used.

    Returns:
        (qualified name, module) pairs. Modules that the forward pass does not reach are left out.
    """
    calls: dict[nn.Module, int] = {}
    clock = itertools.count()
    handles = [
        module.register_forward_hook(lambda module, *_: calls.__setitem__(module, next(clock)))
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # A network that is compiled would be compiled anew with these hooks in it.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
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


def network_builder(
    network: str, classes: int, shape: tuple[int, int, int], **options: Any
) -> Callable[[], nn.Module]:
    """What builds a network for given data, under whatever seed is set when it is called.

    Args:
        network: a name as in `model_names()`, or one's own: `module:function` or `path/to/file.py:function`, where the
            function, a class or a network, is given what it takes of num_classes, channels and image_size.
        classes: of the data.
        shape: (channels, height, width) of an image.
        options: for the network, besides or instead of those three.

    Raises:
        LayerlabError: no such network, module, file or function; naming what there is. When called: it cannot be built.
    """
    given = {"num_classes": classes, "channels": shape[0], "image_size": shape[1], **options}
    if ":" not in network:
        if network not in model_names():
            raise unknown("network", network, model_names(), "Or write module:function, or file.py:function, of yours.")
        build = MODELS.get(network)
        if build is not None and "image_size" not in inspect.signature(build).parameters:
            given = {name: value for name, value in given.items() if name != "image_size" or name in options}
        return lambda: build_model(network, **given)
    found, _ = own_network(network)
    if isinstance(found, nn.Module):
        return lambda: copy.deepcopy(found)
    takes = inspect.signature(found).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        given = {name: value for name, value in given.items() if name in takes or name in options}

    def own() -> nn.Module:
        try:
            return found(**given)
        except LayerlabError:
            raise
        except Exception as error:  # whatever the user's own code raises
            raise LayerlabError(f"Network {network!r} cannot be built: {reason(error)}.") from error

    return own


def own_network(network: str) -> tuple[Any, str]:
    """What `module:name` or `file.py:name` names, and the file that it is in.

    A file is read anew each time, so that what was edited counts.

    Raises:
        LayerlabError: no such module or file, one that does not import, or nothing callable of that name in it.
    """
    place, _, name = network.rpartition(":")
    try:
        if place.endswith(".py"):
            file = Path(place).expanduser().resolve()
            if not file.is_file():
                raise LayerlabError(f"Network {network!r}: there is no file {file}; check the path.")
            spec = importlib.util.spec_from_file_location(file.stem, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            # What lies beside it can be imported, as if it were run as a program.
            sys.path.insert(0, str(file.parent))
            try:
                spec.loader.exec_module(module)
            finally:
                sys.path.remove(str(file.parent))
        else:
            module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name != place.partition(".")[0]:
            raise LayerlabError(f"Network {network!r}: {place} does not import ({error}); install that.") from None
        raise LayerlabError(
            f"Network {network!r}: there is no module {place!r} in {Path.cwd()} or among the installed packages; write "
            f"the path of its file, such as path/to/{place}.py:{name}."
        ) from None
    except LayerlabError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise LayerlabError(
            f"Network {network!r}: {place} does not import ({reason(error)}); mend it."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        own = [key for key, value in vars(module).items()
               if callable(value) and getattr(value, "__module__", "") == module.__name__ and key[0] != "_"]
        raise unknown(f"network in {place}", name, own)
    return found, str(getattr(module, "__file__", "") or "")
