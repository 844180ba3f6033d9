"""Data of the user's own: tensors, torch Datasets and DataLoaders, Hugging Face datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field, SkipValidation
from torch import Tensor
from torch.utils import data as torch_data

from layerlab.base.arguments import validated
from layerlab.base.devices import resolve_device
from layerlab.base.errors import LayerlabError, brief
from layerlab.base.trees import on_tensors, tensors
from layerlab.show.table import Table
from layerlab.workload.dataset import Dataset, Split, channel_statistics
from layerlab.workload.examples import (
    Examples,
    Form,
    Items,
    Loader,
    Origin,
    Resident,
    are_classes,
    left_out,
    other_draws,
)
from layerlab.workload.places import HALVES, TESTING, TRAINING, VALIDATION, half_of

FORMS = ("(train, test), or {'train': …, 'validation': …, 'test': …}, where each half is a DataLoader, a Dataset, or "
         "tensors such as (x, y)")


@dataclass(frozen=True, eq=False)
class OwnData:
    """Data of the user's own, as `own_data` makes it.

    Attributes:
        name: in tables and logs.
        train, test: the halves.
        classes: the number of classes; 0 where there are none, or where only reading everything would tell.
        fingerprint: a digest of the tensors; of what is read example by example, of a few of them and their number.
        source: what it was made of.
        class_names: where the dataset has them.
        note: what a reader of its numbers should know.
        validation: examples to choose by.
    """

    name: str
    train: Examples
    test: Examples
    classes: int
    fingerprint: str
    source: str
    class_names: tuple[str, ...] = ()
    note: str = ""
    validation: Examples | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an example's first tensor, as the network is given it."""
        return tuple(tensors(self.test.look()[0])[0].shape[1:])

    @property
    def batch_size(self) -> int | None:
        """Of a DataLoader's batches; None where `fit` may choose."""
        return self.train.origin.batch_size

    @property
    def exact(self) -> bool:
        """Whether each pass depends on `fit`'s seed alone, as far as can be seen."""
        return self.train.origin.exact

    @validated
    def held_out(self, every: Annotated[int, Field(ge=2)] = 5) -> OwnData:
        """As `Dataset.held_out`: the training examples alone, in two."""
        train, chosen = self._apart(every)
        return replace(self, train=train, test=chosen, fingerprint=f"{self.fingerprint}-held-out-{every}")

    @validated
    def with_validation(self, every: Annotated[int, Field(ge=2)] = 5) -> OwnData:
        """As `Dataset.with_validation`: a part of the training examples set apart, to choose by.

        Example:
            >>> import torch
            >>> from layerlab import own_data
            >>> x, y = torch.randn(100, 3), torch.arange(100) % 2
            >>> data = own_data(((x, y), (x[:20], y[:20])), device="cpu").with_validation()
            >>> len(data.train), len(data.validation), len(data.test)
            (80, 20, 20)
        """
        train, chosen = self._apart(every)
        return replace(self, train=train, validation=chosen, fingerprint=f"{self.fingerprint}-validation-{every}")

    def _apart(self, every: int) -> tuple[Examples, Examples]:
        chosen = torch.arange(len(self.train)) % every == every - 1
        # What is chosen by is read as it is.
        return self.train.rows(~chosen), replace(self.train.rows(chosen), transform=None)

    def __repr__(self) -> str:
        sizes = [f"{len(half):,}" for half in (self.train, self.validation, self.test) if half is not None]
        classes = f", {self.classes} classes" if self.classes else ""
        return f"{self.name}: {' + '.join(sizes)} examples{classes}, from {self.source}" + (
            f"; {self.note}" if self.note else "")

    def _repr_html_(self) -> str:
        halves = zip(HALVES, (self.train, self.validation, self.test), strict=True)
        rows = [(name, f"{len(half):,} examples") for name, half in halves if half is not None]
        return Table(("data", self.name), [*rows, ("from", self.source)])._repr_html_()


