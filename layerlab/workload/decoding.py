"""Encoded images → pixels, and what had to be done to them on the way."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from layerlab.base.errors import LayerlabError, first_line

# Raise this when the same file gives other pixels than before: decoded images that are kept carry it in their name.
DECODING = 2
# The formats that are opened, whatever a file's name says. Pillow knows more, among them EPS, for which it starts
# Ghostscript on a stranger's file.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")
# What lies behind a transparent image: neither white nor black drawings vanish in it.
BACKGROUND = 128
# The share of pixels beyond the range of their kind up to which they are cut; beyond it the range is another one.
MOST_CUT = 0.01
# What may be done to an image → how a note says it of several of them.
TREATMENTS = {
    "scaled": "of 16 bits or floats scaled to 8 bits",
    "cut": "with values outside the range of floats (0 to 1) cut",
    "turned": "turned as their EXIF orientation says",
    "blended": "with transparency laid on mid-grey",
    "first": "of several frames, of which the first is taken",
}
# The shorter side had another length than was asked for.
RESIZED = "resized"
_UNDECODABLE = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError,
    EOFError, MemoryError, struct.error, Image.DecompressionBombError,
)
_LIMIT = "PIL.Image.MAX_IMAGE_PIXELS"
_ORIENTATION = ExifTags.Base.Orientation


class BadImage(LayerlabError):
    """An image that cannot be used.

    Args:
        where: where it lies.
        why: the reason, as a part of a sentence.
        what: what cannot be done with it.

    Attributes:
        where, why, what: as given.
    """

    def __init__(self, where: str, why: str, what: str = "does not decode") -> None:
        super().__init__(f"The image {where} {what} ({why}); replace or remove it.")
        self.where = where
        self.why = why
        self.what = what


def bad_images(found: Sequence[BadImage], total: int) -> LayerlabError:
    """One report of all images that cannot be used, of `total`: their number and the first ten."""
    if len(found) == 1:
        return found[0]
    listed = "; ".join(f"{each.where} ({each.why})" for each in found[:10])
    more = f"; and {len(found) - 10:,} more" if len(found) > 10 else ""
    return LayerlabError(
        f"{len(found):,} of {total:,} images cannot be used: {listed}{more}. Replace or remove them, or pass "
        "on_bad='skip' to leave them out."
    )


def treatment_note(counts: Mapping[str, int]) -> str:
    """What was done to images, as a part of a dataset's note; empty where nothing was."""
    return "; ".join(f"{counted(counts[name])} {text}" for name, text in TREATMENTS.items() if counts.get(name))


def counted(count: int) -> str:
    """So many images, in words."""
    return f"{count:,} image{'s' * (count != 1)}"


class Decoded(NamedTuple):
    """An image as it is used.

    Attributes:
        pixels: uint8, (height, width) of one channel or (height, width, 3).
        treated: keys of `TREATMENTS`, and `RESIZED`.
    """

    pixels: np.ndarray
    treated: tuple[str, ...]


def decode_image(data: bytes, where: str, size: int, channels: int) -> Decoded:
    """An encoded image → uint8 (size, size[, 3]): scaled by its shorter side and centre-cropped.

    Raises:
        BadImage: the bytes are no image, or one whose values have no known range, naming where they lie.
    """
    image, treated = open_image(data, where, channels)
    if min(image.size) != size:
        treated = (*treated, RESIZED)
    if image.size != (size, size):
        width, height = image.size
        crop = min(width, height)
        left, top = (width - crop) / 2, (height - crop) / 2
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + crop, top + crop))
    return Decoded(np.asarray(image), treated)


def open_image(data: bytes, where: str, channels: int) -> tuple[Image.Image, tuple[str, ...]]:
    """An encoded image in its own size, in mode L (one channel) or RGB (three), and what was done to it.

    It is turned as its EXIF orientation says; 16 bits and floats are scaled by the range of their kind, never by the
    values of one image, so that images stay comparable; what is transparent lies on mid-grey.

    Raises:
        BadImage: as `decode_image`.
    """
    treated = []
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            _check_size(opened)
            # Both are gone once the pixels are read and turned.
            turned, several = _orientation(opened) != 1, _frames(opened) > 1
            image = _turned(opened) if turned else opened
            image.load()
            image, more = _eight_bits(image)
            image, blended = _opaque(image)
            image = image.convert("L" if channels == 1 else "RGB")
    except _UNDECODABLE as error:
        raise BadImage(where, _why(data, error)) from None
    for name, was in (("turned", turned), ("blended", blended), ("first", several)):
        if was:
            treated.append(name)
    return image, (*more, *treated)


