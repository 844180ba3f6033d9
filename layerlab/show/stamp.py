"""A line of text below a picture that is drawn already."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

# Under which name of a PNG's metadata the text stands.
NOTE = "Description"


def stamped(picture: bytes, text: str) -> bytes:
    """A PNG with a line of small grey text in a strip below it, and in its metadata under `NOTE`.

    One that is stamped already gets the new text in the place of the old.

    Args:
        picture: the PNG.
        text: one line.
    """
    from PIL import Image as images
    from PIL import ImageDraw, ImageFont, PngImagePlugin

    image = images.open(io.BytesIO(picture))
    resolution = float(image.info.get("dpi", (100, 100))[0])
    shown, strip = _unstamped(image), _strip(image)
    height = shown.height
    whole = images.new("RGB", (image.width, height + strip), "white")
    whole.paste(shown, mask=shown)
    font = ImageFont.load_default(strip * 0.75)
    ImageDraw.Draw(whole).text((image.width - strip / 3, height + strip / 2), text, "#888888", font, anchor="rm")
    content, notes = io.BytesIO(), PngImagePlugin.PngInfo()
    notes.add_text(NOTE, text)
    whole.save(content, "png", pnginfo=notes, dpi=(resolution, resolution))
    return content.getvalue()


def same_picture(one: bytes, other: bytes) -> bool:
    """Whether two PNGs show the same, whichever stamps they have."""
    from PIL import Image as images

    if one == other:
        return True
    shown = [_unstamped(images.open(io.BytesIO(each))) for each in (one, other)]
    return shown[0].size == shown[1].size and shown[0].tobytes() == shown[1].tobytes()


def _strip(image: Image) -> int:
    """Rows of pixels that a stamp takes."""
    return round(float(image.info.get("dpi", (100, 100))[0]) / 9)


def _unstamped(image: Image) -> Image:
    """A picture without its stamp, with an alpha channel."""
    height = image.height - (_strip(image) if NOTE in image.info else 0)
    return image.convert("RGBA").crop((0, 0, image.width, height))