Data = Dataset | OwnData
# What `own_data`, and so `fit` and `compare`, make into data.
Given = Data | tuple[Any, ...] | list[Any] | Mapping[Any, Any] | torch_data.Dataset[Any]


@validated
def own_data(
    halves: SkipValidation[Given], *, name: str = "own data", transform: Callable[..., Any] | None = None,
    test_transform: Callable[..., Any] | None = None, device: str | torch.device = "auto",
) -> Data:
    """Make data of your own into what `fit` and `compare` train with; call it to give a name or transforms.

    Both also take `halves` themselves, and call this function.

    Args:
        halves: (train, test), or a dict of train, test and validation, such as a Hugging Face `DatasetDict`. A half is
            a torch `DataLoader`, which keeps its batches and its sampler; a torch or Hugging Face `Dataset`; or
            tensors: a pair (x, y), a dict of them, or one. Of a single `Dataset` every fifth example is held out for
            testing.
        name: in tables and logs.
        transform: (x, y) → (x, y) of each training batch, such as torchvision's `v2.MixUp` or any other transform of
            `v2`, which draws once a batch; what each example draws for itself belongs into its `Dataset`.
        test_transform: the same of the other halves' batches.
        device: `auto` takes a GPU if there is one.

    A batch (x, y) gives x to the network; of a longer one the last part is y; of a dict y is the entry `label`,
    `labels`, `target` or the like. A dict's other entries go to the network by their names. Images that are bytes come
    from 0 to 1; where x and y are resident bytes and classes, normalised, as `load_dataset` does it.

    Raises:
        LayerlabError: halves of other kinds, or that do not fit together; batches that are no tensors.

    Example:
        >>> import torch
        >>> from layerlab import fit, own_data
        >>> x = torch.randn(256, 3)
        >>> y = (x.sum(1) > 0).long()
        >>> data = own_data(((x[:192], y[:192]), (x[192:], y[192:])), name="sums", device="cpu")
        >>> data
        sums: 192 + 64 examples, 2 classes, from tensors
        >>> fit(torch.nn.Linear(3, 2), data, epochs=8, lr=0.5, batch_size=32, progress=False).final["test/top1"] > 0.9
        True
    """
    if isinstance(halves, Dataset | OwnData):
        return halves
    place = resolve_device(device)
    given = _by_name(halves)
    note = "" if TESTING in given else "every fifth example is held out for testing"
    if transform is None and test_transform is None and all(map(_are_images, given.values())):
        return _image_dataset(given, name, place, note)
    with other_draws():
        origins = {half: _origin(each, half) for half, each in given.items()}
        if TESTING not in origins:
            chosen = _every_fifth(len(origins[TRAINING]))
            origins |= {TRAINING: origins[TRAINING].rows(~chosen), TESTING: origins[TRAINING].rows(chosen)}
        made = {half: _half(origin, half, place, transform if half == TRAINING else test_transform)
                for half, origin in origins.items()}
        _check_alike(made)
        fingerprint = _fingerprint(made)
    origin = made[TRAINING].origin
    if isinstance(origin, Items) and (left := left_out(origin.dataset[0])):
        note = "; ".join(part for part in (note, f"left out, since they hold no numbers: {', '.join(left)}") if part)
    names = _class_names(given[TRAINING])
    return OwnData(name, made[TRAINING], made[TESTING], len(names) or _classes(made), fingerprint,
                   _kind(given[TRAINING]), names, note, made.get(VALIDATION))


