"""The conformance kit: a strategy that keeps the contract passes, and one that breaks a rule fails that check alone."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from broken_strategies import EVERY, MetricsFinite, SettingsRoundTrip
from click.testing import CliRunner
from helpers import Freezer, run_check, slow

from layerlab import LayerlabError
from layerlab.cli import main as cli
from layerlab.testing import CHECKS, check_strategy, composes, parametrize_with_checks
from layerlab.testing.plugin_checks import PLUGIN_CHECKS

# Checks of rules that a loop of one's own rests on as well: who breaks one of them fails `attaches`, too.
IN_A_LOOP_TOO = {"trains_residual", "trains_example", "deterministic", "data_untouched", "resumes"}


def test_every_check_has_a_strategy_that_breaks_it():
    assert [kind.name.replace("-", "_") for kind in EVERY] == list(CHECKS)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.name)
def test_a_broken_strategy_fails_its_check(kind):
    name = kind.name.replace("-", "_")
    with pytest.raises(Exception, match=r".") as caught:
        composes(kind(), [Freezer()]) if name == "composes" else CHECKS[name](kind())
    assert not isinstance(caught.value, LayerlabError)


@slow
@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.name)
def test_a_broken_strategy_fails_its_check_alone(kind):
    results = check_strategy(kind, on_fail=None, others=[Freezer()])
    failed = {result["check_name"]: str(result["exception"]) for result in results if result["status"] == "failed"}
    own = kind.name.replace("-", "_")
    assert set(failed) == {own, *(["attaches"] if own in IN_A_LOOP_TOO else [])}, failed


@parametrize_with_checks([Freezer()])
def test_a_strategy_that_keeps_the_contract_passes_each_check(strategy, check):
    run_check(strategy, check)


def test_the_first_failure_is_raised_with_its_remedy():
    with pytest.raises(AssertionError, match=r"fails the check settings_round_trip: .*; a validator must give back"):
        check_strategy(SettingsRoundTrip, others=[])


@slow
def test_a_known_failure_is_declared_with_its_reason():
    told: list[dict[str, Any]] = []
    results = check_strategy(MetricsFinite, expected_failed_checks={"metrics_finite": "an accepted gap"}, others=[],
                             callback=told.append)
    assert told == results
    known = [result for result in results if result["status"] == "xfail"]
    assert [(each["check_name"], each["expected_to_fail_reason"]) for each in known] == [
        ("metrics_finite", "an accepted gap")]


class Declared(MetricsFinite):
    name: ClassVar[str] = "metrics-finite"
    expected_failed_checks: ClassVar[dict[str, str]] = {"metrics_finite": "an accepted gap"}


@parametrize_with_checks([Declared])
def test_the_class_itself_may_declare_it(strategy, check):
    if check.__name__ != "metrics_finite":
        pytest.skip("is about one check")
    check(strategy)


def test_what_is_no_strategy_and_a_check_that_does_not_exist_get_one_sentence():
    with pytest.raises(LayerlabError, match=r"42 is no strategy: pass a subclass"):
        check_strategy(42)
    with pytest.raises(LayerlabError, match=r"Unknown check 'resume'. Did you mean 'resumes'\?"):
        check_strategy(Freezer, expected_failed_checks={"resume": "…"})


@slow
def test_the_command_prints_each_check_and_fails_with_a_failure(fake):
    fake()
    ended = CliRunner().invoke(cli.main, ["check", "fake"])
    assert all(name in ended.output for name in (*CHECKS, *PLUGIN_CHECKS))
    # The strategy keeps the contract; its paper is one that tests need and nobody would publish.
    failed = [line.split()[1] for line in ended.output.splitlines() if line.startswith("FAILED")]
    assert (ended.exit_code, failed) == (1, ["paper_claims", "paper_profiles", "notebook_whole"]), ended.output
    whole = len(CHECKS) + len(PLUGIN_CHECKS)
    assert ended.output.endswith(f"{whole - len(failed)} of {whole} checks hold.\n")
