"""An extension of griffe: what layerlab's docstrings mean by an example, and comments where there is no docstring."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from comments import comment_above

EXAMPLE = re.compile(r"^( *)Example:$", re.M)


class Docstrings(griffe.Extension):
    """Prepares docstrings for the reference."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            # Griffe's own section has the plural; the singular is a box of text to it.
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", obj.docstring.value)

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        # What pydantic is to leave unchecked does not matter to a reader.
        for each in func.parameters:
            if isinstance(each.annotation, griffe.ExprSubscript) and str(each.annotation.left) == "SkipValidation":
                each.annotation = each.annotation.slice

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        if attr.docstring or attr.lineno is None or not isinstance(attr.filepath, Path):
            return
        if comment := comment_above(attr.filepath.read_text(encoding="utf-8"), attr.lineno):
            attr.docstring = griffe.Docstring(comment, parent=attr)
