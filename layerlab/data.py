"""Named image datasets as uint8 tensors on the device, cropped, flipped and normalised there a batch at a time.

Sources, in this order: a Hugging Face parquet folder (`<root>/<name>/{train,test}-*.parquet` with the columns
`image: {bytes, path}` and `label`), a torchvision layout under `<root>`, a torchvision download (when asked for). The
root is `$LAYERLAB_DATA`. `digits` is scikit-learn's and needs no file.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from layerlab.errors import LayerlabError, first_line, unknown

Augment = Literal["none", "crop", "crop-flip"]


class Shape(NamedTuple):
    """What is known of a dataset before it is read: classes, channels, and the side of its images (None: varies)."""

    classes: int
    channels: int
    side: int | None


DATASETS = {
    "digits": Shape(10, 1, 8),
    "mnist": Shape(10, 1, 28),
    "fashion-mnist": Shape(10, 1, 28),
    "cifar10": Shape(10, 3, 32),
    "imagenette": Shape(10, 3, None),
    "imagenet": Shape(1000, 3, None),
}
# The subfolders in which torchvision keeps its extracted folder datasets, (train, test).
FOLDERS = {"imagenette": ("imagenette2-160", "imagenette2-320", "imagenette2", "imagenette"), "imagenet": ("imagenet",)}
# The names that the halves of a folder of class folders go by.
TRAINING, TESTING = ("train",), ("val", "test", "validation")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}


@dataclass(frozen=True, eq=False)
class Split:
    """The images and labels of one half of a dataset.

    Attributes:
        images: uint8, (n, channels, height, width), on the device; or a `Streamed` source of such images by index.
        labels: int64, (n,), on the device.
        mean, std: per channel, in units of the uint8 scale (0 to 255).
        augment: what `batches` does to shuffled batches: `none`, `crop` (shift by up to `padding` pixels, zeros
            outside), `crop-flip` (and mirror half of them).
        padding: pixels.
        share: (index, count) of several processes that train together: `batches` gives this one's part of each
            shuffled batch, drawn as if it were alone, and reads no more than that part.
    """

    images: Tensor | Streamed
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = "none"
    padding: int = 4
    share: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

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
        shifts = self._draw(n, generator) if generator is not None else None
        first, last = batch_size * index // workers, batch_size * (index + 1) // workers
        places = [slice(i * batch_size + first, i * batch_size + last) for i in range(count)]
        if isinstance(self.images, Streamed):
            raw = self.images.stream([order[here] for here in places])
        else:
            images = self.images
            raw = (images[order[here]] for here in places)
        for here, batch in zip(places, raw, strict=True):
            batch = batch.to(device, non_blocking=True)
            if shifts is not None:
                batch = self._shift(batch, *(part[here] for part in shifts))
            yield self.normalise(batch, dtype).contiguous(memory_format=memory_format), self.labels[order[here]]

    def _draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor] | None:
        """An epoch's augmentation, drawn at once: rows, columns (0 … 2·padding) and whether to mirror, (n,) each."""
        if self.augment == "none":
            return None
        device = self.labels.device
        rows, columns = torch.randint(2 * self.padding + 1, (2, n), generator=generator).to(device)
        flips = torch.rand(n, generator=generator).to(device) < (0.5 if self.augment == "crop-flip" else 0.0)
        return rows, columns, flips

    def _shift(self, images: Tensor, rows: Tensor, columns: Tensor, flips: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = torch.nn.functional.pad(images, [self.padding] * 4)
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
    """

    name: str
    train: Split
    test: Split
    classes: int
    fingerprint: str
    source: str
    class_names: tuple[str, ...] = ()
    note: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.train.shape

    def augmented(self, augment: Augment, padding: int = 4) -> Dataset:
        """The same data with another augmentation of the training half; `padding` in pixels."""
        return replace(self, train=replace(self.train, augment=augment, padding=padding))

    def __repr__(self) -> str:
        channels, height, width = self.shape
        return (
            f"{self.name}: {len(self.train):,} + {len(self.test):,} images, {channels}×{height}×{width}, "
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
        from layerlab import tables

        stream = io.BytesIO()
        self.samples().save(stream, "PNG")
        return tables.dataset_table(self)._repr_html_() + tables.picture(stream.getvalue())


def pass_order(examples: int, batch_size: int, generator: torch.Generator | None) -> tuple[Tensor, int]:
    """What one pass over `examples` reads: their numbers in its order, (examples,), and how many batches it gives.

    From a generator: shuffled, and the uneven rest at the end belongs to no batch. Without one: in order, the rest in a
    batch of its own.
    """
    if generator is None:
        return torch.arange(examples), -(-examples // batch_size)
    return torch.randperm(examples, generator=generator), examples // batch_size


def load_dataset(
    name: str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    root: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    download: bool = False,
    memory_budget: float | None = None,
) -> Dataset:
    """Load a dataset by name, or any folder in one of the layouts that the module's text names.

    Args:
        name: one of `DATASETS`, or the path of a parquet folder or of a folder of one's own images in torchvision's
            ImageFolder layout: `train/` and `val/` (or `test/`) with a folder a class. Where there is no test half,
            or there are class folders alone, every fifth image of each class is held out for testing.
        image_size: pixels of a side; larger images are scaled by their shorter side and centre-cropped, smaller ones
            enlarged. Default: the dataset's own; needed where sizes vary.
        channels: 1 or 3. Default: the dataset's own.
        limit, test_limit: keep the first that many training or test images, class by class in proportion.
        root: where datasets lie. Default: `$LAYERLAB_DATA`.
        device: `auto` takes a GPU if there is one.
        download: let torchvision fetch what is missing.
        memory_budget: bytes that images may take on the device (default: half of what is free); what does not fit is
            streamed from its files.

    Raises:
        LayerlabError: unknown name, nothing found, a corrupt or truncated file, an image that does not decode, labels
            out of range; naming the file.
    """
    place = resolve_device(device)
    path = Path(name).expanduser()
    known = DATASETS.get(name)
    if known is None and not path.is_dir():
        raise unknown("dataset", name, DATASETS, f"Or pass the path of a folder that exists; {path.absolute()} does "
                      "not.")
    for label, value, low in (("image_size", image_size, 1), ("limit", limit, 1), ("test_limit", test_limit, 1)):
        if value is not None and value < low:
            raise LayerlabError(f"{label} must be at least {low}, got {value}.")
    if channels not in (None, 1, 3):
        raise LayerlabError(f"channels must be 1 or 3, got {channels}.")
    channels = channels or (known.channels if known else 3)
    if name == "digits":
        found = _Found(_digits(image_size or 8, channels), "scikit-learn", "sklearn-digits")
    else:
        found = _files(name, path if known is None else None, _root(root), image_size, channels, download, place,
                       memory_budget)
    halves, source, digest = found.halves, found.source, found.digest
    classes = known.classes if known else len(found.class_names) or int(halves["train"][1].max()) + 1
    for half, (_, labels) in halves.items():
        if len(labels) == 0:
            raise LayerlabError(f"Dataset {name!r} has no {half} images in {source}; give it at least one.")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise LayerlabError(
                f"Dataset {name!r} in {source} has {half} labels from {low} to {high}, out of range for its {classes} "
                f"classes (0 to {classes - 1}); correct the labels."
            )
    for half, most in (("train", limit), ("test", test_limit)):
        images, labels = halves[half]
        if most is not None and most < len(labels):
            keep = _balanced(labels, most)
            halves[half] = (images.subset(keep) if isinstance(images, Streamed) else images[keep], labels[keep])
    mean, std = _statistics(halves["train"][0])
    splits = {
        half: Split(images if isinstance(images, Streamed) else images.to(place), labels.to(place), mean, std)
        for half, (images, labels) in halves.items()
    }
    reading = f"{digest}|{image_size}|{channels}|{limit}|{test_limit}"
    fingerprint = hashlib.blake2b(reading.encode(), digest_size=8).hexdigest()
    return Dataset(name, splits["train"], splits["test"], classes, fingerprint, source, found.class_names, found.note)


def noise(
    images: int, shape: tuple[int, int, int], device: str | torch.device = "cpu", classes: int = 10
) -> Dataset:
    """A resident dataset of random numbers, for measuring what does not depend on what the images show.

    Args:
        images: for training; the first eight are the test split, too.
        shape: of an image, (channels, height, width).
        device: where it lies.
        classes: of the random labels.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, *shape), dtype=torch.uint8, generator=generator).to(device)
    labels = torch.randint(0, classes, (images,), generator=generator).to(device)
    train = Split(pixels, labels, (127.5,) * shape[0], (73.6,) * shape[0])
    test = Split(pixels[:8], labels[:8], train.mean, train.std)
    return Dataset("noise", train, test, classes, f"noise-{images}-{shape}", "random numbers")


