"""The conformance kit for authors of strategies: `check_strategy`, `parametrize_with_checks` for pytest, and
`check_figure` for their figures."""

from __future__ import annotations

from layerlab.show.legibility import check_figure as check_figure
from layerlab.testing.checks import CHECKS as CHECKS
from layerlab.testing.checks import composes as composes
from layerlab.testing.kit import check_strategy as check_strategy
from layerlab.testing.kit import parametrize_with_checks as parametrize_with_checks

__all__ = ["CHECKS", "check_figure", "check_strategy", "composes", "parametrize_with_checks"]
