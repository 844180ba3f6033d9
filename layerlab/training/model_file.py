"""A trained network in a file: its weights, and what is needed to build it again where it is deployed."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerlab.base.arguments import validated
from layerlab.base.errors import LayerlabError, first_line, located
from layerlab.base.provenance import versions
from layerlab.base.sharing import shared_names
from layerlab.contract.registry import strategies
from layerlab.contract.strategy import Strategy
from layerlab.training.fingerprint import tensor_digest
from layerlab.training.results import FitResult
from layerlab.training.state_file import check_storable, read_state, write_state
from layerlab.workload.builders import network_builder
from layerlab.workload.own import Data

_FORMAT = "layerlab-model-3"
# What a file holds, and its types.
_CONTENT: dict[str, type] = {
    "network": str, "options": dict, "classes": int, "class_names": list, "shape": list, "mean": list, "std": list,
    "top1": float, "versions": dict, "strategies": list, "shared": list, "weights": dict, "modules": dict,
}


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


@validated
def save_model(
    file: str | Path, result: FitResult, data: Data, network: str = "", **options: Any
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

    The file is read again, and the network built from it where that can be, before it takes its name.

    Raises:
        LayerlabError: the file cannot be written, something in it would not come back, or the network that is built
            from it has other weights; what was there before still is.

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
    if options and not network:
        raise LayerlabError(f"save_model has no setting {next(iter(options))!r}; options are those of a network that "
                            "is named, such as save_model(file, result, data, 'resnet18', num_classes=10).")
    # What it began with stands in no file: the weights that it has now are loaded.
    options = {name: value for name, value in options.items() if name != "weights"}
    state = _on_cpu(result.model.state_dict())
    content = {
        "format": _FORMAT, "network": network, "options": options, "classes": data.classes,
        "class_names": list(data.class_names), "shape": list(data.shape), "mean": list(getattr(data.train, "mean", ())),
        "std": list(getattr(data.train, "std", ())), "top1": float(result.final.get("test/top1", math.nan)),
        "versions": versions(),
        "strategies": [_described(strategy) for strategy in result.strategies],
        "shared": shared_names(result.model),
        "weights": dict(state),
        # The version of each module, by which those that load weights of older versions tell.
        "modules": {name: dict(each) for name, each in getattr(state, "_metadata", {}).items()},
    }
    remedy = "let get_extra_state and the state_dict of strategies give"
    for owner, part in (("The network", "weights"), ("The network", "modules"), ("One of the options", "options"),
                        ("One of the strategies", "strategies")):
        check_storable(owner, content[part], remedy)
    path = Path(file)
    write_state(path, content, lambda written: _check_written(written, path, content, result))
    return path


def _described(strategy: Strategy) -> dict[str, Any]:
    """A strategy's name and settings, and its state where that changes how the network is built.

    Raises:
        LayerlabError: a setting that pydantic cannot write.
    """
    try:
        settings = strategy.model_dump(mode="json")
    except ValueError as error:
        raise LayerlabError(f"The settings of {strategy.name!r} cannot be kept in a file ({first_line(error)}); give "
                            "that field a serializer.") from None
    return {"name": strategy.name, "settings": settings,
            "state": strategy.state_dict() if strategy.defines("rebuild") else None}


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A network's state with its tensors on the CPU; what modules keep besides tensors stays as it is."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.cpu()
    return state


def _check_written(written: Path, file: Path, content: dict[str, Any], result: FitResult) -> None:
    """Compare what a file gives back with what was to be kept.

    Raises:
        LayerlabError: they differ, or the network cannot be built from it.
    """
    again = _read(written)
    changed = [each["name"] for each in content["strategies"] if each["state"] is not None]
    build: Any = content["network"]
    if not build and not changed:
        # Another network of the same kind, where one can be had.
        with contextlib.suppress(Exception):
            build = copy.deepcopy(result.model)
    # A strategy that changed the network and is not installed here may be where the file is read.
    model = _built(again, build, file) if build and set(changed) <= set(strategies) else None
    states = [again["weights"], *([_on_cpu(model.state_dict())] if model is not None else [])]
    for state in states:
        other = [name for name in {**content["weights"], **state}
                 if not _same(content["weights"].get(name), state.get(name))]
        if other:
            raise LayerlabError(f"{file} was not written: {other[0]!r} comes back from it as another value; let the "
                                "module that has it load what its state_dict gives.")


def _same(first: Any, second: Any) -> bool:
    """Bit for bit, tensors; by `==`, what modules keep besides them."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and tensor_digest(first) == tensor_digest(second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second) or first != first


