"""`check_strategy` and `parametrize_with_checks`."""

from __future__ import annotations

import functools
import traceback
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from layerlab.base.errors import LayerlabError, reason, unknown
from layerlab.contract.strategy import Strategy
from layerlab.testing.checks import CHECKS, composes

if TYPE_CHECKING:
    from layerlab.testing.checks import Check


def check_strategy(
    strategy: Strategy | type[Strategy],
    *,
    expected_failed_checks: Mapping[str, str] | None = None,
    on_fail: Literal["raise", "warn"] | None = "raise",
    callback: Callable[[dict[str, Any]], None] | None = None,
    others: Sequence[Strategy] | None = None,
) -> list[dict[str, Any]]:
    """Check a strategy against the contract; some seconds for each check on a CPU.

    Args:
        strategy: an object with the settings to check, or a class for its defaults.
        expected_failed_checks: name of a check → why this strategy fails it; adds to the class's own.
        on_fail: raise at the first failure that is not expected, warn of each, or only report.
        callback: called with each check's dict as soon as it is there.
        others: what it is composed with; default: every other installed strategy.

    Returns:
        A dict for each check, as scikit-learn's `check_estimator` gives them: `strategy`, `check_name`, `exception`,
        `status` (`passed`, `failed`, `xfail` or `skipped`), `expected_to_fail` and `expected_to_fail_reason`.

    Raises:
        AssertionError: with `on_fail="raise"`, what the first failed check found, and how to mend it.
        LayerlabError: no strategy, or an expected failure of a check that does not exist.
    """
    candidate = _candidate(strategy)
    expected = _expected(candidate, expected_failed_checks)
    results = []
    checks: dict[str, Check] = {**CHECKS, composes.__name__: functools.partial(composes, others=others)}
    for name, check in checks.items():
        excuse = expected.get(name)
        result: dict[str, Any] = {
            "strategy": candidate, "check_name": name, "exception": None, "status": "passed",
            "expected_to_fail": excuse is not None, "expected_to_fail_reason": excuse}
        try:
            with _quiet_fits():
                check(candidate)
        except unittest.SkipTest as skipped:
            result |= {"status": "skipped", "exception": skipped}
        except Exception as error:
            result |= {"status": "failed" if excuse is None else "xfail", "exception": error}
        results.append(result)
        if callback is not None:
            callback(result)
        if result["status"] == "failed":
            said = f"{type(candidate).name} fails the check {name}: {finding(result['exception'])}"
            if on_fail == "raise":
                raise AssertionError(said) from result["exception"]
            if on_fail == "warn":
                warnings.warn(said, stacklevel=2)
    return results


def parametrize_with_checks(
    strategies: Sequence[Strategy | type[Strategy]], *, expected_failed_checks: Mapping[str, str] | None = None
) -> Any:
    """pytest's `parametrize` over `strategy` and `check`: one test for each check of each strategy.

    Args:
        strategies: objects, or classes for their defaults.
        expected_failed_checks: as `check_strategy`; these tests are marked as expected failures, strictly: one that
            passes is reported, so that it is taken off the list.
    """
    import pytest

    cases = []
    for each in strategies:
        candidate = _candidate(each)
        expected = _expected(candidate, expected_failed_checks)
        for name, check in CHECKS.items():
            marks = [pytest.mark.xfail(reason=expected[name], strict=True)] if name in expected else []
            cases.append(pytest.param(candidate, check, id=f"{type(candidate).name}-{name}", marks=marks))
    return pytest.mark.parametrize(("strategy", "check"), cases)


def finding(error: BaseException) -> str:
    """What a check found, in one line; of an error that is not the check's own, also where it comes from."""
    if isinstance(error, (AssertionError, unittest.SkipTest)) and str(error):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return reason(error) + where


@contextmanager
def _quiet_fits() -> Iterator[None]:
    """Strategies warn of small networks and slow features, which is not what is checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _candidate(strategy: Strategy | type[Strategy]) -> Strategy:
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        return strategy()
    if not isinstance(strategy, Strategy):
        raise LayerlabError(f"{strategy!r} is no strategy: pass a subclass of layerlab.Strategy, or an object of one.")
    return strategy


def _expected(strategy: Strategy, more: Mapping[str, str] | None) -> dict[str, str]:
    expected = {**type(strategy).expected_failed_checks, **(more or {})}
    for name in expected:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS, "Mend expected_failed_checks.")
    return expected