def available(name: str, root: str | os.PathLike[str] | None = None) -> str:
    """Where a known dataset would be read from, or an empty string; looks for its files without reading them."""
    if name == "digits":
        return "embedded (scikit-learn)"
    folder = _root(root)
    if any((folder / name).glob("train-*.parquet")):
        return str(folder / name)
    for candidate in (folder / sub for sub in FOLDERS.get(name, ())):
        if (candidate / "train").is_dir():
            return str(candidate)
    laid_out = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "cifar-10-batches-py"}.get(name)
    return str(folder / laid_out) if laid_out and (folder / laid_out).is_dir() else ""


def _root(root: str | os.PathLike[str] | None) -> Path:
    return Path(root or os.environ.get("LAYERLAB_DATA") or Path.home() / ".cache/layerlab/data")


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` → a CUDA device if there is one, else the CPU.

    Raises:
        LayerlabError: a device that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise LayerlabError(
            f"Device {str(device)!r} is not available here ({first_line(error)}); use 'auto' or 'cpu'."
        ) from None
    return place


def _statistics(images: Tensor | Streamed) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in units of the uint8 scale.

    Over every so-many-th training image, fewer than 20,000 in all (streamed: fewer than 4,000).
    """
    sample = next(images.stream([torch.arange(0, len(images), max(1, len(images) // 2000))])) if isinstance(
        images, Streamed
    ) else images[:: max(1, len(images) // 10_000)]
    pixels = sample.to("cpu", torch.float32)
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    return tuple(mean.tolist()), tuple(std.clamp_min(1.0).tolist())


def _balanced(labels: Tensor, limit: int) -> Tensor:
    """Indices of `limit` examples in which every class keeps its share: the first ones of each, in their order."""
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        mask = labels == label
        rank[mask] = (torch.arange(int(mask.sum())) * (len(labels) / int(mask.sum()))).long()
    return rank.argsort(stable=True)[:limit].sort().values


def _digits(size: int, channels: int) -> dict[str, tuple[Tensor | Streamed, Tensor]]:
    """scikit-learn's 1,797 scans, 8×8, every fifth of each class for testing."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = torch.from_numpy(scans.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(scans.target).long()
    if size != 8:
        scaled = torch.nn.functional.interpolate(images.float(), size=size, mode="bilinear", antialias=size < 8)
        images = scaled.round().to(torch.uint8)
    images = images.expand(-1, channels, -1, -1).contiguous()
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        test[(labels == label).nonzero().flatten()[::5]] = True
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}


# ---------------------------------------------------------------------------------------------- files


class _Found(NamedTuple):
    """A dataset as its source gives it: half → images and labels, the folder, a digest of the content."""

    halves: dict[str, tuple[Tensor | Streamed, Tensor]]
    source: str
    digest: str
    class_names: tuple[str, ...] = ()
    note: str = ""


def _files(
    name: str,
    folder: Path | None,
    root: Path,
    size: int | None,
    channels: int,
    download: bool,
    device: torch.device,
    budget: float | None,
) -> _Found:
    """Both halves of a dataset that lies in files."""
    where = folder or root / name
    halves: Mapping[str, Source] = {}
    class_names: tuple[str, ...] = ()
    note = ""
    if any(where.glob("train-*.parquet")):
        halves = {half: ParquetSource.open(where, half) for half in ("train", "test")}
    elif folder is not None:
        halves, note = image_folders(folder)
    elif name in FOLDERS:
        for candidate in (root / sub for sub in FOLDERS[name]):
            if (candidate / "train").is_dir():
                where = candidate
                halves, held_out = image_folders(candidate)
                if held_out:
                    raise LayerlabError(f"{candidate} has no {' or '.join(TESTING)} folder; add the missing half.")
                break
    if not halves and name in TORCHVISION:
        return _torchvision(name, root, size, channels, download)
    if not halves:
        raise LayerlabError(
            f"Dataset {name!r} is not in {where}: expected train-*.parquet and test-*.parquet there, or a torchvision "
            "layout; set LAYERLAB_DATA to the folder that holds it"
            + (", or pass download=True." if name in TORCHVISION else ".")
        )
    if isinstance(halves["train"], FolderSource):
        class_names = halves["train"].class_names
    side = size or (DATASETS[name].side if name in DATASETS else None) or halves["train"].common_side()
    total = sum(len(source) for source in halves.values()) * channels * side * side
    if budget is None:
        budget = free_memory(device) / 2
    digest = "-".join(source.digest() for source in halves.values())
    result: dict[str, tuple[Tensor | Streamed, Tensor]] = {}
    for half, source in halves.items():
        if total <= budget:
            result[half] = _resident(source, side, channels)
        else:
            result[half] = (Streamed(source, side, channels), source.labels())
    return _Found(result, str(where), digest, class_names, note)


def free_memory(device: torch.device) -> float:
    """Bytes that are free on the device; on the CPU in main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


_UNDECODABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def _decode(data: bytes, where: str, size: int, channels: int) -> np.ndarray:
    """An encoded image → uint8 (size, size[, 3]).

    Raises:
        LayerlabError: the bytes are no image, naming where they lie.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except _UNDECODABLE as error:
        raise LayerlabError(f"The image {where} does not decode ({error}); replace or remove it.") from None
    if image.size != (size, size):
        width, height = image.size
        crop = min(width, height)
        left, top = (width - crop) / 2, (height - crop) / 2
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + crop, top + crop))
    return np.asarray(image)


class Source(ABC):
    """Encoded images by index, in files."""

    def __len__(self) -> int:
        return len(self.labels())

    @abstractmethod
    def labels(self) -> Tensor:
        """int64, (n,)."""

    @abstractmethod
    def read(self, index: int) -> tuple[bytes, str]:
        """The encoded image and a text that says where it lies."""

    @abstractmethod
    def digest(self) -> str:
        """Changes when the content changes."""

    def common_side(self) -> int:
        """The side of the first image, for sources that do not say theirs."""
        data, where = self.read(0)
        try:
            return min(Image.open(io.BytesIO(data)).size)
        except _UNDECODABLE as error:
            raise LayerlabError(f"The image {where} does not decode ({error}); replace or remove it.") from None


class ParquetSource(Source):
    """A half in the Hugging Face parquet layout, memory-mapped."""

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.files = list(files)
        self._tables = []
        for file in self.files:
            try:
                table = pq.read_table(file, columns=["image", "label"], memory_map=True)
                images = table.column("image").combine_chunks()
                content = images.field("bytes")
                labels = table.column("label").to_numpy()
            except (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowTypeError, KeyError, OSError) as error:
                raise LayerlabError(
                    f"{file} is corrupt, truncated or not in the expected layout (columns image {{bytes, path}} and "
                    f"label): {first_line(error)}; fetch it again."
                ) from None
            self._tables.append((content, labels))
        self._starts = np.cumsum([0] + [len(labels) for _, labels in self._tables])
        self._labels = torch.from_numpy(np.concatenate([labels for _, labels in self._tables]).astype(np.int64))

    @classmethod
    def open(cls, folder: Path, half: str) -> ParquetSource:
        files = sorted(folder.glob(f"{half}-*.parquet")) or sorted(folder.glob("validation-*.parquet"))
        if not files:
            raise LayerlabError(f"{folder} has no {half}-*.parquet; add the missing half.")
        return cls(files)

    def labels(self) -> Tensor:
        return self._labels

    def read(self, index: int) -> tuple[bytes, str]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[part])
        data = self._tables[part][0][row].as_py()
        where = f"in row {row} of {self.files[part]}"
        if data is None:
            raise LayerlabError(f"The image {where} is empty; replace or remove it.")
        return data, where

    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest())
        return digest.hexdigest()


class FolderSource(Source):
    """Images in class folders: `<class>/<image>`.

    Args:
        samples: (path, label).
        class_names: in the labels' order.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], class_names: tuple[str, ...]) -> None:
        self.samples = list(samples)
        self.class_names = class_names
        self._labels = torch.tensor([label for _, label in self.samples], dtype=torch.int64)

    def labels(self) -> Tensor:
        return self._labels

    def read(self, index: int) -> tuple[bytes, str]:
        path = self.samples[index][0]
        try:
            return Path(path).read_bytes(), path
        except OSError as error:
            raise LayerlabError(f"The image {path} cannot be read ({error.strerror}); replace or remove it.") from None

    def digest(self) -> str:
        """Names, sizes and times: reading a folder of a hundred gigabytes to know it would cost an hour."""
        digest = hashlib.blake2b(digest_size=16)
        for path, label in self.samples:
            status = os.stat(path)
            digest.update(f"{path}|{label}|{status.st_size}|{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def split(self, every: int) -> tuple[FolderSource, FolderSource]:
        """(the rest, every so-many-th image of each class)."""
        seen = [0] * len(self.class_names)
        parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
        for path, label in self.samples:
            parts[seen[label] % every == 0].append((path, label))
            seen[label] += 1
        return FolderSource(parts[0], self.class_names), FolderSource(parts[1], self.class_names)


def image_folders(folder: Path) -> tuple[dict[str, FolderSource], str]:
    """Both halves of a folder in torchvision's ImageFolder layout, and what a reader should know of them.

    The training half decides which label a class has, also in a test half that lacks some classes, where torchvision's
    own ImageFolder would number the rest anew. Hidden files and folders, Jupyter's checkpoints among them, are no
    images and no classes.

    Raises:
        LayerlabError: no images, a class without any, or a test half with classes of its own; naming the folder.
    """
    top, test = folder / TRAINING[0], next((folder / name for name in TESTING if (folder / name).is_dir()), None)
    if not top.is_dir():
        if test is not None:
            raise LayerlabError(f"{folder} has a folder {test.name} and none called {top.name}; add the missing half.")
        top = folder
    class_names = _class_folders(top)
    train = [(path, label) for label, name in enumerate(class_names) for path in _images(top / name)]
    if not train:
        raise LayerlabError(
            f"{top} has no folders with images; expected a folder a class ({top / 'cat' / '1.jpg'}, say; "
            f"{', '.join(IMAGE_SUFFIXES)}), in {TRAINING[0]}/ and {TESTING[0]}/ or {TESTING[1]}/ or by themselves, or "
            "train-*.parquet and test-*.parquet."
        )
    counts = [0] * len(class_names)
    for _, label in train:
        counts[label] += 1
    least = 1 if test else 2
    if min(counts) < least:
        name = class_names[counts.index(min(counts))]
        some = "no image" if min(counts) == 0 else "one image, which cannot be split into training and testing"
        raise LayerlabError(f"The class folder {top / name} has {some}; give it some ({', '.join(IMAGE_SUFFIXES)}), or "
                            "remove it.")
    source = FolderSource(train, class_names)
    if test is None:
        rest, held_out = source.split(5)
        if top != folder:
            warnings.warn(f"{folder} has no {' or '.join(TESTING)} folder, so every fifth training image of each class "
                          "is held out for testing.", stacklevel=2)
        return {"train": rest, "test": held_out}, "every fifth image of each class is held out for testing"
    if strange := [name for name in _class_folders(test) if name not in class_names]:
        raise LayerlabError(f"{test} has a class folder {strange[0]!r} that {top} has not; make the names the same.")
    samples = [(path, label) for label, name in enumerate(class_names) for path in _images(test / name)]
    if not samples:
        raise LayerlabError(f"{test} has no folders with images ({', '.join(IMAGE_SUFFIXES)}); fill or remove it.")
    return {"train": source, "test": FolderSource(samples, class_names)}, ""


def _class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."))


def _images(folder: Path) -> list[str]:
    """Paths of the images in a folder and those below it."""
    found = []
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [os.path.join(where, name) for name in files
                  if name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(found)


class Streamed:
    """Images that stay in their files and are decoded as they are asked for, ahead of use, by a few threads."""

    def __init__(self, source: Source, side: int, channels: int, rows: Tensor | None = None) -> None:
        self.source = source
        self.side = side
        self.channels = channels
        self.rows = torch.arange(len(source)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, channels, height, width)."""
        return (len(self), self.channels, self.side, self.side)

    def subset(self, rows: Tensor) -> Streamed:
        """Only these images."""
        return Streamed(self.source, self.side, self.channels, self.rows[rows])

    def stream(self, chunks: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each chunk of indices its images, uint8 (len, channels, side, side), in host memory."""
        ahead = 4
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pending = [self._submit(pool, chunk) for chunk in chunks[:ahead]]
            for i in range(len(chunks)):
                images = np.stack([future.result() for future in pending.pop(0)])
                if i + ahead < len(chunks):
                    pending.append(self._submit(pool, chunks[i + ahead]))
                yield _channels_first(images)

    def _submit(self, pool: ThreadPoolExecutor, chunk: Tensor) -> list[Any]:
        return [pool.submit(self._one, row) for row in self.rows[chunk.cpu()].tolist()]

    def _one(self, row: int) -> np.ndarray:
        return _decode(*self.source.read(row), self.side, self.channels)


def _channels_first(images: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(images)
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2).contiguous()


# ---------------------------------------------------------------------------------------------- cache


def cache_folder() -> Path:
    """Where decoded datasets are kept: `$LAYERLAB_CACHE`, else `~/.cache/layerlab`."""
    return Path(os.environ.get("LAYERLAB_CACHE") or Path.home() / ".cache" / "layerlab")


def _resident(source: Source, side: int, channels: int) -> tuple[Tensor, Tensor]:
    """Every image of a source, decoded once and kept in the cache under its content's digest."""

    def decode() -> np.ndarray:
        images = np.empty((len(source), channels, side, side), np.uint8)

        def one(rows: range) -> None:
            for row in rows:
                image = _decode(*source.read(row), side, channels)
                images[row] = image if channels == 1 else image.transpose(2, 0, 1)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for future in [pool.submit(one, range(i, min(i + 256, len(source)))) for i in range(0, len(source), 256)]:
                future.result()
        return images

    images = _cached(f"{source.digest()}-{channels}x{side}x{side}", decode)
    return torch.from_numpy(images), source.labels()


def _cached(key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    file = cache_folder() / f"{key}.npy"
    try:
        return np.load(file)
    except FileNotFoundError:
        pass
    except (ValueError, OSError, EOFError):
        warnings.warn(f"{file} was damaged and is made again.", stacklevel=2)
    array = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".partial", delete=False) as stream:
            np.save(stream, array)
        os.replace(stream.name, file)
    except OSError as error:
        warnings.warn(f"Decoded images are not kept, so the next start decodes again: {error}.", stacklevel=2)
    return array


def _torchvision(
    name: str, root: Path, size: int | None, channels: int, download: bool
) -> _Found:
    """MNIST, Fashion-MNIST or CIFAR-10 as torchvision lays them out under `root`, or fetches them."""
    from torchvision import datasets, transforms

    kind = getattr(datasets, TORCHVISION[name])
    halves: dict[str, tuple[Tensor | Streamed, Tensor]] = {}
    digest = hashlib.blake2b(digest_size=16)
    for half in ("train", "test"):
        try:
            found = kind(str(root), train=half == "train", download=download)
        except (RuntimeError, OSError) as error:
            raise LayerlabError(
                f"Dataset {name!r} is neither in {root / name} as parquet nor in {root} as torchvision lays it out "
                f"({first_line(error)}); set LAYERLAB_DATA to the folder that holds it, or pass download=True."
            ) from None
        images = _channels_first(np.asarray(found.data))
        if size and size != images.shape[-1]:
            images = transforms.functional.resize(images, [size, size], antialias=True)
        if images.shape[1] != channels:
            images = images.expand(-1, 3, -1, -1).contiguous() if channels == 3 else (
                transforms.functional.rgb_to_grayscale(images)
            )
        halves[half] = (images, torch.as_tensor(found.targets).long())
        digest.update(images.numpy().tobytes())
    return _Found(halves, str(root), digest.hexdigest())
