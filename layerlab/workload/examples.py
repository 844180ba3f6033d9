"""Examples of any kind: where they come from, how a batch of them divides, and one half of them as `Batches`."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from layerlab.base.errors import LayerlabError, first_line
from layerlab.base.trees import count, on_tensors, tensors
from layerlab.workload.dataset import Moment, pass_order
from layerlab.workload.parquet import LABELS

# Examples that a digest looks at, spread over all.
LOOKED_AT = 16


class Form(NamedTuple):
    """How a batch divides into what the network is given and what its output is compared with.

    Attributes:
        kind: the batch is a `tensor`, a `tuple` or a `dict`.
        inputs: of a tuple or dict, places or keys of what the network is given; a single one is given as it is.
        target: place or key of what the output is compared with; None where there is none.
    """

    kind: str
    inputs: tuple[Any, ...] = ()
    target: Any = None

    @classmethod
    def of(cls, batch: Any, whose: str) -> Form:
        """The form of a batch: a tuple's last part is its target, a dict's the entry with a label's name.

        Raises:
            LayerlabError: nothing in it is a tensor, or a part of a tuple is none.
        """
        if isinstance(batch, Tensor):
            return cls("tensor")
        if isinstance(batch, Mapping):
            keys = tuple(key for key, value in batch.items() if tensors(value))
            target = next((key for key in LABELS if key in keys), None)
            inputs = tuple(key for key in keys if key != target)
            if inputs:
                return cls("dict", inputs, target)
        elif isinstance(batch, Sequence) and not isinstance(batch, str) and batch and all(map(tensors, batch)):
            places = tuple(range(len(batch)))
            return cls("tuple", places[:-1], places[-1]) if len(places) > 1 else cls("tuple", places)
        raise LayerlabError(
            f"A batch of {whose} is {_described(batch)}; batches are a tensor, or a tuple or dict of tensors: turn "
            "texts and pictures into tensors first."
        )

    def __str__(self) -> str:
        if self.kind == "tensor":
            return "a tensor"
        target = "no target" if self.target is None else f"the target {self.target!r}"
        return f"a {self.kind} with the inputs {', '.join(map(repr, self.inputs))} and {target}"

    def split(self, batch: Any) -> tuple[Any, Any]:
        """(what the network is given, what its output is compared with or None)."""
        if self.kind == "tensor":
            return batch, None
        if self.inputs == (0,) and self.target == 1:
            return batch
        parts = [batch[key] for key in self.inputs]
        target = None if self.target is None else batch[self.target]
        if len(parts) == 1:
            return parts[0], target
        return (tuple(parts) if self.kind == "tuple" else dict(zip(self.inputs, parts, strict=True))), target

    def join(self, x: Any, y: Any) -> Any:
        """The batch that was divided, without what was no tensor."""
        if self.kind == "tensor":
            return x
        parts = [x] if len(self.inputs) == 1 else [x[key] for key in self.inputs]
        whole = dict(zip(self.inputs, parts, strict=True))
        if self.target is not None:
            whole[self.target] = y
        return whole if self.kind == "dict" else tuple(whole.values())


def _described(batch: Any) -> str:
    """The types of a batch's parts, in words."""
    if isinstance(batch, Mapping):
        return "a dict of " + ", ".join(f"{key!r}: {type(value).__name__}" for key, value in batch.items())
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return "a sequence of " + (", ".join(type(each).__name__ for each in batch[:5]) or "nothing")
    return f"of type {type(batch).__name__}"


