"""What an arm with strategies must leave alone, since other arms train beside it: the data and torch's global state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from layerlab.base.errors import Refused
from layerlab.base.trees import on_tensors, tensors
from layerlab.workload.dataset import Dataset, Split
from layerlab.workload.examples import Examples, Resident
from layerlab.workload.own import Data, on_halves


def lent(data: Data) -> Data:
    """The same data for an arm of its own: a tensor is copied when the arm first writes into it, and only then."""
    return on_halves(_lent, data)


def _lent(half: Split | Examples) -> Split | Examples:
    if isinstance(half, Examples):
        return _lent_examples(half)
    images = _copied_when_written(half.images) if isinstance(half.images, Tensor) else half.images
    return replace(half, images=images, labels=_copied_when_written(half.labels))


def _halves(data: Data) -> dict[str, Any]:
    return {"train": data.train, "test": data.test, "validation": data.validation}


def _lent_examples(half: Examples) -> Examples:
    origin = half.origin
    if not isinstance(origin, Resident):
        return half
    copied = Resident(on_tensors(_copied_when_written, origin.tree))
    copied.chance = origin.chance
    return replace(half, origin=copied)


def _copied_when_written(tensor: Tensor) -> Tensor:
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:  # memory that is not torch's own, such as NumPy's
        return tensor.clone()


def changed_data(original: Data, taken: Data) -> str:
    """What an arm has changed of the data that it was lent, such as `training images`; empty where nothing is."""
    mine, theirs = _halves(original), _halves(taken)
    for half in mine:
        for what, before, after in _tensors_of(mine[half], theirs[half]):
            # What is still shared was not written; comparing costs a pass over the data.
            shared = torch._C._is_cow_tensor(after)  # type: ignore[attr-defined]
            if not shared and not torch.equal(before, after):
                return f"{'training' if half == 'train' else half} {what}"
    return ""


def _tensors_of(mine: Any, theirs: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what it is, as it was, as it is now) of each tensor that holds a half."""
    if isinstance(mine, Examples):
        if isinstance(mine.origin, Resident) and isinstance(theirs.origin, Resident):
            pairs = zip(tensors(mine.origin.tree), tensors(theirs.origin.tree), strict=True)
            yield from (("examples", before, after) for before, after in pairs)
        return
    for what in ("images", "labels"):
        before, after = getattr(mine, what, None), getattr(theirs, what, None)
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            yield what, before, after


def check_data(who: str, original: Data, taken: Data) -> None:
    """Refuse an arm that has written into the data.

    Raises:
        Refused: it has; the data of the others are as they were.
    """
    if changed := changed_data(original, taken):
        raise Refused(f"{who} changes the {changed} in place, which every arm is trained with; let it put other data "
                      "into `run.data`, or change a copy.")


def torch_switches() -> dict[str, Any]:
    """Torch's global settings: name → value."""
    backends, filling = torch.backends, cast(Any, torch.utils.deterministic)
    return {
        "torch.is_grad_enabled": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled": torch.is_inference_mode_enabled(),
        "torch.get_default_dtype": torch.get_default_dtype(),
        "torch.get_num_threads": torch.get_num_threads(),
        "torch.are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled(),
        "torch.utils.deterministic.fill_uninitialized_memory": filling.fill_uninitialized_memory,
        "torch.is_autocast_enabled": torch.is_autocast_enabled("cpu"),
        "torch.is_anomaly_enabled": torch.is_anomaly_enabled(),
        "torch.get_float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch.backends.cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic,
                                 backends.cudnn.allow_tf32),
        "torch.backends.cuda.matmul.allow_tf32": backends.cuda.matmul.allow_tf32,
        "torch.backends.mkldnn.enabled": backends.mkldnn.enabled,
        "the default device": torch.get_default_device(),
        "hooks of all modules": {name: list(hooks.values()) for name, hooks in _module_hooks().items()},
    }


