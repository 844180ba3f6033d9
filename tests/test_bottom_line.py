"""The sentence of a paper says what its runs found, by a rule that no outcome changes, and nothing else."""

from __future__ import annotations

import pytest

from layerlab import LayerlabError
from layerlab.contract.claims import ClaimResult
from layerlab.contract.paper import Paper
from layerlab.reporting.bottom_line import bottom_line
from layerlab.reporting.findings import Finding, Outcome, finding
from layerlab.reporting.overall import overall
from layerlab.runs.answer import Against
from layerlab.show.interval import mean_interval

CONDITIONS = {"dataset": "imagenet", "network": "large", "epochs": 90}


def paper(**headline: object) -> Paper:
    about = {"where": "Table 1", "kind": "effect", "conditions": CONDITIONS}
    return Paper(
        title="A paper", authors="A. Author", year=2020, venue="V", summary="S", formula="x", notebook="n.ipynb",
        strategy="fake", profiles={"quick": {"description": "q"}, "cpu": {"description": "c"}},
        claims=[
            {**about, "id": "gain", "statement": "more top-1", "value": 3.0, "unit": "points", "neutral": 0.0,
             "tolerance": 1.0,
             "gates": [{"observed": "baseline top-1", "at_least": 70.0, "shows": "the baseline trains"}]},
            {**about, "id": "saving", "statement": "less time", "value": 40.0, "unit": "%", "neutral": 0.0,
             "tolerance": 5.0},
            {**about, "id": "faster", "statement": "times faster", "value": 2.0, "unit": "×", "neutral": 1.0,
             "tolerance": 0.1},
            {**about, "id": "share", "statement": "share of the size", "value": 0.25, "unit": "×", "neutral": 1.0,
             "tolerance": 0.1},
        ],
        headline={"method": "Fake", "accuracy": "gain", "costs": {"time": "saving"}, "arm": "fake", **headline})


def apart() -> Paper:
    """The same paper with a second claim of accuracy, on other data."""
    one = paper()
    claims = [*one.claims, one.claim("gain").model_copy(update={"id": "gain-2", "gates": []})]
    return Paper.model_validate({**one.model_dump(), "claims": [claim.model_dump() for claim in claims],
                                 "headline": {**one.headline.model_dump(), "accuracy": ["gain", "gain-2"]}})


def row(
    claim: str, values: list[float], profile: str = "cpu", of: Paper | None = None, **more: object
) -> ClaimResult:
    conditions = more.pop("conditions", {"dataset": "cifar10", "network": "small"})
    of = of or paper()
    seeds = list(range(len(values)))
    mean, half = mean_interval(values)
    made = of.not_run(of.claim(claim), profile).model_copy(update={
        "measured": mean, "interval": half if seeds[1:] else None, "values": values, "seeds": seeds,
        "conditions": conditions,
        "observed": {"baseline top-1": 80.0}, **more})
    return of.judged(made)


def pays(**more: str) -> list[dict[str, str]]:
    return [{"run": "small, cifar10", "arm": "fake", "pays": "undecided", "equal cost, steps": "66 %",
             "above it [points]": "-0.10 ± 0.40", **more}]


LOST = [-5.0, -5.5, -4.5]
SAVED = [31.0, 32.0, 33.0]


def test_it_says_what_is_saved_what_is_lost_whether_that_pays_and_how_sure_that_is():
    run = Outcome([row("gain", LOST), row("saving", SAVED)], pays())
    assert bottom_line(paper(), [run]) == (
        "Fake against plain training: 32 ± 2 % less training time and 5.0 ± 1.2 points less accuracy; not measurably "
        "better than plain training of the same cost (−0.10 ± 0.40 points); not tested at the paper's scale (here "
        "cifar10 with small, 3 seeds).")


@pytest.mark.parametrize(("above", "words"), [
    ("+0.50 ± 0.40", "; better than plain training of the same cost (+0.50 ± 0.40 points)"),
    ("-0.50 ± 0.40", "; worse than plain training of the same cost (−0.50 ± 0.40 points)"),
    ("+0.50", "; +0.50 points against plain training of the same cost, with one seed"),
    ("—", "; not compared with plain training of the same cost"),
])
def test_better_and_worse_are_said_of_whole_intervals(above, words):
    run = Outcome([row("gain", LOST), row("saving", SAVED)], pays(**{"above it [points]": above}))
    assert words in bottom_line(paper(), [run])


def test_the_placebo_is_named_where_there_is_one():
    run = Outcome([row("gain", LOST)], pays(**{"above the placebo [points]": "+0.30 ± 0.60"}))
    assert "; not measurably better than its placebo (+0.30 ± 0.60 points)" in bottom_line(paper(), [run])
    run = Outcome([row("gain", LOST)], pays(**{"above the placebo [points]": ""}))
    assert "placebo" not in bottom_line(paper(), [run])


