"""Where images come from: encoded images by index, and a stream of them decoded as they are asked for."""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from layerlab.base.errors import LayerlabError
from layerlab.workload.decoding import BadImage, Decoded, decode_image, shorter_side


class Source(ABC):
    """Encoded images by index, in files.

    Attributes:
        class_names: in the labels' order; empty where the files name none.
        notes: what a reader of the dataset's numbers should know of how the files were read.
    """

    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels())

    @abstractmethod
    def labels(self) -> Tensor:
        """int64, (n,)."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Where an image lies, for a message."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            BadImage: there is nothing to read.
        """

    @property
    @abstractmethod
    def digest(self) -> str:
        """Changes when the content changes, and with nothing else: not with the place where it lies."""

    def common_side(self) -> int:
        """The shorter side of the first image that has one, for sources that do not say theirs."""
        for index in range(len(self)):
            with contextlib.suppress(BadImage):
                return shorter_side(self.read(index), self.where(index))
        return 1

    def rows(self, chosen: Tensor) -> Source:
        """Only the images of these indices."""
        return _Rows(self, chosen)


class _Rows(Source):
    """Some of the images of another source."""

    def __init__(self, whole: Source, chosen: Tensor) -> None:
        self.whole = whole
        self._chosen = chosen
        self.class_names = whole.class_names
        self.notes = whole.notes

    def labels(self) -> Tensor:
        return self.whole.labels()[self._chosen]

    def where(self, index: int) -> str:
        return self.whole.where(int(self._chosen[index]))

    def read(self, index: int) -> bytes:
        return self.whole.read(int(self._chosen[index]))

    @property
    def digest(self) -> str:
        chosen = hashlib.blake2b(self._chosen.numpy().tobytes(), digest_size=8).hexdigest()
        return f"{self.whole.digest}-{chosen}"


def held_out(source: Source, every: int, place: str) -> tuple[Source, Source]:
    """(the rest, every so-many-th image of each class, the first of them included).

    Raises:
        LayerlabError: a class of one image, which cannot be in both.
    """
    labels = source.labels()
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        if len(rows) < 2:
            name = source.class_names[int(label)] if source.class_names else str(int(label))
            raise LayerlabError(f"The class {name!r} of {place} has one image, which cannot be split into training and "
                                "testing; give it some, or remove it.")
        chosen[rows[::every]] = True
    return source.rows((~chosen).nonzero()[:, 0]), source.rows(chosen.nonzero()[:, 0])


class Streamed:
    """Images that stay in their files and are decoded as they are asked for, ahead of use, by a few threads.

    Attributes:
        treated: how often something was done to an image so far, by `layerlab.workload.decoding.TREATMENTS`.
    """

    def __init__(self, source: Source, side: int, channels: int, rows: Tensor | None = None) -> None:
        self.source = source
        self.side = side
        self.channels = channels
        self.rows = torch.arange(len(source)) if rows is None else rows
        self.treated: Counter[str] = Counter()

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
        """For each chunk of indices its images, uint8 (len, channels, side, side), in host memory.

        Raises:
            LayerlabError: one that cannot be used, with the command that lists all of them.
        """
        ahead = 4
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pending = [self._submit(pool, chunk) for chunk in chunks[:ahead]]
            for i in range(len(chunks)):
                decoded = [future.result() for future in pending.pop(0)]
                if i + ahead < len(chunks):
                    pending.append(self._submit(pool, chunks[i + ahead]))
                self.treated.update(name for each in decoded for name in each.treated)
                yield channels_first(np.stack([each.pixels for each in decoded]))

    def _submit(self, pool: ThreadPoolExecutor, chunk: Tensor) -> list[Future[Decoded]]:
        return [pool.submit(self._one, row) for row in self.rows[chunk.cpu()].tolist()]

    def _one(self, row: int) -> Decoded:
        try:
            return decode_image(self.source.read(row), self.source.where(row), self.side, self.channels)
        except BadImage as error:
            # Only now: to look at all of them first would decode a large dataset twice.
            raise LayerlabError(f"{str(error).rstrip('.')}. `layerlab data check` lists all that are like it, and "
                                "load_dataset(…, on_bad='skip') leaves them out.") from None


def channels_first(images: np.ndarray) -> Tensor:
    """uint8 (n, height, width[, 3]) → (n, channels, height, width)."""
    tensor = torch.from_numpy(images)
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2).contiguous()
