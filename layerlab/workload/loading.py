"""Named image datasets as uint8 tensors on the device, cropped, flipped and normalised there a batch at a time.

Sources, in this order: a folder of parquet files (`layerlab.workload.parquet`), a folder of class folders
(`layerlab.workload.folders`) or a torchvision layout under `<root>`, a torchvision download (when asked for). The root
is `$LAYERLAB_DATA`. `digits` is scikit-learn's and needs no file.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import PIL
import torch
from pydantic import Field
from torch import Tensor

from layerlab.base.arguments import validated
from layerlab.base.devices import free_memory, resolve_device
from layerlab.base.errors import LayerlabError, first_line, unknown
from layerlab.base.usage import note_data
from layerlab.workload.cache import Kept, keep, load_kept
from layerlab.workload.dataset import Dataset, Split, balanced, channel_statistics
from layerlab.workload.decoding import DECODING, RESIZED, BadImage, bad_images, counted, decode_image, treatment_note
from layerlab.workload.folders import class_folders, image_folders
from layerlab.workload.halves import assigned
from layerlab.workload.parquet import parquet_halves
from layerlab.workload.places import DATASETS, FOLDERS, TORCHVISION, TRAINING, data_folder, half_of, parquet_files
from layerlab.workload.sources import Source, Streamed, channels_first

OnBad = Literal["raise", "skip"]
_Count = Annotated[int, Field(ge=1)]


@validated
def load_dataset(
    name: str | os.PathLike[str],
    *,
    image_size: _Count | None = None,
    channels: Literal[1, 3] | None = None,
    limit: _Count | None = None,
    test_limit: _Count | None = None,
    root: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    download: bool = False,
    memory_budget: float | None = None,
    on_bad: OnBad = "raise",
) -> Dataset:
    """Load a dataset by name, or any folder of images or parquet files.

    Args:
        name: one of `DATASETS`, or the path of a folder: of class folders (`cat/1.jpg`), of halves with class folders
            (`train/cat/1.jpg`, `val/cat/9.jpg`), or of parquet files (`train-*.parquet`, `test-*.parquet`). The halves'
            names are taken in any case and common spelling. With train, val and test, val is the dataset's
            `validation`; without test, val is its test half; with neither, every fifth image of each class is held out
            for testing.
        image_size: pixels of a side; larger images are scaled by their shorter side and centre-cropped, smaller ones
            enlarged. Default: the dataset's own, else the shorter side of the first image.
        channels: 1 or 3. Default: the dataset's own.
        limit, test_limit: keep the first that many images for training, or for testing and for validation, class by
            class in proportion.
        root: where datasets lie. Default: `$LAYERLAB_DATA`.
        device: `auto` takes a GPU if there is one.
        download: let torchvision fetch what is missing.
        memory_budget: bytes that images may take on the device (default: half of what is free); what does not fit is
            streamed from its files.
        on_bad: what to do about images that do not decode: `raise` with a report of all of them, or `skip` them, which
            the dataset's note tells.

    Raises:
        LayerlabError: unknown name, nothing found, a layout that can be read in two ways, a corrupt or truncated file,
            images that do not decode, labels missing or out of range; naming the file.

    Example:
        >>> from layerlab import load_dataset
        >>> data = load_dataset("digits", image_size=16, limit=200, device="cpu")
        >>> data.shape, data.classes, len(data.train)
        ((1, 16, 16), 10, 200)
    """
    # Long because its docstring names every argument and error, with an example.
    place = resolve_device(device)
    name = os.fspath(name)
    path = Path(name).expanduser()
    known = DATASETS.get(name)
    if known is None and not path.is_dir():
        remedy = f"Or pass the path of a folder that exists; {path.absolute()} does not."
        raise unknown("dataset", name, DATASETS, remedy)
    depth = channels or (known.channels if known else 3)
    if name == "digits":
        found = _Found(_digits(image_size or 8, depth), "scikit-learn", "sklearn-digits")
    else:
        reading = _Reading(image_size, depth, place, memory_budget, on_bad)
        found = _files(name, path if known is None else None, data_folder(root), reading, download)
    halves, source = found.halves, found.source
    classes = known.classes if known else len(found.class_names) or int(halves["train"][1].max()) + 1
    for half, (_, labels) in halves.items():
        _check_labels(labels, classes, f"Dataset {name!r}", half, source)
    for half in halves:
        images, labels = halves[half]
        most = limit if half == TRAINING else test_limit
        if most is not None and most < len(labels):
            keep_rows = balanced(labels, most)
            kept = images.subset(keep_rows) if isinstance(images, Streamed) else images[keep_rows]
            halves[half] = (kept, labels[keep_rows])
    mean, std = channel_statistics(halves["train"][0])
    splits = {half: _split(images, labels, place, mean, std) for half, (images, labels) in halves.items()}
    key = f"{found.digest}|{image_size}|{depth}|{limit}|{test_limit}"
    fingerprint = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    note_data(source, fingerprint)
    note = "; ".join(part for part in (found.note, _sampled(halves["train"][0])) if part)
    return Dataset(name, splits["train"], splits["test"], classes, fingerprint, source, found.class_names, note,
                   splits.get("validation"))


def _sampled(images: Tensor | Streamed) -> str:
    """What had to be done to those streamed images that were looked at for their mean."""
    note = treatment_note(images.treated) if isinstance(images, Streamed) else ""
    return f"of the images sampled: {note}" if note else ""


def _split(
    images: Tensor | Streamed, labels: Tensor, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]
) -> Split:
    """A half on the device; streamed images stay where they are."""
    kept = images if isinstance(images, Streamed) else images.to(device)
    return Split(kept, labels.to(device), mean, std)


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


class _Reading(NamedTuple):
    """How images are read: see `load_dataset`."""

    size: int | None
    channels: int
    device: torch.device
    budget: float | None
    on_bad: OnBad


def _files(name: str, folder: Path | None, root: Path, reading: _Reading, download: bool) -> _Found:
    """All halves of a dataset that lies in files."""
    where = folder or root / name
    halves: Mapping[str, Source] = {}
    notes: list[str] = []
    if folder is not None:
        halves, notes = folder_sources(folder)
    elif files := parquet_files(where):
        parts, aside = parquet_halves(where, files, known=True)
        if not {"test", "validation"} & parts.keys():
            raise LayerlabError(f"{where} has no test-*.parquet; add the missing half.")
        halves, notes = assigned(parts, str(where), aside)
    elif name in FOLDERS:
        for candidate in (root / sub for sub in FOLDERS[name]):
            if (candidate / "train").is_dir():
                where = candidate
                halves, notes = image_folders(candidate)
                if not {half_of(name) for name in class_folders(candidate)} & {"test", "validation"}:
                    raise LayerlabError(f"{candidate} has no val or test folder; add the missing half.")
                break
    if not halves and name in TORCHVISION:
        return _torchvision(name, root, reading.size, reading.channels, download)
    if not halves:
        raise LayerlabError(
            f"Dataset {name!r} is not in {where}: expected train-*.parquet and test-*.parquet there, or a torchvision "
            "layout; set LAYERLAB_DATA to the folder that holds it"
            + (", or pass download=True." if name in TORCHVISION else ".")
        )
    return _read(name, halves, str(where), notes, reading)


def folder_sources(folder: Path) -> tuple[dict[str, Source], list[str]]:
    """The halves of a folder of anybody's parquet files or images, and notes on how it was understood.

    Raises:
        LayerlabError: as `parquet_halves` and `image_folders`.
    """
    files = parquet_files(folder)
    if not files:
        return image_folders(folder)
    parts, aside = parquet_halves(folder, files, known=False)
    return assigned(parts, str(folder), aside)


def _read(name: str, halves: Mapping[str, Source], where: str, notes: list[str], reading: _Reading) -> _Found:
    """The images and labels of all halves: decoded, or streamed where they do not fit.

    Raises:
        LayerlabError: images that do not decode, all of them in one report.
    """
    own = DATASETS[name].side if name in DATASETS else None
    for half, source in halves.items():
        if len(source) == 0:
            raise LayerlabError(f"Dataset {name!r} has no {half} images in {where}; give it at least one.")
    side = reading.size or own or halves["train"].common_side()
    budget = free_memory(reading.device) / 2 if reading.budget is None else reading.budget
    fits = sum(len(source) for source in halves.values()) * reading.channels * side * side <= budget
    result: dict[str, tuple[Tensor | Streamed, Tensor]] = {}
    bad: list[BadImage] = []
    treated: Counter[str] = Counter()
    for half, source in halves.items():
        labels = source.labels()
        images: Tensor | Streamed = Streamed(source, side, reading.channels)
        if fits or reading.on_bad == "skip":
            # Which streamed images do not decode is known when all were decoded once.
            kept = _decoded(source, side, reading, pixels=fits)
            bad += [BadImage(source.where(row), *reasons) for row, reasons in kept.bad.items()]
            treated.update(kept.treated)
            good = torch.tensor([row for row in range(len(source)) if row not in kept.bad], dtype=torch.int64)
            labels = labels[good]
            images = torch.from_numpy(kept.images) if fits else Streamed(source, side, reading.channels, good)
        result[half] = (images, labels)
    digest = "-".join(source.digest for source in halves.values())
    if bad:
        if reading.on_bad == "raise":
            raise bad_images(bad, sum(map(len, halves.values())))
        _check_classes(halves["train"], result["train"][1], where)
        notes = [*notes, f"{counted(len(bad))} that cannot be used left out"]
        digest += f"-without {len(bad)}"
    train = halves["train"]
    if treated[RESIZED] and not (reading.size or own):
        notes = [*notes, f"{counted(treated[RESIZED])} scaled to {side} pixels, the shorter side of the first one; "
                         "image_size sets it"]
    said = [*train.notes, *notes, treatment_note(treated if fits else {})]
    return _Found(result, where, digest, train.class_names, "; ".join(part for part in said if part))


def _check_classes(source: Source, left: Tensor, where: str) -> None:
    """Raises LayerlabError where all training images of a class cannot be used; `left` are the labels of the rest."""
    for label in source.labels().unique().tolist():
        if not (left == label).any():
            name = source.class_names[label] if source.class_names else str(label)
            raise LayerlabError(f"In {where} the class {name!r} has no training image that can be used; mend or remove "
                                "it.")


def _decoded(source: Source, side: int, reading: _Reading, pixels: bool) -> Kept:
    """Every image of a source, decoded once and kept in the cache under its content's digest.

    Args:
        source, side, reading: of the images.
        pixels: keep the images; else only what is known of them.
    """
    channels = reading.channels
    shape = (channels, side, side) if pixels else ()
    # Another release of Pillow may decode what this one does not.
    key = f"{source.digest}-{'x'.join(map(str, shape)) or 'looked-at'}-{DECODING}-pillow-{PIL.__version__}"
    if (known := load_kept(key, len(source), shape)) is not None:
        return known
    images = np.zeros((len(source), *shape), np.uint8)
    bad: dict[int, tuple[str, str]] = {}
    treated: Counter[str] = Counter()

    def some(rows: range) -> tuple[dict[int, tuple[str, str]], Counter[str]]:
        wrong, done = {}, Counter[str]()
        for row in rows:
            try:
                image = decode_image(source.read(row), source.where(row), side, channels)
            except BadImage as error:
                wrong[row] = (error.why, error.what)
                continue
            done.update(image.treated)
            if pixels:
                images[row] = image.pixels if channels == 1 else image.pixels.transpose(2, 0, 1)
        return wrong, done

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for wrong, done in pool.map(some, [range(i, min(i + 256, len(source))) for i in range(0, len(source), 256)]):
            bad.update(wrong)
            treated.update(done)
    if bad:
        images = np.delete(images, list(bad), axis=0)
    kept = Kept(images, bad, dict(treated))
    if not bad or reading.on_bad == "skip":
        keep(key, kept)
    return kept


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
