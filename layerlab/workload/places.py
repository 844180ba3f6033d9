"""Where the known datasets lie, and which file is of which half; without torch, for whoever only looks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from layerlab.base.errors import LayerlabError

TRAINING, VALIDATION, TESTING = "train", "validation", "test"
HALVES = (TRAINING, VALIDATION, TESTING)
_NAMES = {
    TRAINING: ("train", "training", "trn"),
    VALIDATION: ("val", "valid", "validation", "validate", "dev", "devel", "development", "eval", "evaluation"),
    TESTING: ("test", "testing", "tst"),
}
_HALF = {name: half for half, names in _NAMES.items() for name in names}
# What people write before or behind such a name.
_FILLING = ("datasets", "dataset", "pictures", "images", "photos", "subset", "folder", "files", "image",
            "split", "shard", "data", "imgs", "part", "img", "set")
# A file in a half's own folder (train/0000.parquet) is one of its parts.
_PART = re.compile(r"^(part|data|shard|chunk|batch)?[-_.]?\d")


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
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}


def data_folder(root: str | os.PathLike[str] | None = None) -> Path:
    """Where datasets lie: `root`, else `$LAYERLAB_DATA`, else a folder of the user's cache."""
    return Path(root or os.environ.get("LAYERLAB_DATA") or Path.home() / ".cache/layerlab/data")


def half_of(name: str) -> str | None:
    """The half that a folder or file is by its name, in any case and common spelling; None where it is none.

    Example:
        >>> [half_of(name) for name in ("Train", "test_set", "VALID", "dev-images", "trainset", "cat")]
        ['train', 'test', 'validation', 'validation', 'train', None]
    """
    words = [word for word in re.findall(r"[^\W\d_]+", name.lower()) if word not in _FILLING]
    if len(words) != 1:
        return None
    word = words[0]
    for filling in _FILLING:
        word = word.removesuffix(filling).removeprefix(filling)
    return _HALF.get(words[0]) or _HALF.get(word)


def parquet_files(folder: Path) -> dict[str, list[Path]]:
    """Half → its files in a folder or one or two folders below it; empty where no file is one of a half.

    A file is of the half that its name begins with (`train-00000-of-00001.parquet`, `valid.parquet`), or a part in a
    folder of that name (`train/0000.parquet`).

    Raises:
        LayerlabError: the files of one half lie in two folders, as those of two datasets do.
    """
    found: dict[str, list[Path]] = {}
    for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet"):
        for file in sorted(folder.glob(pattern)):
            places = file.relative_to(folder).parts[:-1]
            half = half_of(re.split(r"\d", file.stem)[0])
            if half is None and places and _PART.match(file.stem):
                half = half_of(places[-1])
            if half is not None and not any(part.startswith(".") for part in (*places, file.name)):
                found.setdefault(half, []).append(file)
    for half, files in found.items():
        several = sorted({str(file.parent) for file in files})
        if len(several) > 1:
            raise LayerlabError(f"{folder} has {half} files in {several[0]} and in {several[1]}; name one of the two "
                                "folders.")
    return {half: found[half] for half in HALVES if half in found}


def available(name: str, root: str | os.PathLike[str] | None = None) -> str:
    """Where a known dataset would be read from, or an empty string; looks for its files without reading them."""
    if name == "digits":
        return "embedded (scikit-learn)"
    folder = data_folder(root)
    if TRAINING in parquet_files(folder / name):
        return str(folder / name)
    for candidate in (folder / sub for sub in FOLDERS.get(name, ())):
        if (candidate / "train").is_dir():
            return str(candidate)
    laid_out = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "cifar-10-batches-py"}.get(name)
    return str(folder / laid_out) if laid_out and (folder / laid_out).is_dir() else ""
