"""Texts as a person may see them: without characters that drive a terminal, and without passwords."""

from __future__ import annotations

import re

# C0 but for tab and line feed, DEL and C1, by which a text could drive the terminal, and what reverses the direction of
# writing.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text whose control characters are seen and not obeyed: `\\x1b[31m` in the place of a colour."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable(text: str) -> str:
    """A text in one line, whose control characters are seen and not obeyed."""
    return visible(" ".join(text.split()))
