"""What numbers of a comparison say of whether an arm pays, and the sentence that is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from torch import nn

from layerlab import Comparison, FitResult
from layerlab.reporting.answer_page import Report, answer_page, payoff_points
from layerlab.reporting.paying import headline, judge_arms
from layerlab.reporting.pays import joined
from layerlab.training.settings import Settings

PLAIN = [0.900, 0.904, 0.896, 0.902]


def result(arm: str, seed: int, top1: float, seconds: float, compute: float) -> FitResult:
    """A training of two epochs that ends level."""
    half = {"time/epoch_seconds": seconds / 2, "cost/forward_flops": compute * 5e11, "cost/backward_flops": 0.0,
            "cost/peak_memory_bytes": 1e6, "cost/bytes_moved": 1e9, "test/top5": 1.0, "train/loss": 1.0}
    rows = [{"epoch": epoch, "timestamp": epoch, "test/top1": top1, **half} for epoch in (1, 2)]
    return FitResult(nn.Identity(), rows, seed, arm, (), Settings(), round(100 * compute), chance=0.1)


def compared(arms: Mapping[str, tuple[Sequence[float], float]], equal: Sequence[str] = (),
             placebos: Sequence[str] = ()) -> Comparison:
    """A comparison of arms, each with its accuracies and its cost, as a share of the baseline's."""
    results = {(arm, seed): result(arm, seed, top1, cost, cost) for arm, (values, cost) in
               {"baseline": (PLAIN, 1.0), **arms}.items() for seed, top1 in enumerate(values)}
    return Comparison(results, {}, "baseline", {arm: f"{arm} · equal flops" for arm in equal},
                      {arm: f"{arm} · placebo" for arm in placebos})


def shifted(by: float, noise: float = 0.0) -> list[float]:
    return [top1 + by + (noise if number % 2 else -noise) for number, top1 in enumerate(PLAIN)]


CHEAP = {"mine": (shifted(0.0, 0.0005), 0.5), "mine · equal flops": (shifted(-0.03, 0.001), 0.5)}


@pytest.mark.parametrize(("arms", "equal", "word", "why"), [
    (CHEAP, ["mine"], "yes", "points above plain training of the same cost"),
    # As cheap, and plain training of the same cost is as good, or better.
    (CHEAP | {"mine · equal flops": (shifted(0.0, 0.001), 0.5)}, ["mine"], "no", "gains less than 1 point"),
    (CHEAP | {"mine · equal flops": (shifted(0.02), 0.5)}, ["mine"], "no", "less accurate than plain training"),
    (CHEAP | {"mine · equal flops": (shifted(-0.02, 0.02), 0.5)}, ["mine"], "undecided", "may or may not"),
    # It costs nothing and is better; or it is better than what it cost, but not than training as long.
    ({"mine": (shifted(0.05, 0.001), 1.0), "mine · equal flops": (PLAIN, 1.0)}, ["mine"], "yes", "above the baseline"),
    ({"mine": (shifted(0.02, 0.001), 2.0), "mine · equal flops": (shifted(0.04), 2.0)}, ["mine"], "no",
     "less accurate than plain training"),
    ({"mine": (shifted(-0.2, 0.001), 0.1), "mine · equal flops": (shifted(-0.5), 0.1)}, ["mine"], "no",
     "loses more than 1 point"),
    # Without a training of the same cost a saving proves nothing.
    ({"mine": (shifted(0.0, 0.0005), 0.5)}, [], "undecided", "was not compared with plain training of the same cost"),
])
def test_a_method_pays_where_it_beats_plain_training_of_the_same_cost(arms, equal, word, why):
    verdict = judge_arms(compared(arms, equal))
    assert verdict.arms["mine"].word == word
    assert why in verdict.arms["mine"].why
    told = headline(verdict, "net on data")
    begins = {"yes": "Yes, mine pays for net on data: ", "no": "No, mine does not pay for net on data: it ",
              "undecided": "Undecided for net on data: more seeds"}
    assert told.startswith(begins[word])


def test_a_placebo_is_never_named_as_the_answer_and_may_take_the_credit():
    weak = CHEAP | {"mine · placebo": (shifted(-0.05, 0.001), 0.5)}
    strong = CHEAP | {"mine · placebo": (shifted(0.0, 0.002), 0.5)}
    for arms, said in ((weak, "it beats its placebo"), (strong, "it is not measurably above its placebo")):
        verdict = judge_arms(compared(arms, ["mine"], ["mine"]))
        assert list(verdict.arms) == ["mine"]
        assert said in headline(verdict, "net on data")


def test_the_validation_images_decide_and_the_test_images_are_told():
    runs = compared(CHEAP, ["mine"])
    for (arm, _), each in runs.results.items():
        for row in each.history:
            # By the validation images plain training of the same cost is better.
            row["validation/top1"] = row["test/top1"] + (0.06 if arm.endswith("flops") else 0.0)
    verdict = judge_arms(runs, metric="validation/top1")
    assert verdict.arms["mine"].word == "no"
    assert "less accurate than plain training of the same cost (+3.000 ± 0.092 points)" in verdict.arms["mine"].why
    assert judge_arms(runs).arms["mine"].word == "yes"


def test_the_more_looks_the_more_a_proof_takes():
    arms = CHEAP | {"mine · equal flops": (shifted(-0.006, 0.003), 0.5)}
    runs = compared(arms, ["mine"])
    assert [judge_arms(runs, looks=looks, tolerance=0.7).arms["mine"].word for looks in (1, 20)] == ["yes", "undecided"]


def test_a_baseline_at_chance_and_one_seed_are_no_answer():
    runs = compared({"mine": ([0.1] * 4, 0.5)})
    runs.results |= {("baseline", seed): result("baseline", seed, 0.1, 1.0, 1.0) for seed in range(4)}
    assert "at chance" in headline(judge_arms(runs), "net on data")
    one = Comparison({key: each for key, each in runs.results.items() if key[1] == 0}, {}, "baseline")
    assert "one seed" in headline(judge_arms(one), "net on data")


def test_seeds_that_were_compared_one_after_the_other_are_one_comparison():
    whole = compared(CHEAP, ["mine"])
    parts = [Comparison({key: each for key, each in whole.results.items() if key[1] == seed}, {}, "baseline",
                        whole.equal) for seed in whole.seeds]
    again = joined(parts)
    assert again.seeds == whole.seeds
    assert again.pays("mine") == whole.pays("mine")
    # What has failed with the last seed is in none of the results.
    parts[-1] = Comparison({key: each for key, each in parts[-1].results.items() if key[0] == "baseline"},
                           {"mine": "it broke"}, "baseline")
    less = joined(parts)
    assert (less.arms, less.equal, less.failures) == (["baseline"], {}, {"mine": "it broke"})


def test_the_page_shows_texts_and_obeys_none():
    runs = compared(CHEAP, ["mine"])
    bad = "<script>alert(1)</script>"
    report = Report(f"net {bad}", judge_arms(runs), runs, [bad], {bad: bad}, {"rate": bad}, f"layerlab pays {bad}",
                    {"machine": bad})
    page = answer_page(report)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8
    assert list(payoff_points(runs)["kind"]) == ["strategy", "plain training of the same cost"]
    assert payoff_points(runs)["x"].tolist() == pytest.approx([0.5, 0.5])
