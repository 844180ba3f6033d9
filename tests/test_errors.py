"""What is told of errors that are not our own: one line each, also of one that says nothing."""

from __future__ import annotations

import pytest

from layerlab import LayerlabError
from layerlab.base.errors import first_line, reason


@pytest.mark.parametrize(
    ("error", "whole", "first"),
    [
        (LayerlabError("Too small; enlarge it."), "Too small; enlarge it.", "Too small; enlarge it."),
        (ValueError("\n  no\n  such  thing"), "ValueError: no such thing", "no"),
        (MemoryError(), "MemoryError", "MemoryError"),
        (RuntimeError(" \n"), "RuntimeError", "RuntimeError"),
    ],
)
def test_an_error_is_told_in_one_line(error, whole, first):
    assert reason(error) == whole
    assert first_line(error) == first