def test_a_placebo_that_decides_the_same_is_no_single_seed():
    run = Outcome([row("gain", LOST)], pays(**{"above the placebo [points]": "+0.000", "seeds": "3"}))
    assert "; the same as its placebo with every seed" in bottom_line(paper(), [run])


@pytest.mark.parametrize(("costs", "claim", "values", "words"), [
    ({"time": "saving"}, "saving", [10.0, -10.0], "no measurable saving of training time (0 ± 127 %)"),
    ({"time": "saving"}, "saving", [-20.0, -20.0], "20.0 % more training time"),
    ({"time": "faster"}, "faster", [2.0, 4.0, 2.0], "58 ± 36 % less training time"),
    ({"memory": "faster"}, "faster", [4.0], "75.0 % less peak memory"),
    ({"size": "share"}, "share", [0.4, 0.4], "60.0 % less storage"),
])
def test_a_cost_is_told_as_a_share_whatever_the_claim_s_unit(costs, claim, values, words):
    assert words in bottom_line(paper(costs=costs, accuracy=""), [Outcome([row(claim, values)])])


def test_a_cost_without_a_claim_comes_from_the_comparison_of_the_same_data():
    arms = [Against(comparison="cifar10-small", arm="fake", seeds=3, measured={"time": (1.05, 0.01)}),
            Against(comparison="mnist-small", arm="fake", seeds=3, measured={"time": (3.0, 0.01)}),
            Against(comparison="cifar10-small", arm="other", seeds=3, measured={"time": (2.0, 0.01)})]
    text = bottom_line(paper(costs={"time": ""}), [Outcome([row("gain", [0.0, 0.0])], arms=arms)])
    assert "the same accuracy; against training without it 5 ± 1 % more training time;" in text


def test_what_a_gate_closes_settles_nothing_and_says_why():
    run = Outcome([row("gain", LOST, observed={"baseline top-1": 61.0})])
    assert bottom_line(paper(), [run]).endswith(
        "; this settles nothing (cifar10 with small, 3 seeds): baseline top-1 is 61, not at least 70: nothing shows "
        "that the baseline trains.")


def test_a_cost_whose_own_gate_is_closed_is_no_saving():
    closed = {"verdict": "not tested", "reason": "nothing shows that the method acts"}
    runs = [Outcome([row("gain", LOST), row("saving", SAVED).model_copy(update=closed)])]
    assert bottom_line(paper(), runs).startswith(
        "Fake against plain training: 5.0 ± 1.2 points less accuracy; nothing is settled of training time (nothing "
        "shows that the method acts); ")
    assert not finding(paper(), runs).costs
    # A gate that closes everything is said once.
    runs = [Outcome([each.model_copy(update=closed) for each in (row("gain", LOST), row("saving", SAVED))])]
    assert bottom_line(paper(), runs).count("nothing shows that the method acts") == 1


def test_an_accuracy_whose_own_gate_is_closed_leaves_what_was_tested():
    closed = row("gain", LOST, observed={"baseline top-1": 61.0})
    run = Outcome([closed, row("saving", SAVED)], pays(), [
        Against(comparison="cifar10-small", arm="fake", seeds=3, measured={"memory": (1.05, 0.01)})])
    assert bottom_line(paper(costs={"time": "saving", "memory": ""}), [run]) == (
        "Fake against plain training: 32 ± 2 % less training time; nothing is settled of accuracy (baseline top-1 is "
        "61, not at least 70: nothing shows that the baseline trains); not tested at the paper's scale (here cifar10 "
        "with small, 3 seeds).")


def test_under_the_paper_s_conditions_the_verdict_is_said():
    run = Outcome([row("gain", [2.9, 3.0, 3.1], conditions=CONDITIONS)])
    assert bottom_line(paper(), [run]).endswith("; reproduced under the paper's conditions (imagenet with large, 3 "
                                                "seeds).")


def test_quick_speaks_only_where_nothing_else_does_and_settles_nothing():
    quick, cpu = Outcome([row("gain", [9.0], "quick")]), Outcome([row("gain", LOST)])
    assert bottom_line(paper(), [quick]).endswith("; the quick profile on cifar10 with small, 1 seed, which settles "
                                                  "nothing.")
    assert bottom_line(paper(), [quick, cpu]) == bottom_line(paper(), [cpu])


def test_nothing_measured_is_said_with_what_the_paper_claims():
    said = "Fake: not measured with today's code; the paper claims 40 % (less time)."
    modelled = row("saving", SAVED).model_copy(update={"verdict": "by a model", "by_model": True})
    for runs in ([], [Outcome([])], [Outcome([modelled])]):
        assert bottom_line(paper(), runs) == said


@pytest.mark.parametrize("outcome", [-9.0, 9.0])
def test_which_run_speaks_depends_on_its_conditions_and_never_on_its_outcome(outcome):
    near = row("gain", [outcome, outcome], conditions={"dataset": "imagenet", "network": "small"})
    far = row("gain", [1.0, 1.0, 1.0])
    closed = row("gain", [3.0, 3.0, 3.0], conditions=CONDITIONS, observed={})
    for runs in ([near, far, closed], [closed, far, near]):
        assert finding(paper(), [Outcome([each]) for each in runs]).anchor == near


