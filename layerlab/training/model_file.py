"""A trained network in a file: its weights, and what is needed to build it again where it is deployed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerlab.base.errors import LayerlabError, first_line
from layerlab.base.files import write_atomically
from layerlab.base.provenance import versions
from layerlab.base.sharing import shared_names
from layerlab.training.results import FitResult
from layerlab.workload.builders import network_builder
from layerlab.workload.dataset import Dataset

_FORMAT = "layerlab-model-2"


@dataclass(frozen=True, eq=False)
class SavedModel:
    """A network as it was saved.

    Attributes:
        model: in evaluation mode.
        class_names: what its logits stand for; empty where the data had no names.
        shape: (channels, height, width) of the images that it takes.
        mean, std: of the training images, per channel, in units of the uint8 scale.
        network: what it was built from.
        strategies: names and settings of what it was trained with.
        top1: its accuracy on the test images at the end of training, a share.
        versions: of what it was trained with.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    network: str
    strategies: tuple[tuple[str, dict[str, Any]], ...]
    top1: float
    versions: dict[str, str]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images, (batch, channels, height, width), as the network takes them."""
        mean, std = (torch.tensor(part, device=images.device).view(1, -1, 1, 1) for part in (self.mean, self.std))
        return (images.float() - mean) / std

    def __repr__(self) -> str:
        how = " with " + " and ".join(name for name, _ in self.strategies) if self.strategies else ""
        channels, height, width = self.shape
        return (f"{self.network or type(self.model).__name__} trained{how}, top-1 {self.top1:.2%}, "
                f"{sum(p.numel() for p in self.model.parameters()):,} parameters, takes {channels}×{height}×{width}")


def save_model(
    file: str | Path, result: FitResult, data: Dataset, network: str = "", **options: Any
) -> Path:
    """Keep a trained network: its weights, and how to build it, with the structure that its strategies left it in.

    Args:
        file: what to write, `model.pt` say.
        result: of the fit.
        data: what it was trained on.
        network: what the network was built from, as `network_builder` takes it; for a network of another origin,
            nothing, and `load_model` is given the network.
        options: the network's, as there.

    Returns:
        The file.

    Raises:
        LayerlabError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from layerlab import build_model, fit, load_dataset, load_model, save_model
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> network = build_model("mlp", num_classes=10, image_size=8, width=16)
        >>> result = fit(network, data, epochs=1, progress=False)
        >>> file = Path(tempfile.mkdtemp()) / "model.pt"
        >>> _ = save_model(file, result, data, "mlp", num_classes=10, image_size=8, width=16)
        >>> load_model(file).model.training
        False
    """
    content = {
        "format": _FORMAT, "network": network, "options": options, "classes": data.classes,
        "class_names": list(data.class_names), "shape": list(data.shape), "mean": list(data.train.mean),
        "std": list(data.train.std), "top1": result.final["test/top1"], "versions": versions(),
        "strategies": [
            {"name": strategy.name, "settings": strategy.model_dump(mode="json"),
             "state": strategy.state_dict() if strategy.defines("rebuild") else None}
            for strategy in result.strategies
        ],
        "shared": shared_names(result.model),
        "weights": {name: tensor.cpu() for name, tensor in result.model.state_dict().items()},
    }
    write_atomically(Path(file), lambda stream: torch.save(content, stream))
    return Path(file)


def load_model(
    file: str | Path, network: str | nn.Module | Callable[[], nn.Module] | None = None,
    device: str | torch.device = "cpu",
) -> SavedModel:
    """Build a saved network again, with its weights.

    Args:
        file: from `save_model`.
        network: what builds it, where that is no name of `build_model`: `module:function`, a function, or a new network
            of the same kind. Code of one's own is run only if it is named here, never because a file says so.
        device: where to put it.

    Raises:
        LayerlabError: no such file, a damaged one, one of another kind; a network that has to be given and is not, or
            that these weights do not fit; a strategy that is not installed and that changed the network.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from layerlab import build_model, fit, load_dataset, load_model, save_model
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> network = build_model("mlp", num_classes=10, image_size=8, width=16)
        >>> result = fit(network, data, epochs=1, progress=False)
        >>> file = Path(tempfile.mkdtemp()) / "model.pt"
        >>> _ = save_model(file, result, data, "mlp", num_classes=10, image_size=8, width=16)
        >>> load_model(file).model.training
        False
    """
    # Long because its docstring names every argument and error, with an example.
    from layerlab.contract.registry import strategies

    path = Path(file)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LayerlabError(f"The model {path} cannot be read ({error.strerror}); check the path.") from None
    except Exception as error:  # zip, pickle and runtime errors, depending on the damage
        raise LayerlabError(f"The model {path} is damaged ({first_line(error)}).") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise LayerlabError(f"{path} is no model that layerlab saved; write one with save_model.")
    shape = tuple(content["shape"])
    build: Any = network
    if network is None:
        build = content["network"]
        if not build or ":" in build:
            named = f"network={build!r}" if build else "the function that builds it as network"
            raise LayerlabError(f"{path} holds a network of your own; pass {named} to build it.")
    if isinstance(build, str):
        build = network_builder(build, content["classes"], shape, **content["options"])
    model = copy.deepcopy(build) if isinstance(build, nn.Module) else build()
    for each in content["strategies"]:
        if each["state"] is not None:
            strategy = strategies(each["name"], **each["settings"])
            strategy.load_state_dict(each["state"])
            model = strategy.rebuild(model)
    _fill(model, content, path)
    return SavedModel(
        model.to(device).eval(), tuple(content["class_names"]), shape, tuple(content["mean"]), tuple(content["std"]),
        content["network"], tuple((each["name"], each["settings"]) for each in content["strategies"]), content["top1"],
        content["versions"],
    )


def _fill(model: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Load a file's weights into a network of the same kind, which shares them among its layers in the same way."""
    try:
        model.load_state_dict(content["weights"])
    except RuntimeError as error:
        raise LayerlabError(f"The weights in {path} do not fit {content['network'] or type(model).__name__} "
                            f"({' '.join(str(error).split())[:200]}); give the network that was saved.") from None
    if shared_names(model) != content["shared"]:
        raise LayerlabError(f"The network that was saved in {path} shares other weights among its layers than the one "
                            "that is given; give the network that was saved.")