def _by_name(halves: Any) -> dict[str, Any]:
    """Half → what was given for it.

    Raises:
        LayerlabError: halves of other names, or none for training.
    """
    if isinstance(halves, Mapping):
        named = {half_of(str(key)): value for key, value in halves.items()}
        if TRAINING not in named:
            raise LayerlabError(f"data has {', '.join(map(repr, halves))} and no 'train'; give {FORMS}.")
        if None in named or len(named) < len(halves):
            raise LayerlabError(f"data has {', '.join(map(repr, halves))}, not all of which are halves of one dataset; "
                                f"give {FORMS}.")
        found = {half: named[half] for half in HALVES if half in named}
        if TESTING not in found and VALIDATION in found:
            found[TESTING] = found.pop(VALIDATION)
        return found
    if isinstance(halves, tuple | list) and len(halves) in (2, 3):
        if len(halves) == 2 and all(isinstance(each, Tensor) for each in halves) and (
                halves[0].shape[1:] != halves[1].shape[1:]):
            raise LayerlabError("data is a pair of tensors of different shapes, which are no (train, test); give "
                                "((x, y), (test_x, test_y)).")
        return dict(zip(HALVES if len(halves) == 3 else (TRAINING, TESTING), halves, strict=True))
    if _is_map(halves) and not isinstance(halves, torch_data.DataLoader):
        return {TRAINING: halves}
    raise LayerlabError(f"data cannot be {_kind(halves)}; give {FORMS}, or what load_dataset gives.")


def _is_map(half: Any) -> bool:
    """Whether examples are read from it by their numbers."""
    return not isinstance(half, Tensor | str | Sequence | Mapping | torch_data.IterableDataset) and all(
        hasattr(half, name) for name in ("__len__", "__getitem__"))


def _origin(half: Any, name: str) -> Origin:
    """Where a half's batches come from.

    Raises:
        LayerlabError: it is none of the kinds that there are.
    """
    if isinstance(half, torch_data.DataLoader):
        return Loader(half)
    if isinstance(half, torch_data.TensorDataset):
        return _resident(half.tensors, name)
    if isinstance(half, list) and half and not isinstance(half[0], Tensor):
        return Items(half)  # a list of examples
    if _is_hugging_face(half):
        return Items(half.with_format("torch"))
    if isinstance(half, torch_data.IterableDataset):
        raise LayerlabError(f"The {name} half is an IterableDataset, which has no examples by number; give a "
                            "DataLoader of it.")
    if _is_map(half):
        if not len(half):
            raise LayerlabError(f"The {name} half is empty; give it examples.")
        return Items(half)
    if not (isinstance(half, Tensor | Mapping | Sequence) and not isinstance(half, str) and tensors(half)):
        raise LayerlabError(f"The {name} half cannot be {_kind(half)}; give {FORMS}.")
    return _resident(tuple(half) if isinstance(half, list) else half, name)


def _resident(tree: Any, name: str) -> Resident:
    """Tensors with one row for each example.

    Raises:
        LayerlabError: they have different lengths, or none.
    """
    lengths = [len(each) if each.dim() else 0 for each in tensors(tree)]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise LayerlabError(f"The tensors of the {name} half have {' and '.join(map(str, lengths))} rows; each example "
                            "is one row of all of them.")
    # Once, rather than at each batch.
    return Resident(on_tensors(lambda each: each.float() if each.dtype == torch.float64 else each, tree))


def _every_fifth(examples: int) -> Tensor:
    """Which examples are held out where there is no test half, bool (examples,)."""
    return torch.arange(examples) % 5 == 4


def _half(origin: Origin, name: str, device: torch.device, transform: Callable[..., Any] | None) -> Examples:
    form = Form.of(origin.first(), f"the {name} half")
    training = name == TRAINING
    return Examples(origin.to(device), form, device, transform if training else None, None if training else transform)


def _check_alike(halves: Mapping[str, Examples]) -> None:
    """Raises LayerlabError where halves give batches of different forms."""
    for name, half in halves.items():
        if half.form != halves[TRAINING].form:
            raise LayerlabError(
                f"A training batch is {halves[TRAINING].form} and one of the {name} half {half.form}; give both halves "
                "batches of one form."
            )


