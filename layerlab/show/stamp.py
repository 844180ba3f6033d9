"""A line of text below a picture that is drawn already."""

from __future__ import annotations

import io

# Under which name of a PNG's metadata the text stands.
NOTE = "Description"


def stamped(picture: bytes, text: str) -> bytes:
    """A PNG with a line of small grey text in a strip below it, and in its metadata under `NOTE`.

    One that is stamped already gets the new text in the place of the old.

    Args:
        picture: the PNG.
        text: one line.
    """
    from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

    image = Image.open(io.BytesIO(picture))
    resolution = float(image.info.get("dpi", (100, 100))[0])
    strip = round(resolution / 9)
    height = image.height - (strip if NOTE in image.info else 0)
    shown = image.convert("RGBA").crop((0, 0, image.width, height))
    whole = Image.new("RGB", (image.width, height + strip), "white")
    whole.paste(shown, mask=shown)
    font = ImageFont.load_default(strip * 0.75)
    ImageDraw.Draw(whole).text((image.width - strip / 3, height + strip / 2), text, "#888888", font, anchor="rm")
    content, notes = io.BytesIO(), PngImagePlugin.PngInfo()
    notes.add_text(NOTE, text)
    whole.save(content, "png", pnginfo=notes, dpi=(resolution, resolution))
    return content.getvalue()
