"""Image folders as people have them: which folders are halves and which are classes, and the images in them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from layerlab.base.errors import LayerlabError
from layerlab.workload.cache import content_digests
from layerlab.workload.decoding import BadImage
from layerlab.workload.halves import assigned, one_each
from layerlab.workload.places import TRAINING, half_of
from layerlab.workload.sources import Source

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".avif",
)
# Folders that programs leave behind.
_LEFTOVERS = ("__macosx", "__pycache__", "$recycle.bin", "@eadir", "lost+found")
# So many folders may be wrapped around a dataset, one in the other.
_WRAPPINGS = 5


class Layout(NamedTuple):
    """How an image folder is understood.

    Attributes:
        top: the folder that holds the halves or the classes.
        halves: half → its folder.
        flat: half → its folder, of those that hold images without class folders.
        whole: the class folders lie at the top, in no half.
        unread: names of other folders with images beside the halves.
    """

    top: Path
    halves: dict[str, Path]
    flat: dict[str, Path]
    whole: bool
    unread: tuple[str, ...]


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

    def where(self, index: int) -> str:
        return shown(self.samples[index][0])

    def read(self, index: int) -> bytes:
        path, where = self.samples[index][0], self.where(index)
        try:
            # A pipe would be read for ever.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise BadImage(where, "it is no file", "cannot be read")
            return Path(path).read_bytes()
        except OSError as error:
            link = "a link that leads nowhere or in a circle" if os.path.islink(path) else str(error.strerror)
            raise BadImage(where, link, "cannot be read") from None

    @cached_property
    def digest(self) -> str:
        """Of the classes' names, and of each image's content and label, in their order."""
        digest = hashlib.blake2b("/".join(self.class_names).encode(), digest_size=16)
        for content, (_, label) in zip(content_digests([path for path, _ in self.samples]), self.samples, strict=True):
            digest.update(content + label.to_bytes(8))
        return digest.hexdigest()


def shown(path: str) -> str:
    """A path or a name as text that any terminal takes: bytes that are no UTF-8 as escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def image_folders(folder: Path) -> tuple[dict[str, Source], list[str]]:
    """The halves of a folder of class folders, and what a reader should know of them.

    The halves go by their names in any case and common spelling, within folders wrapped around them, too. The training
    half decides which label a class has, also in a test half that lacks some classes, where torchvision's own
    ImageFolder would number the rest anew. Hidden files and folders, Jupyter's checkpoints among them, are no images
    and no classes. Each real folder is visited once, whatever links lead to it.

    Raises:
        LayerlabError: no images, a class without any, a test half with classes of its own, two classes or halves that
            are one folder, names of halves where classes are expected; naming the folder.
    """
    layout = find_layout(folder)
    notes = [] if layout.top == folder else [f"read from its folder {shown(str(layout.top.relative_to(folder)))}"]
    if layout.unread:
        notes.append(f"not read: {', '.join(layout.unread)}")
    walk = _Walk(layout)
    if TRAINING in layout.flat:
        raise LayerlabError(f"{layout.flat[TRAINING]} has images and no class folders, so nothing says their classes; "
                            "sort them into class folders.")
    aside = " and ".join(f"{shown(place.name)}/ has images and no class folders" for place in layout.flat.values())
    train = layout.halves.get(TRAINING)
    if train is None:
        named = " and a folder ".join(path.name for path in layout.halves.values())
        raise LayerlabError(f"{folder} has a folder {named} and none called train; add the missing half.")
    names = class_folders(train)
    halves: dict[str, Source] = {}
    for half, place in layout.halves.items():
        halves[half] = _half_source(walk, half, place, train, names)
    divided, more = assigned(halves, str(folder), aside, layout.whole)
    return divided, [*notes, *more]


def _half_source(walk: _Walk, half: str, place: Path, train: Path, names: tuple[str, ...]) -> FolderSource:
    """The images of a half, by the training half's classes."""
    strange = [name for name in class_folders(place) if name not in names]
    if strange and half != TRAINING:
        raise LayerlabError(f"{place} has a class folder {shown(strange[0])!r} that {train} has not; make the names "
                            "the same.")
    samples = [(path, label) for label, name in enumerate(names) for path in walk.images(place / name)]
    suffixes = ", ".join(IMAGE_SUFFIXES)
    if not samples:
        if half != TRAINING:
            raise LayerlabError(f"{place} has no folders with images ({suffixes}); fill or remove it.")
        raise LayerlabError(
            f"{place} has no folders with images; expected a folder a class ({place / 'cat' / '1.jpg'}, say; "
            f"{suffixes}), in train/ and val/ or test/ or by themselves, or train-*.parquet and test-*.parquet."
        )
    counts = Counter(label for _, label in samples)
    if half == TRAINING and (empty := [name for label, name in enumerate(names) if not counts[label]]):
        raise LayerlabError(f"The class folder {shown(str(place / empty[0]))} has no image; give it some ({suffixes}), "
                            "or remove it.")
    return FolderSource(samples, tuple(shown(name) for name in names))


