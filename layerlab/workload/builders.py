"""The papers' networks that torchvision does not have, torchvision's by name, and the order in which layers run."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torchvision import models as torchvision_models

from layerlab.base.arguments import validated
from layerlab.base.errors import LayerlabError, reason, unknown
from layerlab.workload.pretrained import pretrained, with_weights
from layerlab.workload.zoo import MODELS


@validated
def build_model(name: str, *, weights: str | os.PathLike[str] | None = None, **options: Any) -> nn.Module:
    """A network by name, layerlab's own or any classification network of torchvision.

    Args:
        name: as in `model_names()`.
        weights: to begin with: a name that torchvision has for the network (`DEFAULT`), fetched unless they are in its
            cache, or a file of a `state_dict`. A layer that gives other numbers of classes than the weights do begins
            anew: the head of the new data. Default: none, untrained.
        options: for layerlab's: num_classes, channels, image_size where its weights depend on it, and what its
            function takes besides. For torchvision's: num_classes and what its builder takes; channels may only be 3,
            and image_size goes to the networks that are built for one (vision transformers).

    Raises:
        LayerlabError: unknown name (with the nearest spelling) or an option that the network does not have; weights
            that cannot be had, or that are another network's.

    Example:
        >>> from layerlab import build_model
        >>> network = build_model("resnet-cifar", num_classes=10, depth=8)
        >>> sum(parameter.numel() for parameter in network.parameters())
        75290
    """
    if weights is None:
        return _untrained(name, **options)
    state = pretrained(name, weights)
    return with_weights(_untrained(name, **options), state, f"{name}, weights {os.fspath(weights)!r}")


def _untrained(name: str, **options: Any) -> nn.Module:
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
        return _call(torchvision_models.get_model, name, name, **{**options, "weights": None})
    return _call(build, name, **options)


def _call(build: Callable[..., nn.Module], label: str, *arguments: Any, **options: Any) -> nn.Module:
    try:
        return build(*arguments, **options)
    except (TypeError, ValueError, OSError) as error:  # weights that are named are fetched
        takes = "" if arguments else f"; it takes {', '.join(inspect.signature(build).parameters)}"
        raise LayerlabError(f"Network {label!r} cannot be built: {error}{takes}.") from None


def model_names() -> list[str]:
    """Every name that `build_model` knows.

    Example:
        >>> from layerlab import model_names
        >>> "resnet18" in model_names()
        True
    """
    return sorted([*MODELS, *torchvision_models.list_models(module=torchvision_models)])


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
