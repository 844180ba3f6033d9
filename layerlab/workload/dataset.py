"""Datasets in memory or streamed: splits, batches, augmentation."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

import torch
from PIL import Image
from pydantic import Field, SkipValidation
from torch import Tensor

from layerlab.base.arguments import validated
from layerlab.base.errors import LayerlabError, unknown
from layerlab.show.table import Table
from layerlab.workload.sources import Streamed


def dataset_table(data: Dataset) -> Table:
    """What a dataset is, a row a property."""
    channels, height, width = data.shape
    names = f" ({', '.join(data.class_names[:10])}{', …' if len(data.class_names) > 10 else ''})"
    apart = {"validation images": f"{len(data.validation):,}"} if data.validation is not None else {}
    what: Mapping[str, Any] = {
        "training images": f"{len(data.train):,}", **apart, "test images": f"{len(data.test):,}",
        "size": f"{height} × {width} pixels, {channels} channel{'s' * (channels > 1)}",
        "classes": f"{data.classes}{names if data.class_names else ''}", "from": data.source,
    } | ({"note": data.note} if data.note else {})
    return Table(("dataset", data.name), list(what.items()))


# What is done to training images before each step: shifted (`crop`, `translate`), and half of them mirrored.
Augment = Literal[
    "none", "crop", "crop-flip", "crop-alternate", "translate", "translate-flip", "translate-alternate"
]


@dataclass(eq=False)
class Moment:
    """Where a training stands, as far as its images depend on it: the one thing that all copies of a split share.

    Attributes:
        epoch: counted from 1.
        side: pixels of a side of the images that are given; None for as many as they have.
    """

    epoch: int = 0
    side: int | None = None


@dataclass(frozen=True, eq=False)
class Split:
    """The images and labels of one half of a dataset.

    Attributes:
        images: uint8, (n, channels, height, width), on the device; or a `Streamed` source of such images by index.
        labels: int64, (n,), on the device.
        mean, std: per channel, in units of the uint8 scale (0 to 255).
        augment: what `batches` does to shuffled batches: `none`; `crop` (shift by up to `padding` pixels, zeros
            outside) or `translate` (the same, the image's reflection outside); with `-flip` half of them are mirrored
            at random; with `-alternate` each is mirrored in every second epoch, half of them in the odd ones and half
            in the even ones, so that two epochs show both sides of each (Jordan, arXiv 2404.00498, Section 3.6).
        padding: pixels.
        share: (index, count) of several processes that train together: `batches` gives this one's part of each
            shuffled batch, drawn as if it were alone, and reads no more than that part.
        moment: `fit` says there in which epoch its training is, and the side of the images that it wants.

    Raises:
        LayerlabError: an augmentation that does not exist, with the nearest name; a padding or share out of range.

    Example:
        >>> from layerlab import load_dataset
        >>> split = load_dataset("digits", limit=100, device="cpu").test
        >>> x, y = next(split.batches(10))
        >>> tuple(x.shape)
        (10, 1, 8, 8)
    """

    images: Tensor | Streamed
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = "none"
    padding: int = 4
    share: tuple[int, int] = (0, 1)
    moment: Moment = field(default_factory=Moment)

    def __post_init__(self) -> None:
        if self.augment not in get_args(Augment):
            raise unknown("augmentation", self.augment, get_args(Augment))
        if not isinstance(self.padding, int) or self.padding < 0:
            raise LayerlabError(f"padding must be a whole number of pixels, at least 0, got {self.padding!r}.")
        index, count = self.share
        if not 0 <= index < count:
            raise LayerlabError(f"share must be (index, count) with an index from 0 to count − 1, got {self.share!r}.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where batches lie."""
        return self.labels.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image, as `batches` gives it."""
        channels, height, width = self.images.shape[1:]
        side = self.moment.side
        return (channels, height, width) if side is None else (channels, side, side * width // height)

    @property
    def chance(self) -> float:
        """The share of the most frequent class: what always naming it would reach."""
        return self.labels.cpu().bincount().max().item() / len(self)

    def rows(self, chosen: Tensor) -> Split:
        """The images that a mask, bool (n,), chooses."""
        if isinstance(self.images, Streamed):
            images: Tensor | Streamed = self.images.subset(chosen.nonzero()[:, 0])
        else:
            images = self.images[chosen]
        return replace(self, images=images, labels=self.labels[chosen])

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.mean, device=self.labels.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=self.labels.device).view(1, -1, 1, 1)
        return -mean / std, 1 / std

    def normalise(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 images → (x − mean) / std in `dtype`."""
        shift, factor = self._scale
        # In place: a second buffer of the batch's size costs more than the arithmetic.
        return images.to(dtype, copy=True).mul_(factor).add_(shift)

    def batches(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the split.

        Args:
            batch_size: images a batch.
            generator: a CPU generator; with it the order is shuffled, `augment` is applied and the uneven rest is
                left out (each pass another one). Without it: in order, plain, the rest included.
            dtype, memory_format: of the images given.

        Yields:
            images (batch, channels, height, width), normalised; labels (batch,).
        """
        device, n = self.labels.device, len(self)
        index, workers = self.share if generator is not None else (0, 1)
        order, count = pass_order(n, batch_size, generator)
        order = order.to(device)
        shifts = self._draw(n, order, generator) if generator is not None else None
        first, last = batch_size * index // workers, batch_size * (index + 1) // workers
        places = [slice(i * batch_size + first, i * batch_size + last) for i in range(count)]
        numbers = [order[here] for here in places]
        if isinstance(self.images, Streamed):
            raw = self.images.stream(numbers)
        else:
            images = self.images
            raw = (images[chosen] for chosen in numbers)
        for here, chosen, batch in zip(places, numbers, raw, strict=True):
            batch = self._resized(batch.to(device, non_blocking=True))
            if shifts is not None:
                batch = self._shift(batch, *(part[here] for part in shifts))
            yield self.normalise(batch, dtype).contiguous(memory_format=memory_format), self.labels[chosen]

    def _draw(self, n: int, order: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor] | None:
        """An epoch's augmentation, drawn at once: rows, columns (0 … 2·padding) and whether to mirror, (n,) each.

        All are in the order of the pass.
        """
        if self.augment == "none":
            return None
        device = self.labels.device
        rows, columns = torch.randint(2 * self.padding + 1, (2, n), generator=generator).to(device)
        flips = torch.rand(n, generator=generator).to(device) < (0.5 if self.augment.endswith("-flip") else 0.0)
        if self.augment.endswith("-alternate"):
            flips = self._mirrored(n, generator)[order]
        return rows, columns, flips

    def _mirrored(self, n: int, generator: torch.Generator) -> Tensor:
        """Which images the present epoch shows mirrored, bool (n,), by their number."""
        # From the seed alone, so that every epoch knows what the first one drew.
        first = torch.rand(n, generator=torch.Generator().manual_seed(generator.initial_seed())) < 0.5
        return (first ^ bool(self.moment.epoch % 2)).to(self.labels.device)

    def _resized(self, images: Tensor) -> Tensor:
        """The images at the side that the moment asks for."""
        if self.moment.side is None or images.shape[-2:] == (sides := self.shape[1:]):
            return images
        if images.device.type == "cpu":
            return torch.nn.functional.interpolate(images, sides, mode="bilinear", antialias=True)
        # A GPU interpolates no bytes.
        floats = torch.nn.functional.interpolate(images.float(), sides, mode="bilinear", antialias=True)
        return floats.round_().clamp_(0, 255).to(images.dtype)

    def _shift(self, images: Tensor, rows: Tensor, columns: Tensor, flips: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        mode = "reflect" if self.augment.startswith("translate") else "constant"
        padded = torch.nn.functional.pad(images, [self.padding] * 4, mode=mode)
        # Every shifted window as a view, then one gather: (batch, rows, columns, channels, height, width).
        windows = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
        cropped = windows[torch.arange(len(images), device=images.device), rows, columns]
        return torch.where(flips.view(-1, 1, 1, 1), cropped.flip(-1), cropped)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named dataset, both halves.

    Attributes:
        name: as given to `load_dataset`.
        train, test: the halves.
        classes: the number of classes.
        fingerprint: a digest of the source's content and of how it was read (size, channels, limit).
        source: the folder or package it came from.
        class_names: of the class folders, in the labels' order; empty where a source has none.
        note: what a reader of its numbers should know, such as a test half that was split off.
        validation: images that are neither trained on nor reported: what is chosen is chosen by them.
    """

    name: str
    train: Split
    test: Split
    classes: int
    fingerprint: str
    source: str
    class_names: tuple[str, ...] = ()
    note: str = ""
    validation: Split | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.train.shape

    @validated
    def augmented(self, augment: SkipValidation[Augment], padding: SkipValidation[int] = 4) -> Dataset:
        """The same data with another augmentation of the training half; `padding` in pixels.

        Raises:
            LayerlabError: an augmentation that does not exist, with the nearest name.

        Example:
            >>> from layerlab import load_dataset
            >>> load_dataset("digits", limit=100, device="cpu").augmented("crop_flip")
            Traceback (most recent call last):
            layerlab.base.errors.LayerlabError: Unknown augmentation 'crop_flip'. Did you mean 'crop-flip'? Known: ...
        """
        return replace(self, train=replace(self.train, augment=augment, padding=padding))

    @validated
    def held_out(self, every: Annotated[int, Field(ge=2)] = 5) -> Dataset:
        """The training images alone, in two, so that settings can be chosen without a look at the test images.

        Args:
            every: each so-many-th training image is held out.

        Returns:
            A dataset whose `test` is what was held out and whose `train` is the rest.

        Example:
            >>> from layerlab import load_dataset
            >>> apart = load_dataset("digits", limit=100, device="cpu").held_out(every=4)
            >>> len(apart.train), len(apart.test)
            (75, 25)
        """
        train, chosen = self._apart(every)
        return replace(self, train=train, test=chosen, fingerprint=f"{self.fingerprint}-held-out-{every}")

    @validated
    def with_validation(self, every: Annotated[int, Field(ge=2)] = 5) -> Dataset:
        """The same data with a part of the training images set apart, to choose by; the test images stay.

        Args:
            every: each so-many-th training image is set apart.

        Example:
            >>> from layerlab import load_dataset
            >>> data = load_dataset("digits", limit=100, device="cpu").with_validation(every=5)
            >>> len(data.train), len(data.validation)
            (80, 20)
        """
        train, chosen = self._apart(every)
        return replace(self, train=train, validation=chosen, fingerprint=f"{self.fingerprint}-validation-{every}")

    def _apart(self, every: int) -> tuple[Split, Split]:
        """(the other training images, each so-many-th one)."""
        chosen = torch.arange(len(self.train), device=self.train.labels.device) % every == every - 1
        return self.train.rows(~chosen), self.train.rows(chosen)

    def __repr__(self) -> str:
        channels, height, width = self.shape
        sizes = [f"{len(half):,}" for half in (self.train, self.validation, self.test) if half is not None]
        return (
            f"{self.name}: {' + '.join(sizes)} images, {channels}×{height}×{width}, "
            f"{self.classes} classes, from {self.source}" + (f"; {self.note}" if self.note else "")
        )

    def samples(self, count: int = 10) -> Image.Image:
        """The first training image of each of the first classes, side by side, at least 64 pixels high."""
        labels = self.train.labels.cpu()
        rows = torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()[:count]])
        images = self.train.images
        chosen = next(images.stream([rows])) if isinstance(images, Streamed) else images[rows.to(images.device)]
        strip = torch.cat(list(torch.nn.functional.pad(chosen.cpu(), (1, 1), value=255)), dim=2)
        picture = Image.fromarray(strip.expand(3, -1, -1).permute(1, 2, 0).numpy())
        times = -(-64 // picture.height)
        return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)

    def _repr_html_(self) -> str:
        from layerlab.show.figures import picture

        stream = io.BytesIO()
        self.samples().save(stream, "PNG")
        return dataset_table(self)._repr_html_() + picture(stream.getvalue())


