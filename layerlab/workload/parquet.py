"""Images in parquet files, as the hubs lay them out: which file is which half, which columns, which labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from layerlab.base.errors import LayerlabError, first_line
from layerlab.workload.cache import content_digests
from layerlab.workload.decoding import BadImage
from layerlab.workload.places import TRAINING
from layerlab.workload.sources import Source

if TYPE_CHECKING:
    import pyarrow as pa

# The columns' names on the common hubs, the likeliest first.
IMAGES = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "labels", "fine_label", "cls", "class", "classes", "target", "targets", "y", "category")
# What the hubs use where a label is held back.
_NO_LABEL = -1


class ParquetSource(Source):
    """A half in parquet files, its labels numbered.

    Args:
        part: the files as they were read.
        labels: int64, (n,).
        class_names: in the labels' order.
        notes: on how the labels were read.
    """

    def __init__(
        self, part: _Part, labels: Tensor, class_names: tuple[str, ...] = (), notes: tuple[str, ...] = ()
    ) -> None:
        self.files = part.files
        self.class_names = class_names
        self.notes = notes
        self._images = part.images
        self._starts = np.cumsum([0] + [len(images) for images in part.images])
        self._labels = labels

    def labels(self) -> Tensor:
        return self._labels

    def _place(self, index: int) -> tuple[int, int]:
        """(number of the file, row in it)."""
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return file, index - int(self._starts[file])

    def where(self, index: int) -> str:
        file, row = self._place(index)
        return f"in row {row} of {self.files[file]}"

    def read(self, index: int) -> bytes:
        file, row = self._place(index)
        data = self._images[file][row].as_py()
        if data is None:
            raise BadImage(self.where(index), "it is empty", "cannot be read")
        return data

    @cached_property
    def digest(self) -> str:
        return hashlib.blake2b(b"".join(content_digests(self.files)), digest_size=16).hexdigest()


def parquet_halves(
    folder: Path, files: Mapping[str, Sequence[Path]], known: bool
) -> tuple[dict[str, Source], str]:
    """The halves in parquet files, and why a half among them cannot be used.

    Labels may be whole numbers, true and false, or texts; texts are numbered in their order, and so are numbers that
    leave some out, by what the training images have.

    Args:
        folder: of the dataset, for a message.
        files: half → its files.
        known: a dataset whose classes are known, so that its labels are taken as they are.

    Raises:
        LayerlabError: no training half; a file that is damaged or of another layout; labels that are missing,
            negative, fractions or lists; a test label that no training image has.
    """
    parts = {half: _Part(own) for half, own in files.items()}
    aside = ""
    for half in [half for half in parts if half != TRAINING and parts[half].unlabelled]:
        aside = f"the {half} half has no labels"
        del parts[half]
    if TRAINING not in parts:
        raise LayerlabError(f"{folder} has no train-*.parquet; add the missing half.")
    for part in parts.values():
        part.check_labels(known)
    train = parts[TRAINING]
    notes = train.notes
    numbers: dict[Any, int] | None = None
    names = train.class_names
    if train.texts:
        names = tuple(sorted(set(train.labels)))
        numbers = {name: number for number, name in enumerate(names)}
    elif not names and not known:
        values = sorted(set(train.labels))
        if values != list(range(len(values))):
            numbers = {value: number for number, value in enumerate(values)}
            names = tuple(map(str, values))
            notes += (f"the labels {values[0]} to {values[-1]} are numbered 0 to {len(values) - 1}",)
    sources = {half: ParquetSource(part, _numbered(part, train, numbers), names, notes) for half, part in parts.items()}
    return dict(sources), aside


def _numbered(part: _Part, train: _Part, numbers: Mapping[Any, int] | None) -> Tensor:
    """A half's labels, int64, (n,), numbered as the training half's are."""
    if part.texts != train.texts or (part.class_names != train.class_names and not part.texts):
        raise LayerlabError(f"{part.files[0]} and {train.files[0]} name their classes differently; write both from one "
                            "table.")
    if numbers is None:
        return torch.tensor(part.labels, dtype=torch.int64)
    strange = next((label for label in part.labels if label not in numbers), None)
    if strange is not None:
        raise LayerlabError(f"{part.files[0]} has the class {strange!r} that no image of {train.files[0]} has; make "
                            "the labels the same.")
    return torch.tensor([numbers[label] for label in part.labels], dtype=torch.int64)


class _Part:
    """The files of one half as they are: encoded images, and labels that nobody has numbered yet.

    Attributes:
        labels: of all rows: int or str, None where there is none.
        texts: they are texts.
        class_names: of the files' own metadata; empty where they have none or the labels are texts.
        notes: which columns were taken, where there was a choice.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        self.files = list(files)
        self.images: list[pa.ChunkedArray] = []
        self.labels: list[Any] = []
        self.texts = False
        self.class_names: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        for file in self.files:
            try:
                schema = pq.read_schema(file)
                image, label = _columns(schema, file)
                table = pq.read_table(file, columns=[image, label], memory_map=True)
                images = table.column(image)
                if pa.types.is_struct(images.type):
                    images = pc.struct_field(images, "bytes")
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                raise LayerlabError(f"{file} is corrupt, truncated or no parquet file ({_damage(file, error)}); fetch "
                                    "it again.") from None
            self.images.append(images)
            labels, self.texts = _plain(table.column(label), file)
            self.labels += labels
            self.class_names = () if self.texts else _class_names(schema, label)
            if label not in LABELS[:2]:
                self.notes = (f"labels from the column {label}",)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def unlabelled(self) -> bool:
        """Whether every label is held back."""
        return bool(self.labels) and all(label in (None, _NO_LABEL) for label in self.labels)

    def check_labels(self, known: bool) -> None:
        """Raises LayerlabError for rows without a label.

        Negative ones of a dataset whose classes are `known` are left to the check of its range.
        """
        if self.texts:
            rows = [row for row, label in enumerate(self.labels) if label is None]
        else:
            least = -(2**62) if known else 0
            rows = [row for row, label in enumerate(self.labels) if label is None or not least <= label < 2**62]
        if rows:
            value = self.labels[rows[0]]
            raise LayerlabError(
                f"{self.files[0]} has {len(rows):,} of {len(self):,} labels missing, negative or beyond 62 bits (row "
                f"{rows[0]}: {'null' if value is None else value}); correct or remove those rows."
            )