def find_layout(folder: Path) -> Layout:
    """Which folders are halves; where none is, the class folders lie at the top.

    Raises:
        LayerlabError: two folders for one half, or classes that look like halves.
    """
    top = _unwrapped(folder)
    named: dict[str, list[Path]] = {}
    flat: dict[str, list[Path]] = {}
    others = []
    for name in class_folders(top):
        half = half_of(name)
        if half is None:
            others.append(name)
        elif class_folders(top / name) and not _has_images(top / name):
            named.setdefault(half, []).append(_inner_half(top / name))
        elif _has_images(top / name):
            flat.setdefault(half, []).append(top / name)
    with_images = [name for name in others if _has_images(top / name) or _has_class_folders(top / name)]
    # `train` beside folders of images is the vehicle.
    vehicle = set(flat) == {TRAINING} and bool(with_images)
    if not named and (vehicle or not flat):
        return Layout(top, {TRAINING: top}, {}, True, ())
    if not named or (set(named) == {TRAINING} and with_images):
        look = [path.name for group in (*named.values(), *flat.values()) for path in group]
        raise LayerlabError(
            f"{top} has folders {', '.join(map(shown, [*look, *with_images][:6]))}, which look like halves and like "
            "classes; put a folder for each class into train/ and test/, or give the classes other names."
        )
    unread = tuple(f"{shown(name)}/" for name in with_images)
    return Layout(top, one_each(named, str(top)), one_each(flat, str(top)), False, unread)


def other_files(folder: Path) -> Counter[str]:
    """Suffix → how many visible files of it lie in a folder and those below it and are no images by their names."""
    found: Counter[str] = Counter()
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and name.lower() not in _LEFTOVERS]
        found.update(os.path.splitext(name)[1].lower() for name in files if name[0] != "." and not _is_image(name))
    return found


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the folders in a folder, sorted, without hidden ones and programs' leftovers: the classes.

    Raises:
        LayerlabError: the folder cannot be read.
    """
    return tuple(sorted(entry.name for entry in _entries(folder)
                        if _is_folder(entry) and entry.name.lower() not in _LEFTOVERS))


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted by name, without hidden entries."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise LayerlabError(f"The folder {shown(str(folder))} cannot be read ({error.strerror}).") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _has_images(folder: Path) -> bool:
    return any(_is_image(entry.name) and not _is_folder(entry) for entry in _entries(folder))


def _has_class_folders(folder: Path) -> bool:
    return any(_has_images(folder / name) for name in class_folders(folder))


def _unwrapped(folder: Path) -> Path:
    """The folder that holds several folders, or one with images, in folders that hold one folder and nothing else."""
    for _ in range(_WRAPPINGS):
        inner = class_folders(folder)
        if len(inner) != 1 or _has_images(folder) or not class_folders(folder / inner[0]) or _has_images(
            folder / inner[0]
        ):
            break
        if half_of(inner[0]) is not None:
            break
        folder = folder / inner[0]
    return folder


def _inner_half(folder: Path) -> Path:
    """The folder of the same half that alone is in a half's folder, as archives unpack: `seg_train/seg_train`."""
    inner = class_folders(folder)
    again = len(inner) == 1 and half_of(inner[0]) == half_of(folder.name) and class_folders(folder / inner[0])
    return folder / inner[0] if again else folder


class _Walk:
    """Images in folders, each real folder visited once: links may lead back, or into another class."""

    def __init__(self, layout: Layout) -> None:
        self._visited: dict[tuple[int, int], str] = {}
        for place in dict.fromkeys((layout.top, *layout.halves.values(), *layout.flat.values())):
            self._claim(place)
        for place in layout.halves.values():
            for name in class_folders(place):
                self._claim(place / name)

    def _claim(self, folder: Path) -> None:
        status = os.stat(folder)
        other = self._visited.setdefault((status.st_dev, status.st_ino), str(folder))
        if other != str(folder):
            raise LayerlabError(f"{shown(str(folder))} and {shown(other)} are one and the same folder by a link; "
                                "remove one of them.")

    def images(self, folder: Path) -> list[str]:
        """Paths of the images in a folder and those below it, sorted. Links that lead nowhere are among them."""
        found: list[str] = []
        waiting = [str(folder)] if folder.is_dir() else []
        while waiting:
            for entry in _entries(waiting.pop()):
                if not _is_folder(entry):
                    if _is_image(entry.name):
                        found.append(entry.path)
                    continue
                status = entry.stat()
                number = (status.st_dev, status.st_ino)
                if entry.name.lower() not in _LEFTOVERS and number not in self._visited:
                    self._visited[number] = entry.path
                    waiting.append(entry.path)
        return sorted(found)
