"""One pass over the images of a folder: how it is understood, and what a training would better not meet."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from layerlab.base.errors import LayerlabError
from layerlab.show.table import Cell, Table, Tone
from layerlab.workload.decoding import TREATMENTS, BadImage, open_image
from layerlab.workload.folders import FolderSource, other_files, shown
from layerlab.workload.loading import folder_sources
from layerlab.workload.places import TRAINING
from layerlab.workload.sources import Source

# So many examples of each finding, and so many classes, are shown.
_EXAMPLES, _CLASSES = 10, 50


class Finding(NamedTuple):
    """Something found in several images.

    Attributes:
        what: it is.
        images: how many.
        examples: the first ten, with the reason or the other image where there is one.
        tone: `bad` for what makes a training or its result wrong, `warning` for what may, else none.
    """

    what: str
    images: int
    examples: tuple[str, ...]
    tone: Tone = ""


class _Seen(NamedTuple):
    """An image in its half: where it lies, its label, a digest of its pixels, what is told of it."""

    where: str
    label: int
    pixels: bytes
    treated: tuple[str, ...]
    plain: bool
    wrong: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect_images` found.

    Attributes:
        folder: that was looked at.
        layout: a table of the halves.
        classes: a table of the classes, with their images in each half.
        findings: most serious first.
    """

    folder: str
    layout: Table
    classes: Table
    findings: Sequence[Finding]

    @property
    def sound(self) -> bool:
        """Whether nothing was found that makes a training or its result wrong."""
        return all(finding.tone != "bad" for finding in self.findings)

    @property
    def table(self) -> Table:
        """The findings as a table."""
        rows: list[list[str | Cell]] = [
            [Cell(each.what, each.tone), f"{each.images:,}", "; ".join(each.examples)] for each in self.findings
        ]
        return Table(("finding", "images", f"the first {_EXAMPLES}"), rows or [["nothing", "0", ""]])


def inspect_images(folder: str | os.PathLike[str]) -> Inspection:
    """Decode every image of a folder once, in its own size, and say what there is.

    Args:
        folder: of class folders, halves or parquet files, as `layerlab.load_dataset` takes it.

    Raises:
        LayerlabError: a folder that `load_dataset` refuses for its layout or its labels.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> for half, name, grey in [("train", "cat", 9), ("train", "dog", 90), ("test", "cat", 9), ("test", "dog", 7)]:
        ...     (folder / half / name).mkdir(parents=True)
        ...     Image.new("L", (8, 8), grey).save(folder / half / name / "1.png")
        >>> [(finding.what, finding.images) for finding in inspect_images(folder).findings]
        [('in two halves', 1), ('of a single colour', 4)]
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise LayerlabError(f"{place} is no folder; name a folder of images or parquet files.")
    halves, notes = folder_sources(place)
    seen = {half: _look(source) for half, source in halves.items()}
    train = halves[TRAINING]
    names = train.class_names or tuple(str(label) for label in range(int(train.labels().max()) + 1))
    layout: list[list[str | Cell]] = [[half, f"{len(source):,}", f"{len(source.labels().unique())}"]
                                      for half, source in halves.items()]
    everything = [each for looked in seen.values() for each in looked]
    findings = [*_twins(seen, names), *_conditions(everything)]
    if isinstance(_whole(train), FolderSource) and (others := other_files(place)):
        listed = tuple(f"{count:,} {suffix or 'without an ending'}" for suffix, count in others.most_common(_EXAMPLES))
        findings.append(Finding("files that are no images by their names", others.total(), listed))
    order: tuple[Tone, ...] = ("bad", "warning", "")
    inside = [each._replace(examples=tuple(text.replace(f"{shown(str(place))}{os.sep}", "") for text in each.examples))
              for each in findings]
    return Inspection(
        str(place),
        Table(("half", "images", "classes"), layout, notes=[f"{note}." for note in (*train.notes, *notes)]),
        _class_table(halves, names),
        sorted(inside, key=lambda each: order.index(each.tone)),
    )


def _whole(source: Source) -> Source:
    """The source that a part was taken from."""
    return getattr(source, "whole", source)


def _look(source: Source) -> list[_Seen]:
    labels = source.labels().tolist()

    def one(row: int) -> _Seen:
        where = source.where(row)
        try:
            image, treated = open_image(source.read(row), where, 3)
        except BadImage as error:
            return _Seen(where, labels[row], b"", (), False, error.why)
        # Not of the file: the same picture saved twice has other bytes, and other names.
        pixels = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()
        plain = all(low == high for low, high in image.getextrema())  # type: ignore[misc]  # a pair a channel
        return _Seen(where, labels[row], pixels, treated, plain, "")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, range(len(source))))


def _conditions(images: Sequence[_Seen]) -> Iterator[Finding]:
    """What is found in images one by one."""
    bad = [f"{each.where} ({each.wrong})" for each in images if each.wrong]
    yield from _finding("that cannot be used", bad, "bad")
    for name, text in TREATMENTS.items():
        tone: Tone = "warning" if name == "cut" else ""
        yield from _finding(text, [each.where for each in images if name in each.treated], tone)
    yield from _finding("of a single colour", [each.where for each in images if each.plain], "warning")


def _twins(seen: Mapping[str, Sequence[_Seen]], names: Sequence[str]) -> Iterator[Finding]:
    """Images with the same pixels: in two halves, with two labels, or just twice."""
    first: dict[bytes, tuple[str, _Seen]] = {}
    leaking, torn, doubled = [], [], []
    for half, images in seen.items():
        for each in images:
            if each.wrong:
                continue
            other_half, other = first.setdefault(each.pixels, (half, each))
            if other is each:
                continue
            both = f"{each.where} = {other.where}"
            if other_half != half:
                leaking.append(both)
            if other.label != each.label:
                torn.append(f"{both} ({names[each.label]}, {names[other.label]})")
            elif other_half == half:
                doubled.append(both)
    yield from _finding("in two halves", leaking, "bad")
    yield from _finding("with two labels", torn, "bad")
    yield from _finding("twice in one half", doubled, "warning")


def _finding(what: str, where: Sequence[str], tone: Tone) -> Iterator[Finding]:
    if where:
        yield Finding(what, len(where), tuple(islice(where, _EXAMPLES)), tone)


def _class_table(halves: Mapping[str, Source], names: Sequence[str]) -> Table:
    """The classes, with the number of their images in each half."""
    counts = {half: Counter(source.labels().tolist()) for half, source in halves.items()}
    rows: list[list[str | Cell]] = [
        [name, *(f"{counts[half][label]:,}" for half in halves)] for label, name in enumerate(names[:_CLASSES])
    ]
    least = {half: min(counts[half][label] for label in range(len(names))) for half in halves}
    more = f"{len(names) - _CLASSES:,} more classes; the smallest has " + ", ".join(
        f"{count:,} {half}" for half, count in least.items()
    ) + " images."
    return Table(("class", *halves), rows, notes=[more] if len(names) > _CLASSES else ())
