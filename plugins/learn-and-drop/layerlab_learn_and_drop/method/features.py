"""Stored feature maps: what the dropped layers give for every training image, from which the tail reads its batches."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerlab import Batches, LayerlabError, files, pass_order
from layerlab_learn_and_drop.method.cutting import features_of, mode

Storage = Literal["compute", "bfloat16", "int8"]
ALIGNMENT = 64  # bytes; any tensor type may start there


@dataclass(frozen=True)
class Part:
    """One tensor of the store: a row an image.

    Attributes:
        shape: of a row.
        dtype: as stored, torch's name.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Of one image."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


class NoRoom(Exception):
    """Neither the memory budget nor the file takes the features."""


def encode(value: Tensor, storage: Storage) -> list[Tensor]:
    """A tensor as it is stored; integers and booleans as they are.

    8 bits are an affine code of each image's own range: x ≈ low + q · (high − low) / 255, q = 0 … 255, with the two
    float32 numbers low and step beside it. After a ReLU, zeros stay zeros.

    Args:
        value: (images, …).
        storage: the code.

    Returns:
        One tensor, or for 8 bits three: q, low and step.
    """
    if storage == "compute" or not value.is_floating_point():
        return [value]
    if storage == "bfloat16":
        return [value.to(torch.bfloat16)]
    flat = value.float().flatten(1)
    low, high = flat.aminmax(dim=1, keepdim=True)
    step = (high - low) / 255
    codes = ((flat - low) / step.where(step > 0, torch.ones_like(step))).round_().to(torch.uint8)
    return [codes.view(value.shape), low, step]