@pytest.mark.parametrize("outcome", [-9.0, 9.0])
def test_every_dataset_that_was_tested_is_told_whatever_came_out(outcome):
    near = [row("gain", LOST), row("saving", SAVED)]
    other = {"dataset": "mnist", "network": "small"}
    far = Outcome([row("gain", [outcome, outcome], conditions=other), row("saving", [10.0, 10.0], conditions=other)])
    again = row("gain", [0.0, 0.0], conditions=other, profile="longer")
    closed = row("gain", [3.0, 3.0], conditions={"dataset": "digits"}, observed={})
    runs = [Outcome([closed]), far, Outcome([again]), Outcome(near)]
    said = bottom_line(paper(), runs)
    assert said.startswith("Fake against plain training: 32 ± 2 % less training time and 5.0 ± 1.2 points less")
    assert said.endswith(
        " On mnist with small, 2 seeds: 10.0 % less training time and "
        f"9.00 points {'more' if outcome > 0 else 'less'} accuracy; not compared with plain training of the same "
        "cost.")
    assert said.count(" On ") == 1


def test_a_paper_that_claims_each_dataset_apart_is_told_as_one_that_does_not():
    of = apart()
    cifar, mnist, digits = ({"dataset": name, "network": "small"} for name in ("cifar10", "mnist", "digits"))
    # The first claim's gate is closed; each place has its own cost.
    runs = [Outcome([row("gain", LOST, of=of, conditions=cifar, observed={}),
                     row("saving", [90.0] * 2, conditions=cifar)]),
            Outcome([row("gain-2", [1.0] * 2, of=of, conditions=mnist), row("saving", [10.0] * 2, conditions=mnist)]),
            Outcome([row("gain-2", [2.0] * 2, of=of, conditions=digits), row("saving", [20.0] * 2, conditions=digits)])]
    for order in (runs, runs[::-1]):
        said = bottom_line(of, order)
        assert "10.0 % less training time and 1.00 points more accuracy" in said
        assert "20.0 % less training time and 2.00 points more accuracy" in said
        assert "90" not in said
    # The first claim speaks where it was tested, whichever run was first.
    found = finding(of, [*runs, Outcome([row("gain", LOST, of=of, conditions=cifar)])])
    assert found.anchor.claim == "gain"
    assert {each.anchor.conditions["dataset"] for each in found.elsewhere} == {"mnist", "digits"}


@pytest.mark.parametrize(("machine", "name"), [
    ("NVIDIA H200; Intel(R) Xeon(R) Processor, 1 of 16 threads", "NVIDIA H200"),
    ("AMD EPYC, 2 of 2 threads", "AMD EPYC"),
])
def test_it_names_the_machine(machine, name):
    assert bottom_line(paper(), [Outcome([row("saving", SAVED, machine=machine)])]).endswith(f"3 seeds, {name}).")


def test_a_headline_that_names_no_claim_or_one_without_a_share_is_refused():
    with pytest.raises(ValueError, match="names the claim 'none', which there is not"):
        paper(accuracy="none")
    with pytest.raises(ValueError, match="accuracy 'saving' is in %, not in points"):
        paper(accuracy="saving")
    with pytest.raises(ValueError, match="time 'gain' is in points; a cost is in % or ×"):
        paper(costs={"time": "gain"})
    with pytest.raises(ValueError, match="names no claim"):
        paper(accuracy="", costs={"time": ""})


def test_a_paper_without_a_headline_counts_its_verdicts():
    without = paper().model_copy(update={"headline": None})
    assert bottom_line(without, [Outcome([row("gain", [1.0, 1.1, 1.2])])]) == "fake: 1 weaker of 1 claims."
    with pytest.raises(LayerlabError, match="has no headline"):
        finding(without, [])


def test_papers_together_say_how_many_comparisons_are_won():
    def found(above: str, placebo: str = "", profile: str = "cpu") -> Finding:
        columns = {"above it [points]": above, "above the placebo [points]": placebo}
        return finding(paper(), [Outcome([row("gain", LOST, profile)], pays(**columns))])

    better, worse, undecided = "+0.50 ± 0.40", "-0.50 ± 0.40", "+0.10 ± 0.40"
    several = [found(worse), found(undecided, better), found(undecided), None]
    assert overall(several) == (
        "Taken together: of 3 comparisons with plain training of the same cost, none shows the method to be better, "
        "1 shows it to be worse (Fake) and 2 show no measurable difference; of 1 with its placebo, 1 shows the method "
        "to be better (Fake), none shows it to be worse and none shows no measurable difference.")
    # One seed, and the profile quick, settle nothing.
    assert overall([found("+0.50"), found(better, better, "quick")]) == ""
