"""Weights that a network begins with: torchvision's by name, or a file's, with a new head for other classes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from layerlab.base.errors import LayerlabError, first_line, unknown


def pretrained(name: str, weights: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The state of a trained network.

    Args:
        name: of the network.
        weights: a file, or a name that torchvision has for them.

    Raises:
        LayerlabError: neither a file nor such a name, a file that holds something else, or a download that fails.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return _of_file(path)
    try:
        known = torchvision_models.get_model_weights(name).__members__
    except ValueError:
        known = {}
    text = os.fspath(weights)
    if text not in known:
        raise unknown(f"weights of {name}", text, known, f"Or pass a file; {path.absolute()} is none.")
    chosen = known[text]
    try:
        return chosen.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise LayerlabError(f"The weights {text!r} of {name} are not in {folder} and cannot be fetched "
                            f"({first_line(error)}); put the file {Path(chosen.url).name} there.") from None


def _of_file(path: Path) -> Mapping[str, Tensor]:
    """A `state_dict` from a file, read without running code from it.

    Raises:
        LayerlabError: it cannot be read, or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise LayerlabError(f"{path} cannot be read as weights ({first_line(error)}); write one with "
                            "torch.save(network.state_dict(), file).") from None
    # What save_model, and many others, keep weights under.
    for key in ("weights", "state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(each, Tensor) for each in state.values()):
        raise LayerlabError(f"{path} holds no weights by name; write it with torch.save(network.state_dict(), file).")
    return state


def with_weights(network: nn.Module, state: Mapping[str, Tensor], what: str) -> nn.Module:
    """Load a state into a network but for its head, where that has another number of classes.

    The head is what has other shapes; it is a layer's weight and bias, the last that the network has, and of networks
    with a second head that one's.

    Raises:
        LayerlabError: more than heads differ: it is another network's state.
    """
    own = network.state_dict()
    other = [name for name, value in own.items() if name in state and state[name].shape != value.shape]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    heads = {name.rpartition(".")[0] for name in other}
    if missing or len(heads) > 1 or any(own[name].shape[1:] != state[name].shape[1:] for name in other):
        differs = (missing or other)[0]
        raise LayerlabError(f"The weights are another network's than {what}: {differs!r} "
                            f"{'is missing' if missing else 'has another shape'}; build the network that they were "
                            "trained in.")
    network.load_state_dict({name: value for name, value in state.items() if name in own and name not in other},
                            strict=False)
    return network