def shorter_side(data: bytes, where: str) -> int:
    """Pixels of an image's shorter side, from its header.

    Raises:
        BadImage: it has none.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            return min(opened.size)
    except _UNDECODABLE as error:
        raise BadImage(where, _why(data, error)) from None


def _check_size(image: Image.Image) -> None:
    """Raises ValueError where Pillow only warns: a small file may unpack to gigabytes."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise ValueError(f"it unpacks to {image.width} × {image.height} pixels, more than {_LIMIT} = {most:,}")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where the tag is missing, damaged or out of range."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _UNDECODABLE:
        return 1
    return value if value in range(1, 9) else 1


def _turned(image: Image.Image) -> Image.Image:
    """The image upright. Pillow turns a TIFF when it reads its pixels, which takes the tag away."""
    image.load()
    return ImageOps.exif_transpose(image)


def _frames(image: Image.Image) -> int:
    """How many frames an animation has; a phone's JPEG with a second picture inside (MPO) is none."""
    return getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "TIFF", "WEBP", "AVIF") else 1


def _eight_bits(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """An image of any depth → one of 8 bits a channel, scaled by the range of its kind.

    Raises:
        ValueError: values whose range nothing says: 32-bit integers, floats beyond 0 to 1.
    """
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ValueError("it holds floats that are not finite")
        outside = float(((values < 0) | (values > 1)).mean())
        if outside > MOST_CUT:
            raise ValueError(f"it holds floats from {values.min():g} to {values.max():g}, and 0 to 1 is the range of "
                             "floats; divide them by theirs")
        scaled = (values.clip(0, 1) * 255).round().astype(np.uint8)
        return Image.fromarray(scaled), ("scaled", "cut") if outside else ("scaled",)
    if not image.mode.startswith("I"):
        return image, ()
    # Older releases of Pillow give 16-bit PNGs in 32 bits; of a 32-bit file nothing says which range is meant.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("it holds 32-bit or signed integers, whose range nothing says; save it with 8 or 16 bits")
    values = np.asarray(image).astype(np.float32)
    scaled = (values * (255 / _largest(image))).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(scaled), ("scaled",)


def _largest(image: Image.Image) -> int:
    """The largest value of an integer image: 65,535, or less where a TIFF says that it has fewer bits (12, say)."""
    bits: Any = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,))
    first = bits[0] if isinstance(bits, tuple) else bits
    return 2**first - 1 if 8 < first <= 16 else 65_535


def _opaque(image: Image.Image) -> tuple[Image.Image, bool]:
    """An image without transparency, laid on mid-grey where it had some, and whether it had."""
    if "A" not in image.getbands() and "a" not in image.getbands() and "transparency" not in image.info:
        return image, False
    layers = image.convert("RGBA")
    if layers.getchannel("A").getextrema() == (255, 255):
        return layers.convert("RGB"), False
    behind = Image.new("RGBA", layers.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
    return Image.alpha_composite(behind, layers).convert("RGB"), True


def _why(data: bytes, error: BaseException) -> str:
    """Why bytes do not decode, by what they are where that says more than Pillow does."""
    start = data[:200].lstrip().lower()
    if not data:
        return "the file is empty"
    if isinstance(error, Image.DecompressionBombError):
        return f"it unpacks to far more pixels than {_LIMIT} = {Image.MAX_IMAGE_PIXELS:,}"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS; git lfs pull fetches the image"
    if start.startswith((b"<html", b"<!doctype html")):
        return "a web page"
    if isinstance(error, UnidentifiedImageError):
        return f"none of the formats {', '.join(FORMATS)}"
    return first_line(error)