@validated
def pass_order(
    examples: Annotated[int, Field(ge=0)], batch_size: Annotated[int, Field(ge=1)], generator: torch.Generator | None
) -> tuple[Tensor, int]:
    """What one pass over `examples` reads: their numbers in its order, (examples,), and how many batches it gives.

    From a generator: shuffled, and the uneven rest at the end belongs to no batch. Without one: in order, the rest in a
    batch of its own.

    Example:
        >>> import torch
        >>> from layerlab import pass_order
        >>> order, batches = pass_order(5, 2, torch.Generator().manual_seed(0))
        >>> sorted(order.tolist()), batches
        ([0, 1, 2, 3, 4], 2)
    """
    if generator is None:
        return torch.arange(examples), -(-examples // batch_size)
    return torch.randperm(examples, generator=generator), examples // batch_size


@validated
def noise(
    images: Annotated[int, Field(ge=1)], shape: tuple[int, int, int], device: str | torch.device = "cpu",
    classes: Annotated[int, Field(ge=1)] = 10,
) -> Dataset:
    """A resident dataset of random numbers, for measuring what does not depend on what the images show.

    Args:
        images: for training; the first eight are the test split, too.
        shape: of an image, (channels, height, width).
        device: where it lies.
        classes: of the random labels.

    Example:
        >>> from layerlab import noise
        >>> noise(64, (3, 32, 32)).shape
        (3, 32, 32)
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, *shape), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(0, classes, (images,), generator=generator).to(device)
    train = Split(pixels, labels, (127.5,) * shape[0], (73.6,) * shape[0])
    test = Split(pixels[:8], labels[:8], train.mean, train.std)
    return Dataset("noise", train, test, classes, f"noise-{images}-{shape}", "random numbers")


def channel_statistics(images: Tensor | Streamed) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in units of the uint8 scale.

    Over every so-many-th training image, fewer than 20,000 in all (streamed: fewer than 4,000).
    """
    sample = next(images.stream([torch.arange(0, len(images), max(1, len(images) // 2000))])) if isinstance(
        images, Streamed
    ) else images[:: max(1, len(images) // 10_000)]
    pixels = sample.to("cpu", torch.float32)
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    return tuple(mean.tolist()), tuple(std.clamp_min(1.0).tolist())


def balanced(labels: Tensor, limit: int) -> Tensor:
    """Indices of `limit` examples in which every class keeps its share: the first ones of each, in their order."""
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        mask = labels == label
        rank[mask] = (torch.arange(int(mask.sum())) * (len(labels) / int(mask.sum()))).long()
    return rank.argsort(stable=True)[:limit].sort().values