def _fingerprint(halves: Mapping[str, Examples]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, half in halves.items():
        values, _ = half.origin.parts()
        for value in (name, half.form, *values):
            if isinstance(value, Tensor):
                digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
                value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.hexdigest()


def _classes(halves: Mapping[str, Examples]) -> int:
    """One more than the largest class, of tensors; 0 where all examples would have to be read."""
    most = 0
    for half in halves.values():
        if not isinstance(half.origin, Resident):
            return 0
        _, y = half.form.split(half.origin.tree)
        if not are_classes(y):
            return 0
        most = max(most, int(y.max()) + 1)
    return most


def _class_names(half: Any) -> tuple[str, ...]:
    """What a torchvision or Hugging Face dataset calls its classes."""
    dataset: Any = half.dataset if isinstance(half, torch_data.DataLoader) else half
    if _is_hugging_face(dataset):
        found = [each.names for each in dataset.features.values() if hasattr(each, "names")]
        return tuple(found[0]) if len(found) == 1 else ()
    names = getattr(dataset, "classes", ())
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def _is_hugging_face(half: Any) -> bool:
    return type(half).__module__.startswith("datasets.") and hasattr(half, "with_format")


def _kind(half: Any) -> str:
    """What was given, in words."""
    if isinstance(half, torch_data.DataLoader):
        return f"a DataLoader of {type(half.dataset).__name__}"
    if isinstance(half, Tensor) or (isinstance(half, tuple | list | Mapping) and tensors(half)):
        return "tensors"
    return f"a {type(half).__name__}" if hasattr(half, "__len__") and not isinstance(half, str) else brief(half)


def _are_images(half: Any) -> bool:
    """Whether a half is images as bytes, (n, channels, height, width), with classes."""
    if not (isinstance(half, tuple | list) and len(half) == 2 and all(isinstance(each, Tensor) for each in half)):
        return False
    images, labels = half
    return images.dtype == torch.uint8 and images.dim() == 4 and are_classes(labels) and len(images) == len(labels) > 0


def _image_dataset(
    halves: Mapping[str, tuple[Tensor, Tensor]], name: str, device: torch.device, note: str
) -> Dataset:
    """Resident images, as `load_dataset` has them: they can be augmented, whitened, and trained small first."""
    mean, std = channel_statistics(halves[TRAINING][0])
    splits = {half: Split(x.to(device), y.long().to(device), mean, std) for half, (x, y) in halves.items()}
    if TESTING not in splits:
        whole, chosen = splits[TRAINING], _every_fifth(len(splits[TRAINING])).to(device)
        splits |= {TRAINING: whole.rows(~chosen), TESTING: whole.rows(chosen)}
    digest = hashlib.blake2b(digest_size=8)
    for x, y in halves.values():
        for each in (x, y):
            digest.update(f"{tuple(each.shape)}".encode() + each.cpu().contiguous().numpy().tobytes())
    classes = max(int(y.max()) for _, y in halves.values()) + 1
    return Dataset(name, splits[TRAINING], splits[TESTING], classes, digest.hexdigest(), "tensors",
                   note=note, validation=splits.get(VALIDATION))


def on_halves(function: Callable[[Any], Any], data: Data) -> Data:
    """The same data with a function's value in the place of each half that there is."""
    halves = {name: getattr(data, name) for name in ("train", "test", "validation")}
    return replace(data, **{name: function(half) for name, half in halves.items() if half is not None})


def offers(data: Data) -> frozenset[str]:
    """What data give to a strategy that needs it, in the words of `Strategy.needs`."""
    if isinstance(data, Dataset):
        found = {"one tensor", "images", "targets", "classes", "fixed order"}
        return frozenset({*found, "resident"} if isinstance(data.train.images, Tensor) else found)
    x, y = data.test.look()
    found = set()
    if isinstance(x, Tensor):
        found |= {"one tensor"} | ({"images"} if x.dim() == 4 and x.is_floating_point() else set())
    if isinstance(y, Tensor):
        found |= {"targets"} | ({"classes"} if are_classes(y) else set())
    if data.train.origin.ordered:
        found |= {"fixed order"}
    return frozenset(found | {"resident"} if data.train.origin.resident else found)


