"""Named image datasets as uint8 tensors on the device, cropped, flipped and normalised there a batch at a time.

Sources, in this order: a Hugging Face parquet folder (`<root>/<name>/{train,test}-*.parquet` with the columns
`image: {bytes, path}` and `label`), a torchvision layout under `<root>`, a torchvision download (when asked for). The
root is `$LAYERLAB_DATA`. `digits` is scikit-learn's and needs no file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerlab.base.devices import free_memory, resolve_device
from layerlab.base.errors import LayerlabError, first_line, unknown
from layerlab.base.usage import note_data
from layerlab.workload.dataset import Dataset, Shape, Split, balanced, channel_statistics
from layerlab.workload.sources import (
    TESTING,
    FolderSource,
    ParquetSource,
    Streamed,
    channels_first,
    decode_image,
    image_folders,
)

if TYPE_CHECKING:
    from layerlab.workload.sources import Source

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
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}


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

    Example:
        >>> from layerlab import load_dataset
        >>> data = load_dataset("digits", image_size=16, limit=200, device="cpu")
        >>> data.shape, data.classes, len(data.train)
        ((1, 16, 16), 10, 200)
    """
    # Long because its docstring names every argument and error, with an example.
    place = resolve_device(device)
    path = Path(name).expanduser()
    known = DATASETS.get(name)
    if known is None and not path.is_dir():
        remedy = f"Or pass the path of a folder that exists; {path.absolute()} does not."
        raise unknown("dataset", name, DATASETS, remedy)
    _check_sizes(channels, image_size=image_size, limit=limit, test_limit=test_limit)
    channels = channels or (known.channels if known else 3)
    if name == "digits":
        found = _Found(_digits(image_size or 8, channels), "scikit-learn", "sklearn-digits")
    else:
        found = _files(name, path if known is None else None, _root(root), image_size, channels, download, place,
                       memory_budget)
    halves, source = found.halves, found.source
    classes = known.classes if known else len(found.class_names) or int(halves["train"][1].max()) + 1
    for half, (_, labels) in halves.items():
        _check_labels(labels, classes, f"Dataset {name!r}", half, source)
    for half, most in (("train", limit), ("test", test_limit)):
        images, labels = halves[half]
        if most is not None and most < len(labels):
            keep = balanced(labels, most)
            halves[half] = (images.subset(keep) if isinstance(images, Streamed) else images[keep], labels[keep])
    mean, std = channel_statistics(halves["train"][0])
    splits = {half: _split(images, labels, place, mean, std) for half, (images, labels) in halves.items()}
    reading = f"{found.digest}|{image_size}|{channels}|{limit}|{test_limit}"
    fingerprint = hashlib.blake2b(reading.encode(), digest_size=8).hexdigest()
    note_data(source, fingerprint)
    return Dataset(name, splits["train"], splits["test"], classes, fingerprint, source, found.class_names, found.note)


def _split(
    images: Tensor | Streamed, labels: Tensor, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]
) -> Split:
    """A half on the device; streamed images stay where they are."""
    kept = images if isinstance(images, Streamed) else images.to(device)
    return Split(kept, labels.to(device), mean, std)


def _check_sizes(channels: int | None, **sizes: int | None) -> None:
    """Raises LayerlabError for a size below one, or a number of channels that no image has."""
    for label, value in sizes.items():
        if value is not None and value < 1:
            raise LayerlabError(f"{label} must be at least 1, got {value}.")
    if channels not in (None, 1, 3):
        raise LayerlabError(f"channels must be 1 or 3, got {channels}.")


def _check_labels(labels: Tensor, classes: int, dataset: str, half: str, source: str) -> None:
    """Raises LayerlabError for a half without images, or with labels that are none of the classes."""
    if len(labels) == 0:
        raise LayerlabError(f"{dataset} has no {half} images in {source}; give it at least one.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise LayerlabError(
            f"{dataset} in {source} has {half} labels from {low} to {high}, out of range for its {classes} classes "
            f"(0 to {classes - 1}); correct the labels."
        )


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


def cache_folder() -> Path:
    """Where decoded datasets are kept: `$LAYERLAB_CACHE`, else `~/.cache/layerlab`."""
    return Path(os.environ.get("LAYERLAB_CACHE") or Path.home() / ".cache" / "layerlab")


def _resident(source: Source, side: int, channels: int) -> tuple[Tensor, Tensor]:
    """Every image of a source, decoded once and kept in the cache under its content's digest."""

    def decode() -> np.ndarray:
        images = np.empty((len(source), channels, side, side), np.uint8)

        def one(rows: range) -> None:
            for row in rows:
                image = decode_image(*source.read(row), side, channels)
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
        images = channels_first(np.asarray(found.data))
        if size and size != images.shape[-1]:
            images = transforms.functional.resize(images, [size, size], antialias=True)
        if images.shape[1] != channels:
            images = images.expand(-1, 3, -1, -1).contiguous() if channels == 3 else (
                transforms.functional.rgb_to_grayscale(images)
            )
        halves[half] = (images, torch.as_tensor(found.targets).long())
        digest.update(images.numpy().tobytes())
    return _Found(halves, str(root), digest.hexdigest())
