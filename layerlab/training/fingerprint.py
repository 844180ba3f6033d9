"""A digest of everything that decides a fit's outcome, the same in every process."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from layerlab.base.digests import file_digest
from layerlab.base.sharing import shared_names
from layerlab.base.text import as_json
from layerlab.contract.run import Run
from layerlab.contract.strategy import Strategy
from layerlab.training.settings import Settings, describe
from layerlab.workload.dataset import Dataset
from layerlab.workload.own import Data

# What every module has; the rest of its attributes are its own.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_LIBRARIES = ("site-packages", "dist-packages", sysconfig.get_paths()["stdlib"])


def fingerprint(run: Run, data: Data, strategies: Sequence[Strategy], settings: Settings, seed: int) -> str:
    """A digest of everything that decides a fit's outcome; `run` is as it was before the strategies saw it."""
    described = Description()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in run.optimizer.param_groups]
    own = {name: getattr(settings, name) for name in type(settings).model_fields}
    parts = {
        "network": described.of(run.model),
        "frozen": [name for name, parameter in run.model.named_parameters() if not parameter.requires_grad],
        "loss": described.of(run.loss),
        "optimizer": [described.of(type(run.optimizer)), described.of(groups)],
        "schedule": [described.of(type(run.schedule)), described.of(vars(run.schedule).get("lr_lambdas")),
                     described.of(run.schedule.state_dict())],
        "settings": {name: described.of(value) for name, value in own.items()},
        "strategies": [[each.name, describe(each), _strategy_code(type(each), described)] for each in strategies],
        "seed": seed,
        "data": _data(data, described),
    }
    return _digest(json.dumps(as_json(parts), sort_keys=True).encode(), 16)


def _data(data: Data, described: Description) -> list[Any]:
    """What decides which batches a training sees; of the user's own data, their code too."""
    if isinstance(data, Dataset):
        return [data.name, data.fingerprint, data.train.augment, data.train.padding]
    halves = (data.train, data.test, data.validation)
    code = [[described.of(each.origin.parts()[1]), described.of(each.transform), described.of(each.test_transform)]
            for each in halves if each is not None]
    return [data.name, data.fingerprint, code]


class Description:
    """Objects as JSON values that are the same in another process, whatever their addresses there.

    Functions and classes come with their code, unless a library has them; objects with their attributes. An object
    that comes again is named by its number, so that a circle ends.
    """

    def __init__(self) -> None:
        # The objects themselves are kept, so that no id is given away twice.
        self._known: dict[int, tuple[int, Any]] = {}

    def of(self, value: Any) -> Any:
        """One object."""
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float | complex | bytes | torch.dtype | torch.device):
            return repr(value)
        if isinstance(value, Tensor):
            return tensor_digest(value)
        if isinstance(value, Mapping):
            return [[str(key), self.of(each)] for key, each in value.items()]
        if isinstance(value, list | tuple):
            return [self.of(each) for each in value]
        if isinstance(value, set | frozenset):
            return sorted(str(self.of(each)) for each in value)
        if id(value) in self._known:
            return f"object {self._known[id(value)][0]}"
        self._known[id(value)] = len(self._known), value
        return self._object(value)

    def _object(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self._network(value)
        if isinstance(value, functools.partial):
            return [self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if isinstance(value, MethodType):
            return [self.of(value.__self__), self.of(value.__func__)]
        if isinstance(value, BuiltinFunctionType):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        return [self.of(type(value)), self.of(_state(value))]

    def _network(self, network: nn.Module) -> list[Any]:
        """Modules with their attributes and code under all their names, ties, and the weights."""
        parts: list[Any] = [shared_names(network)]
        for name, module in network.named_modules(remove_duplicate=False):
            own = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
            parts.append([name, self.of(type(module)), module.extra_repr(), self.of(own)])
        return [*parts, self.of(network.state_dict())]

    def _class(self, kind: type) -> list[Any]:
        """Name, and of a class that is no library's its bases, its methods and its plain attributes."""
        name = f"{kind.__module__}.{kind.__qualname__}"
        own = [each for each in vars(kind).values() if isinstance(each, FunctionType) and not _of_library(each)]
        if _class_of_library(kind):
            # torch.fx makes classes in its own name, whose forward is the user's.
            return [name, [self.of(each) for each in own]]
        plain = {key: self.of(each) for key, each in vars(kind).items()
                 if isinstance(each, bool | int | float | str | tuple) and not key.startswith("__")}
        return [name, [self.of(base) for base in kind.__bases__], [self.of(each) for each in own], plain]

    def _function(self, function: FunctionType) -> list[Any]:
        """Name, code, defaults, and the values that it takes from around it."""
        name = f"{function.__module__}.{function.__qualname__}"
        if _of_library(function):
            return [name]
        around = []
        for cell in function.__closure__ or ():
            try:
                around.append(self.of(cell.cell_contents))
            except ValueError:  # a name that has no value yet
                around.append(None)
        for used in function.__code__.co_names:
            value = function.__globals__.get(used)
            if isinstance(value, bool | int | float | str | FunctionType):
                around.append(self.of(value))
        return [name, self._code(function.__code__), self.of(function.__defaults__), self.of(function.__kwdefaults__),
                around]

    def _code(self, code: CodeType) -> list[Any]:
        """Instructions, names and constants, without places in files."""
        constants = [self._code(each) if isinstance(each, CodeType) else self.of(each) for each in code.co_consts]
        return [code.co_code.hex(), list(code.co_names), constants]


def _state(value: Any) -> Any:
    """The attributes of an object; what pickle would keep of one without a `__dict__`, such as a path or a date."""
    if hasattr(value, "__dict__"):
        return value.__dict__
    try:
        return list(value.__reduce_ex__(2)[1:3])
    except Exception:  # whatever an object raises that cannot be pickled
        return {}


def _of_library(function: FunctionType) -> bool:
    return any(place in function.__code__.co_filename for place in _LIBRARIES)


def _class_of_library(kind: type) -> bool:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return kind.__module__ == "builtins" or any(place in file for place in _LIBRARIES)


def tensor_digest(tensor: Tensor) -> str:
    """A digest of a tensor's shape, type and values."""
    digest = hashlib.blake2b(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=8)
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(values.data)
    return digest.hexdigest()


def _strategy_code(kind: type, described: Description) -> list[Any]:
    """What decides what a strategy does: its sources, or its code where it has no file, as in a notebook."""
    sources = source_digests(kind)
    return [sources] if sources.get(kind.__module__) else [sources, described.of(kind)]


def source_digests(kind: type) -> dict[str, str]:
    """Module → digest of its source, of the module that defines a class and of all that it takes something from.

    Libraries and layerlab itself are left out, but for what is in the class's own package; what has no file (a
    notebook's cells) has an empty digest. So a checkpoint of a strategy is not taken over when a module that it uses
    was edited.
    """
    package = kind.__module__.partition(".")[0]
    found: dict[str, str] = {}
    waiting = [kind.__module__]
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None) or ""
        ours = name.partition(".")[0] == package
        if name in found or module is None or not (ours or _of_user(name, file)):
            continue
        found[name] = file_digest(Path(file)) if file else ""
        waiting += {value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", ""))
                    for value in vars(module).values()}
    return found


def _of_user(name: str, file: str) -> bool:
    return bool(file) and name.partition(".")[0] != "layerlab" and not any(place in file for place in _LIBRARIES)


def _digest(content: bytes, size: int) -> str:
    return hashlib.blake2b(content, digest_size=size).hexdigest()