def _module_hooks() -> dict[str, dict[int, Any]]:
    """Torch's registries of hooks that every module calls."""
    return {name: hooks for name, hooks in vars(nn.modules.module).items()
            if name.startswith("_global_") and isinstance(hooks, dict)}


# Name of a switch → what sets it to a value that `torch_switches` gave.
_SETTERS: dict[str, Callable[[Any], Any]] = {
    "torch.is_grad_enabled": torch.set_grad_enabled,
    "torch.get_default_dtype": torch.set_default_dtype,
    "torch.get_num_threads": torch.set_num_threads,
    "torch.are_deterministic_algorithms_enabled": torch.use_deterministic_algorithms,
    "torch.is_autocast_enabled": lambda value: torch.set_autocast_enabled("cpu", value),
    "torch.is_anomaly_enabled": torch.autograd.set_detect_anomaly,
    "torch.get_float32_matmul_precision": torch.set_float32_matmul_precision,
    "torch.backends.cudnn": lambda values: torch.backends.cudnn.set_flags(
        _enabled=values[0], _benchmark=values[1], _deterministic=values[2], _allow_tf32=values[3]),
    "torch.backends.cuda.matmul.allow_tf32": lambda value: setattr(torch.backends.cuda.matmul, "allow_tf32", value),
    "torch.backends.mkldnn.enabled": lambda value: torch.backends.mkldnn.set_flags(value),
}


def check_switches(who: str, before: dict[str, Any]) -> None:
    """Refuse an arm that leaves torch's global settings changed at the end of its turn, and put them back.

    Raises:
        Refused: it does.
    """
    after = torch_switches()
    changed = [name for name in before if before[name] != after[name]]
    for name in changed:
        if name in _SETTERS:
            _SETTERS[name](before[name])
    if "hooks of all modules" in changed:
        for name, hooks in _module_hooks().items():
            for key in [key for key, hook in hooks.items() if hook not in before["hooks of all modules"].get(name, ())]:
                del hooks[key]
    if changed:
        raise Refused(f"{who} leaves {', '.join(changed)} changed while other arms train; let it put back what it sets "
                      "before its hook returns.")


@contextmanager
def left_alone(who: str, lent_data: Callable[[], tuple[Data, Data]]) -> Iterator[None]:
    """A turn of an arm with strategies, after which data and torch's settings are as they were.

    Args:
        who: the arm.
        lent_data: gives what the arms share and what this one was lent, once it has it.

    Raises:
        Refused: they are not.
    """
    before = torch_switches()
    try:
        yield
    except BaseException:
        # The arm that fails takes its settings along, and is said to fail for its own reason.
        with suppress(Refused):
            check_switches(who, before)
        raise
    check_switches(who, before)
    check_data(who, *lent_data())


def first_batch_digest(data: Data, batch_size: int, seed: int) -> str:
    """Changes when the first batch of a seed does, or what torch makes of it.

    The digest of the images and labels, and of the weights of a small network after a step of SGD with them. Data,
    their order, their augmentation, torch's layers, loss, gradients and optimizer have a part in it.
    """
    batch = next(data.train.batches(batch_size, torch.Generator().manual_seed(seed)))
    if isinstance(data, Dataset):
        images, labels, classes = *batch, data.classes
    else:
        # Of other data a few images are made, for the step to have something to work on.
        draw = torch.Generator().manual_seed(seed)
        images, labels, classes = torch.randn(8, 3, 8, 8, generator=draw), torch.arange(8), 8
    # On the CPU, where a step gives the same bits each time; a GPU's pooling does not.
    images, labels = images.cpu(), labels.cpu()
    # A fork keeps the random states of whoever is at work.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        channels = images.shape[1]
        network = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(16, classes),
        )
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        nn.functional.cross_entropy(network(images[:32]), labels[:32]).backward()
        optimizer.step()
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (*tensors(batch), *network.state_dict().values()):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
