"""The conformance kit for authors of strategies: `check_strategy`, and `parametrize_with_checks` for pytest."""

from __future__ import annotations

from layerlab.testing.checks import CHECKS as CHECKS
from layerlab.testing.checks import composes as composes
from layerlab.testing.kit import check_strategy as check_strategy
from layerlab.testing.kit import parametrize_with_checks as parametrize_with_checks

__all__ = ["CHECKS", "check_strategy", "composes", "parametrize_with_checks"]