@validated
def load_model(
    file: str | Path, network: str | nn.Module | Callable[[], nn.Module] | None = None,
    device: str | torch.device = "cpu",
) -> SavedModel:
    """Build a saved network again, with its weights.

    Args:
        file: from `save_model`.
        network: what builds it, where that is no name of `build_model`: `module:function`, a function, or a new network
            of the same kind. Your own code runs only if you name it here, never because a file names it.
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
    path = Path(file)
    content = _read(path)
    build: Any = network
    if network is None:
        build = content["network"]
        if not build or ":" in build:
            named = f"network={build!r}" if build else "the function that builds it as network"
            raise LayerlabError(f"{path} holds a network of your own; pass {named} to build it.")
    model = _built(content, build, path)
    return SavedModel(
        model.to(device).eval(), tuple(content["class_names"]), tuple(content["shape"]), tuple(content["mean"]),
        tuple(content["std"]), content["network"],
        tuple((each["name"], each["settings"]) for each in content["strategies"]), content["top1"], content["versions"],
    )


def _read(path: Path) -> dict[str, Any]:
    """The content of a file.

    Raises:
        LayerlabError: it cannot be read, is damaged, or holds something else.
    """
    content = read_state(path, "The model", "take another copy, or train it again", "write one with save_model")
    whole = isinstance(content, dict) and content.get("format") == _FORMAT
    if not whole or not all(isinstance(content.get(name), kind) for name, kind in _CONTENT.items()):
        raise LayerlabError(f"{path} is no model that layerlab saved; write one with save_model.")
    return content


def _built(content: dict[str, Any], build: str | nn.Module | Callable[[], nn.Module], path: Path) -> nn.Module:
    """The network of a file, with its structure and weights.

    Raises:
        LayerlabError: it cannot be built, or the weights do not fit it.
    """
    if isinstance(build, str):
        options = {name: value for name, value in content["options"].items() if name != "weights"}
        build = network_builder(build, content["classes"], tuple(content["shape"]), **options)
    try:
        model = copy.deepcopy(build) if isinstance(build, nn.Module) else build()
        for each in content["strategies"]:
            if each["state"] is not None:
                strategy = strategies(each["name"], **each["settings"])
                strategy.load_state_dict(each["state"])
                model = strategy.rebuild(model)
    except LayerlabError:
        raise
    except Exception as error:  # the network's own, or a strategy's on a network of another kind
        raise LayerlabError(f"The network of {path} cannot be built ({located(error)}); give the network that was "
                            "saved.") from error
    _fill(model, content, path)
    return model


def _fill(model: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Load a file's weights into a network of the same kind, which shares them among its layers in the same way."""
    state = OrderedDict(content["weights"])
    state._metadata = content["modules"]  # type: ignore[attr-defined]  # where torch looks for versions
    try:
        model.load_state_dict(state)
    except Exception as error:  # torch's, or that of a module that loads in its own way
        raise LayerlabError(f"The weights in {path} do not fit {content['network'] or type(model).__name__} "
                            f"({' '.join(str(error).split())[:200]}); give the network that was saved.") from None
    if shared_names(model) != content["shared"]:
        raise LayerlabError(f"The network that was saved in {path} shares other weights among its layers than the one "
                            "that is given; give the network that was saved.")