class Origin(ABC):
    """Where the raw batches of a half come from.

    Attributes:
        ordered: whether a pass without a generator gives each example at the same place each time.
        resident: whether all examples lie on the device.
        exact: whether a pass with a generator depends on the generator alone, as far as can be seen.
        batch_size: of its batches, where they are made elsewhere; else None.
        chance: the share of the most frequent class, once it was looked for.
    """

    ordered: ClassVar[bool] = True
    resident: ClassVar[bool] = False
    exact: bool = True
    batch_size: int | None = None
    chance: float | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Examples."""

    @abstractmethod
    def stream(self, batch_size: int, generator: torch.Generator | None, epoch: int) -> Iterator[Any]:
        """One pass in raw batches, as `Split.batches`."""

    @abstractmethod
    def first(self) -> Any:
        """A batch of at least one example, for its form."""

    @abstractmethod
    def parts(self) -> tuple[list[Any], list[Any]]:
        """What tells that it is another one: (values, objects whose code counts)."""

    def rows(self, chosen: Tensor) -> Origin:
        """Only the examples that a mask, bool (n,), chooses.

        Raises:
            LayerlabError: a DataLoader's cannot be chosen.
        """
        raise LayerlabError("A DataLoader's examples cannot be divided; give its dataset, or a validation half of its "
                            "own: {'train': …, 'validation': …, 'test': …}.")

    def to(self, device: torch.device) -> Origin:
        """The same with resident tensors on a device."""
        return self


class Resident(Origin):
    """Tensors that hold all examples, each as a row."""

    resident = True

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self._flat = isinstance(tree, tuple) and all(isinstance(each, Tensor) for each in tree)

    def __len__(self) -> int:
        return count(self.tree)

    def stream(self, batch_size: int, generator: torch.Generator | None, epoch: int) -> Iterator[Any]:
        order, batches = pass_order(len(self), batch_size, generator)
        order = order.to(tensors(self.tree)[0].device)
        for index in range(batches):
            chosen = order[index * batch_size : (index + 1) * batch_size]
            if self._flat:
                yield tuple(each[chosen] for each in self.tree)
            else:
                yield on_tensors(lambda each, rows=chosen: each[rows], self.tree)  # type: ignore[misc]

    def first(self) -> Any:
        return on_tensors(lambda each: each[:1], self.tree)

    def parts(self) -> tuple[list[Any], list[Any]]:
        return tensors(self.tree), []

    def rows(self, chosen: Tensor) -> Origin:
        return Resident(on_tensors(lambda each: each[chosen.to(each.device)], self.tree))

    def to(self, device: torch.device) -> Origin:
        if all(each.device == device for each in tensors(self.tree)):
            return self
        return Resident(on_tensors(lambda each: each.to(device), self.tree))


class Items(Origin):
    """A torch `Dataset`, or anything with a length whose examples are read by their numbers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def stream(self, batch_size: int, generator: torch.Generator | None, epoch: int) -> Iterator[Any]:
        order, batches = pass_order(len(self), batch_size, generator)
        chosen = [order[index * batch_size : (index + 1) * batch_size].tolist() for index in range(batches)]
        # The generator of its own keeps torch from drawing a seed of the global one.
        own = torch.Generator().manual_seed(0)
        return iter(torch_data.DataLoader(self.dataset, batch_sampler=chosen, collate_fn=_collate, generator=own))

    def first(self) -> Any:
        return self._one(0)

    def _one(self, place: int) -> Any:
        return _collate([self.dataset[place]])

    def parts(self) -> tuple[list[Any], list[Any]]:
        return [len(self), *_some(len(self), self._one)], [type(self.dataset)]

    def rows(self, chosen: Tensor) -> Origin:
        return Items(torch_data.Subset(self.dataset, chosen.nonzero()[:, 0].tolist()))


