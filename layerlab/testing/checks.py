"""The contract of a strategy, executable: for authors of plugins, in the manner of scikit-learn's `check_estimator`.

    check_strategy(MyStrategy)                       # runs every check, raises at the first that fails

    @parametrize_with_checks([MyStrategy()])         # pytest: one test a check
    def test_contract(strategy, check):
        check(strategy)

`layerlab check NAME` does the same for an installed strategy. A check that a strategy is known to fail is declared with
its reason, on the class (`Strategy.expected_failed_checks`) or in the call.
"""

from __future__ import annotations

from collections.abc import Callable

from layerlab.contract.strategy import Strategy
from layerlab.testing.loop_checks import attaches
from layerlab.testing.manners_checks import (
    composes,
    data_untouched,
    final_model,
    global_switches,
    hook_calls,
    leaves_nothing_behind,
    leaves_users_model,
)
from layerlab.testing.network_checks import (
    coverage_said,
    frozen_by_others,
    refused_at_the_start,
    shared_modules,
    tied_weights,
)
from layerlab.testing.settings_checks import pickles, settings_round_trip
from layerlab.testing.training_checks import (
    bfloat16,
    compiles,
    costs_logged,
    deterministic,
    fits_again,
    metrics_finite,
    resumes,
    trains_cnn,
    trains_example,
    trains_mlp,
    trains_residual,
)

Check = Callable[[Strategy], None]
# The checks of the contract, by name; each takes a strategy and raises what is wrong with it.
CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        settings_round_trip, trains_mlp, trains_cnn, trains_residual, trains_example, refused_at_the_start,
        coverage_said, shared_modules, tied_weights, frozen_by_others, deterministic, leaves_users_model,
        data_untouched, final_model, fits_again, attaches, hook_calls, resumes, leaves_nothing_behind, global_switches,
        metrics_finite, costs_logged, composes, bfloat16, compiles, pickles,
    )
}
