"""Where images come from: parquet files and folders."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from layerlab.base.errors import LayerlabError, first_line

# The names that the halves of a folder of class folders go by.
TRAINING, TESTING = ("train",), ("val", "test", "validation")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_UNDECODABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def decode_image(data: bytes, where: str, size: int, channels: int) -> np.ndarray:
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
    class_names = class_folders(top)
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
    if strange := [name for name in class_folders(test) if name not in class_names]:
        raise LayerlabError(f"{test} has a class folder {strange[0]!r} that {top} has not; make the names the same.")
    samples = [(path, label) for label, name in enumerate(class_names) for path in _images(test / name)]
    if not samples:
        raise LayerlabError(f"{test} has no folders with images ({', '.join(IMAGE_SUFFIXES)}); fill or remove it.")
    return {"train": source, "test": FolderSource(samples, class_names)}, ""


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the folders in a folder, sorted, without hidden ones: the classes."""
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
                yield channels_first(images)

    def _submit(self, pool: ThreadPoolExecutor, chunk: Tensor) -> list[Any]:
        return [pool.submit(self._one, row) for row in self.rows[chunk.cpu()].tolist()]

    def _one(self, row: int) -> np.ndarray:
        return decode_image(*self.source.read(row), self.side, self.channels)


def channels_first(images: np.ndarray) -> Tensor:
    """uint8 (n, height, width[, 3]) → (n, channels, height, width)."""
    tensor = torch.from_numpy(images)
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2).contiguous()