def _columns(schema: pa.Schema, file: Path) -> tuple[str, str]:
    """(column of the images, column of the labels): as the file's metadata say, else by their names.

    Raises:
        LayerlabError: none of that kind.
    """
    import pyarrow as pa

    def holds_images(name: str) -> bool:
        kind = schema.field(name).type
        if pa.types.is_struct(kind):
            field = kind.field("bytes") if kind.get_field_index("bytes") >= 0 else None
            return field is not None and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    kinds = {name: _features(schema).get(name, {}).get("_type", "") for name in schema.names}
    able = [name for name in schema.names if holds_images(name)]
    images = _first(able, IMAGES, [name for name in able if kinds[name] == "Image"]) or (able[0] if able else "")
    rest = [name for name in schema.names if name != images]
    label = _first(rest, LABELS, [name for name in rest if kinds[name] == "ClassLabel"])
    if not images or not label:
        missing = (f"images ({', '.join(IMAGES[:3])}; bytes, or a struct with a field bytes)" if not images
                   else f"labels ({', '.join(LABELS)})")
        raise LayerlabError(
            f"{file} is not in the expected layout: its columns are {', '.join(schema.names[:10])}, and none holds "
            f"{missing}; rename or add one."
        )
    return images, label


def _first(names: Sequence[str], likely: Sequence[str], marked: Sequence[str]) -> str:
    """The likeliest of the marked columns, else the likeliest of all; empty where there is none."""
    for group in (marked, names):
        by_name = {name.lower(): name for name in reversed(group)}
        for name in likely:
            if name in by_name:
                return by_name[name]
        if group is marked and marked:
            return marked[0]
    return ""


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What a file of the Hugging Face hub says of its columns; empty where it says nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: each for name, each in features.items() if isinstance(each, dict)} if isinstance(
        features, dict
    ) else {}


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    names = _features(schema).get(label, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _plain(column: pa.ChunkedArray, file: Path) -> tuple[list[Any], bool]:
    """A column of labels as int or str, None where there is none, and whether they are texts.

    Raises:
        LayerlabError: fractions, lists, or anything else that is no class.
    """
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    values = column.to_pylist()
    if pa.types.is_null(kind):
        return values, False
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return values, True
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind):
        for row, value in enumerate(values):
            if value is not None and value != (int(value) if np.isfinite(value) else None):
                raise LayerlabError(f"{file} has the label {value} in row {row}, which is no class; labels are whole "
                                    "numbers or names.")
        return [None if value is None else int(value) for value in values], False
    raise LayerlabError(f"{file} has labels of type {kind}; layerlab takes one class for each image, as a whole number "
                        "or a name.")


def _damage(file: Path, error: BaseException) -> str:
    """What is wrong with a file that is no parquet."""
    try:
        with file.open("rb") as stream:
            start = stream.read(30)
    except OSError:
        start = b""
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS; git lfs pull fetches the file"
    return first_line(error)
