"""Names: of plugins and strategies, and names that become files and folders."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated

from pydantic import AfterValidator

GROUP = "layerlab.strategies"
# What a strategy may be called: also the name of folders, of an MLflow experiment, and a word on the command line.
NAME = re.compile("[a-z0-9-]+")
# A file in the folder of a fit whose training has begun.
ATTEMPT = "attempt.json"
# Bytes of a name: file systems take 255, and suffixes and temporary files add to it.
LONGEST = 200
# What leads to another folder, and what no name should hold: it drives a terminal or turns the text around.
_NOT_IN_A_FILE = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def checked_name(text: str) -> str:
    """A name that can be one file or folder, as it is.

    Raises:
        ValueError: it is empty or too long, leads to another folder, is hidden, or holds control characters.

    Example:
        >>> checked_name("fig-4, left")
        'fig-4, left'
        >>> checked_name("../x")
        Traceback (most recent call last):
        ValueError: should be a name without slashes, control characters or a dot in front, of 1 to 200 bytes
    """
    fits = text.strip() == text and 0 < len(text.encode(errors="replace")) <= LONGEST
    if not fits or text.startswith(".") or _NOT_IN_A_FILE.search(text):
        raise ValueError("should be a name without slashes, control characters or a dot in front, of 1 to "
                         f"{LONGEST} bytes")
    return text


# A text from a file, or from a user, that is used as the name of one file or folder.
FileName = Annotated[str, AfterValidator(checked_name)]
# The same, or an empty text for none.
FileNameOrNone = Annotated[str, AfterValidator(lambda text: checked_name(text) if text else text)]


def file_name(text: str) -> str:
    """A name for a file or folder, the same for the same text: the text itself where it is one, else one like it.

    Two texts have two names.

    Example:
        >>> file_name("lars-skip + low-bit")
        'lars-skip + low-bit'
        >>> file_name("../3/4 width")
        '3_4 width-1ca79ea3'
    """
    try:
        return checked_name(text)
    except ValueError:
        return marked(_NOT_IN_A_FILE.sub("_", text).lstrip("._ ").rstrip(), text, LONGEST // 4)


def marked(like: str, text: str, longest: int) -> str:
    """A name that had to be changed, cut to `longest` characters, with a mark of the text that it stands for."""
    mark = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    return f"{like[: longest - len(mark) - 1]}-{mark}"