class Loader(Origin):
    """A torch `DataLoader` with its own batches, in the order of its own sampler.

    Where that draws at random, it draws anew in each pass from what `fit` seeds: arms with one seed see one order, and
    a training that goes on after an interruption sees the rest of it.
    """

    ordered = False

    def __init__(self, loader: torch_data.DataLoader[Any]) -> None:
        self.loader = loader
        self._iterable = isinstance(loader.dataset, torch_data.IterableDataset)
        try:
            self.steps = len(loader)
        except TypeError:
            raise LayerlabError("The DataLoader has no length, so that no epoch of it ends; give its dataset a __len__."
                                ) from None
        if not self.steps:
            raise LayerlabError("The DataLoader gives no batch; give it examples.")
        self.batch_size = loader.batch_size or count(self.first())
        self.exact = not self._iterable and not loader.persistent_workers and all(map(_seeded, self._samplers()))

    def __len__(self) -> int:
        sampler = self._samplers()[-1] if self._samplers() else None
        if self._iterable or self.loader.batch_size is None or not hasattr(sampler, "__len__"):
            return self.steps * (self.batch_size or 1)
        return len(sampler)  # type: ignore[arg-type]

    def stream(self, batch_size: int, generator: torch.Generator | None, epoch: int) -> Iterator[Any]:
        seed = 0 if generator is None else int(torch.randint(2**31, (), generator=generator))
        for each in self._generators():
            each.manual_seed(seed)
        for sampler in self._samplers():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        # As with other data, an epoch leaves the uneven rest out.
        return iter(self.loader) if generator is None else islice(self.loader, len(self) // batch_size)

    def first(self) -> Any:
        # Without the worker processes of a whole pass, where one example tells.
        return next(iter(self.loader)) if self._iterable or self.loader.batch_size is None else self._one(0)

    def _one(self, place: int) -> Any:
        example = self.loader.dataset[place]
        batched = self.loader.batch_sampler is not None
        return self.loader.collate_fn([example] if batched else example)

    def parts(self) -> tuple[list[Any], list[Any]]:
        loader = self.loader
        some = [] if self._iterable else _some(len(loader.dataset), self._one)  # type: ignore[arg-type]
        return [len(self), self.batch_size, *some], [type(loader.dataset), loader.collate_fn,
                                                     *map(type, self._samplers())]

    def _samplers(self) -> list[Any]:
        """What chooses the examples, the innermost last."""
        if self._iterable:
            return []
        outer = [self.loader.batch_sampler, self.loader.sampler, getattr(self.loader.batch_sampler, "sampler", None)]
        return [each for each in outer if each is not None]

    def _generators(self) -> list[torch.Generator]:
        owners = [self.loader, *self._samplers()]
        found = [getattr(each, "generator", None) for each in owners]
        return [each for each in found if isinstance(each, torch.Generator)]


def _seeded(sampler: Any) -> bool:
    """Whether a sampler is torch's, or has what torch's have to be seeded by."""
    return type(sampler).__module__.startswith("torch.") or any(
        hasattr(sampler, name) for name in ("generator", "set_epoch"))


def _collate(examples: list[Any]) -> Any:
    """A list of examples as one batch; of dicts, the entries that hold numbers.

    Raises:
        LayerlabError: examples of different shapes.
    """
    if left := left_out(examples[0]):
        examples = [{key: value for key, value in each.items() if key not in left} for each in examples]
    try:
        return torch_data.default_collate(examples)
    except (RuntimeError, TypeError) as error:
        raise LayerlabError(
            f"The examples do not make one batch ({first_line(error)}); let them be tensors of one shape, or give a "
            "DataLoader whose collate_fn makes such ones."
        ) from None


def left_out(example: Any) -> list[str]:
    """The entries of a dict that no batch has, since they hold text or nothing."""
    items = example.items() if isinstance(example, Mapping) else ()
    return [key for key, value in items if isinstance(value, str | bytes | None)]


def _some(examples: int, one: Callable[[int], Any]) -> list[Any]:
    """The tensors of a few of so many examples, spread over them."""
    places = range(0, examples, max(1, examples // LOOKED_AT))
    return [each for place in places for each in tensors(one(place))]


@contextmanager
def python_draws(seed: int) -> Iterator[None]:
    """Python's and NumPy's random numbers from a seed for the block; afterwards they go on as before."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextmanager
def other_draws() -> Iterator[None]:
    """The same of torch's, too, for looks at data that no training should notice."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    try:
        with python_draws(0):
            yield
    finally:
        torch.set_rng_state(before)


@dataclass(frozen=True, eq=False)
class Examples:
    """One half of data of any kind, as `Batches`.

    Attributes:
        origin: gives raw batches.
        form: how they divide.
        device: where they go.
        transform: (x, y) → (x, y) of training batches, such as a transform of torchvision v2; where batches have no
            target, x → x.
        test_transform: the same of batches in order.
        moment: `fit` says there in which epoch its training is.
    """

    origin: Origin
    form: Form
    device: torch.device
    transform: Callable[..., Any] | None = None
    test_transform: Callable[..., Any] | None = None
    moment: Moment = field(default_factory=Moment)

    def __len__(self) -> int:
        return len(self.origin)

    def look(self) -> tuple[Any, Any]:
        """(x, y) of a batch of at least one example, as `batches` gives it in order; nothing else notices."""
        with other_draws():
            return self._placed(self.origin.first(), self.test_transform, torch.float32, torch.contiguous_format)

    @property
    def augment(self) -> str:
        """What is done to training batches, in words."""
        return "none" if self.transform is None else type(self.transform).__name__

    def rows(self, chosen: Tensor) -> Examples:
        """Only the examples that a mask, bool (n,), chooses."""
        return replace(self, origin=self.origin.rows(chosen))

    def to(self, device: torch.device) -> Examples:
        """The same on a device."""
        return replace(self, origin=self.origin.to(device), device=device)

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Iterator[tuple[Any, Any]]:
        """One pass, as `Split.batches`; what datasets and transforms draw comes from the generator alone.

        Numbers of inputs that are floats come in `dtype`, bytes of images from 0 to 1, numbers of classes as int64.
        """
        seed = 0 if generator is None else int(torch.randint(2**31, (), generator=generator))
        change = self.test_transform if generator is None else self.transform
        if self.origin.resident and change is None:
            for batch in self.origin.stream(batch_size, generator, self.moment.epoch):
                yield self._placed(batch, None, dtype, memory_format)
            return
        with python_draws(seed):
            draws = torch.Generator().manual_seed(seed).get_state()
            raw: Iterator[Any] | None = None
            while True:
                # The training's own random numbers, a dropout's say, know nothing of those of its data.
                outside = torch.get_rng_state()
                torch.set_rng_state(draws)
                try:
                    if raw is None:
                        raw = iter(self.origin.stream(batch_size, generator, self.moment.epoch))
                    batch = next(raw, None)
                    if batch is None:
                        return
                    x, y = self._placed(batch, change, dtype, memory_format)
                finally:
                    draws = torch.get_rng_state()
                    torch.set_rng_state(outside)
                yield x, y

    def _placed(
        self, batch: Any, change: Callable[..., Any] | None, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> tuple[Any, Any]:
        x, y = self.form.split(batch)
        # Most batches are two tensors, for which walking through a tree would cost as much as all the rest.
        moved = self.origin.resident and isinstance(x, Tensor)
        x, y = (x, y) if moved else (_each(self._moved, x), _each(self._moved, y))
        if change is not None:
            x, y = (change(x), None) if y is None else change(x, y)
        return _each(lambda each: _input_of(each, dtype, memory_format), x), _each(_target_of, y)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    @property
    def chance(self) -> float:
        """The share of the most frequent class; NaN where targets are no classes. The first look reads all examples."""
        if self.origin.chance is None:
            with other_draws():
                self.origin.chance = self._most_frequent()
        return self.origin.chance

    def _most_frequent(self) -> float:
        counts: Counter[int] = Counter()
        for batch in self.origin.stream(self.origin.batch_size or 512, None, 0):
            _, y = self.form.split(batch)
            if not are_classes(y):
                return math.nan
            counts.update(y.tolist())
        return max(counts.values()) / counts.total()


def are_classes(target: Any) -> bool:
    """Whether targets are one number of a class for each example."""
    return isinstance(target, Tensor) and target.dim() == 1 and not (
        target.is_floating_point() or target.dtype == torch.bool)


def _each(function: Callable[[Tensor], Tensor], part: Any) -> Any:
    """A function of a tensor, or of each in a tuple or dict."""
    return function(part) if isinstance(part, Tensor) else on_tensors(function, part)


def _input_of(each: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """Floats as the network computes; bytes of images from 0 to 1."""
    if each.dtype == torch.uint8 and each.dim() > 2:
        each = each.to(dtype).div_(255)
    elif each.dtype != dtype and each.is_floating_point():
        each = each.to(dtype)
    return each.contiguous(memory_format=memory_format) if each.dim() == 4 else each


def _target_of(each: Tensor) -> Tensor:
    """Losses take classes as int64, and floats in the type of the network's."""
    if each.dtype in (torch.int64, torch.float32):
        return each
    if each.dtype == torch.float64:
        return each.float()
    return each.long() if each.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32) else each
