"""The comment above a name's assignment: what a public name says of itself where it can have no docstring."""

from __future__ import annotations


def comment_above(source: str, line: int) -> str:
    """The comment that ends right above a line of a source, in one line; empty where there is none.

    Args:
        source: of a module.
        line: counted from 1, of the assignment.

    Example:
        >>> comment_above("# What is left\\n# of it.\\nrest = 3", 3)
        'What is left of it.'
    """
    found: list[str] = []
    for text in reversed(source.splitlines()[: line - 1]):
        if not text.startswith("# "):
            break
        found.insert(0, text.removeprefix("# "))
    return " ".join(found)