def decode(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """`encode` undone, in the type that the tensor had."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    codes, low, step = parts
    shape = (len(codes), *[1] * (codes.dim() - 1))
    return codes.to(torch.float32).mul_(step.view(shape)).add_(low.view(shape)).to(dtype)


class Features:
    """The stored features of a training set, as `fit` reads batches: `layerlab.Batches`.

    Args:
        parts: what is stored of a row, the int64 label last.
        kinds: for each tensor that crosses the cut how many of `parts` hold it, and the type that it has.
        rows: images stored in one pass.
        passes: how many times the images are stored, each with other augmentation.
        device: where batches go.
        budget: bytes that may lie on the device.
        file: what is mapped into memory when the budget does not do.
        reuse: the file is there with its content.

    Attributes:
        nbytes: of the whole store.
        file: where it lies; None on the device.
        current: the pass that `batches` reads.
        reused: whether an earlier process made the content.

    Raises:
        NoRoom: the file cannot be made as large.
    """

    def __init__(
        self, parts: list[Part], kinds: list[tuple[int, torch.dtype]], rows: int, passes: int, device: torch.device,
        budget: float, file: Path, reuse: bool = False,
    ) -> None:
        self.parts, self.kinds, self.rows, self.passes, self.device = parts, kinds, rows, passes, device
        self.current, self.reused = 0, reuse
        self.nbytes, starts = _layout(parts, rows * passes)
        self.file = file if self.nbytes > budget else None
        if self.file is None:
            self._buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        else:
            if not reuse:
                _allocate(self.file, self.nbytes)
            self._buffer = torch.from_file(str(self.file), shared=True, size=self.nbytes, dtype=torch.uint8)
        self._columns = [
            self._buffer[start : start + rows * passes * part.row_bytes]
            .view(getattr(torch, part.dtype)).view(rows * passes, *part.shape)
            for part, start in zip(parts, starts, strict=True)
        ]

    @property
    def resident_bytes(self) -> int:
        """What of it lies in memory rather than in a file."""
        return self.nbytes if self.file is None else 0

    def __len__(self) -> int:
        return self.rows

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """Of what is stored of an image, tensor by tensor."""
        return tuple(part.shape for part in self.parts)

    def write(self, start: int, values: list[Tensor]) -> None:
        """Put rows from `start` on, a tensor for each part."""
        for column, value in zip(self._columns, values, strict=True):
            column[start : start + len(value)].copy_(value)

    def batches(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Iterator[tuple[Tensor | tuple[Tensor, ...], Tensor]]:
        """The current pass, as `layerlab.Split.batches`: shuffled without the uneven rest, or in order.

        The tensors have the types that the prefix gave them, whatever `dtype` says of images.
        """
        order, count = pass_order(self.rows, batch_size, generator)
        order = (order + self.rows * self.current).to(self._buffer.device)
        for i in range(count):
            index = order[i * batch_size : (i + 1) * batch_size]
            rows = [column[index].to(self.device, non_blocking=True) for column in self._columns]
            labels = rows.pop()
            values = []
            for held, kind in self.kinds:
                value = decode(rows[:held], kind)
                del rows[:held]
                values.append(value.contiguous(memory_format=memory_format) if value.dim() == 4 else value)
            yield (values[0] if len(values) == 1 else tuple(values)), labels

    def checksum(self) -> str:
        """A digest of all bytes."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, self.nbytes, 1 << 24):
            digest.update(self._buffer[start : start + (1 << 24)].cpu().numpy().data)
        return digest.hexdigest()

    def close(self) -> None:
        """Give the memory and the file's room back."""
        self._columns, self._buffer = [], torch.empty(0, dtype=torch.uint8)
        if self.file is not None:
            self.file.unlink(missing_ok=True)
            _note(self.file).unlink(missing_ok=True)


def _layout(parts: list[Part], rows: int) -> tuple[int, list[int]]:
    """Bytes in all, and where each part starts."""
    starts, total = [], 0
    for part in parts:
        starts.append(total)
        total += -(-rows * part.row_bytes // ALIGNMENT) * ALIGNMENT
    return total, starts


def _allocate(file: Path, size: int) -> None:
    """Make a file with room for all its bytes: a mapping of a sparse one kills the process when the disk is full."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise NoRoom(f"{size / 1e6:,.1f} MB of feature maps do not fit into {file.parent} ({error.strerror})") from None


def _note(file: Path) -> Path:
    return file.with_suffix(".json")


@dataclass(frozen=True)
class Making:
    """How features are made.

    Attributes:
        prefix: images → the tensors that cross the cut.
        source: the images.
        storage: the code.
        passes: stored times; 0: the plain images once, without augmentation.
        seed: of the augmentation.
        batch_size: images a step of training, and a step of making.
        autocast: as in training.
        memory_format: of the images.
    """

    prefix: nn.Module
    source: Batches
    storage: Storage
    passes: int
    seed: int
    batch_size: int
    autocast: Callable[[], Any]
    memory_format: torch.memory_format

    def evaluate(self, x: Tensor) -> tuple[Tensor, ...]:
        """What crosses the cut for a batch of images, in inference mode."""
        with torch.no_grad(), mode(self.prefix, training=False), self.autocast():
            return features_of(self.prefix(x))

    def encoded(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], list[tuple[int, torch.dtype]]]:
        """A batch as it is stored, and for each tensor how many of them hold it and its type."""
        values = self.evaluate(x)
        coded = [encode(value, self.storage) for value in values]
        kinds = [(len(codes), value.dtype) for codes, value in zip(coded, values, strict=True)]
        return [*(part for codes in coded for part in codes), y], kinds

    def images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every batch of every pass."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(max(1, self.passes)):
            # No other strategy puts batches of several tensors beside this one.
            yield from self.source.batches(
                self.batch_size, generator if self.passes else None, torch.float32, self.memory_format)

    @property
    def rows(self) -> int:
        """Images a pass: an augmented one leaves the uneven rest out, as an epoch of training does."""
        return len(self.source) // self.batch_size * self.batch_size if self.passes else len(self.source)

    @cached_property
    def parts(self) -> tuple[list[Part], list[tuple[int, torch.dtype]]]:
        """The store's tensors, from a first batch."""
        values, kinds = self.encoded(*next(self.images()))
        return [Part(tuple(value.shape[1:]), str(value.dtype).removeprefix("torch.")) for value in values], kinds

    @property
    def size(self) -> int:
        """Bytes that the features take."""
        return _layout(self.parts[0], self.rows * max(1, self.passes))[0]

    def make(self, device: torch.device, budget: float, file: Path, limit: int | None = None) -> Features:
        """Evaluate the prefix over the training set.

        Args:
            device: where batches go.
            budget: bytes that may lie on the device; what is larger goes into the file.
            file: where.
            limit: stop after so many batches of one pass: for measuring.

        Raises:
            NoRoom: not there either.
        """
        parts, kinds = self.parts
        rows = self.rows if limit is None else min(self.rows, limit * self.batch_size)
        features = Features(parts, kinds, rows, max(1, self.passes) if limit is None else 1, device, budget, file)
        start = 0
        for x, y in self.images():
            if start + len(y) > rows * features.passes:
                break
            features.write(start, self.encoded(x, y)[0])
            start += len(y)
        return features

    def make_or_take(self, device: torch.device, budget: float, file: Path, key: str) -> Features:
        """As `make`, but take over a file that an interrupted fit left, if it is the same and undamaged.

        Args:
            key: a digest of everything that decides what the features are.

        Raises:
            NoRoom: see `make`.
        """
        if self.size > budget and file.exists():
            kept = self._take(device, file, key)
            if kept is not None:
                return kept
            warnings.warn(f"The feature maps in {file} are not those of this fit, or damaged; they are made again.",
                          stacklevel=2)
        features = self.make(device, budget, file)
        if features.file is not None:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            with suppress(LayerlabError):  # without it the file is made again after an interruption
                files.write_json(_note(file), {"key": key, "checksum": features.checksum()})
        return features

    def _take(self, device: torch.device, file: Path, key: str) -> Features | None:
        try:
            note = json.loads(_note(file).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(note, dict) or note.get("key") != key or file.stat().st_size != self.size:
            return None
        kept = Features(*self.parts, self.rows, max(1, self.passes), device, 0, file, reuse=True)
        return kept if kept.checksum() == note.get("checksum") else None
