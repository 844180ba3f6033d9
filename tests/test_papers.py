"""Verdicts are computed, and a paper's file is checked."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from scipy import stats

from layerlab import LayerlabError, load_paper, strategies
from layerlab.contract.claims import Claim, ClaimResult, Gate
from layerlab.contract.paper import Paper, read_paper
from layerlab.contract.rows import scoreboard
from layerlab.contract.verdicts import judge
from layerlab.reporting.scoreboard import scoreboard_table

PLACE = {"statement": "a gain", "where": "Table I"}
GAIN = Claim(id="gain", value=3.0, unit="points", kind="effect", neutral=0.0, tolerance=0.5,
             conditions={"dataset": "imagenet", "epochs": 20}, **PLACE)
LOSS = Claim(id="loss", value=-0.4, unit="points", kind="at-most", tolerance=0.2, conditions={"dataset": "imagenet"},
             **PLACE)
RATIO = Claim(id="ratio", value=0.6, unit="×", kind="effect", neutral=1.0, tolerance=0.1,
              conditions={"dataset": "imagenet"}, **PLACE)
SIZE = Claim(id="size", value=1.7, unit="M", tolerance=0.01, analytic=True, **PLACE)
ACCURACY = Claim(id="accuracy", value=95.0, unit="%", tolerance=0.4, conditions={"dataset": "imagenet"}, **PLACE)
PAPER = {"dataset": "imagenet", "epochs": 20}
REDUCED = {"dataset": "digits", "epochs": 20}


@pytest.mark.parametrize(
    ("claim", "values", "conditions", "verdict"),
    [
        (GAIN, [], PAPER, "not run"),
        # Under the paper's conditions: equivalence, with the whole interval and three seeds.
        (GAIN, [2.9, 3.0, 3.1], PAPER, "reproduced"),
        (GAIN, [2.9, 3.1, 3.2], PAPER, "reproduced"),
        (GAIN, [2.6, 3.0, 3.4], PAPER, "undecided"),
        (GAIN, [1.0, 3.0, 5.0], PAPER, "undecided"),
        (GAIN, [1.0, 1.1, 1.2], PAPER, "differs"),
        (GAIN, [0.0, 0.0, 0.0], PAPER, "differs"),
        (GAIN, [3.0], PAPER, "undecided"),
        (GAIN, [3.0, 3.0], PAPER, "undecided"),
        (GAIN, [math.nan, math.nan, math.nan], PAPER, "differs"),
        (GAIN, [3.0, 3.0, math.nan], PAPER, "undecided"),
        (ACCURACY, [95.0, 95.1, 95.2], PAPER, "reproduced"),
        # At reduced scale: a direction, which never refutes.
        (GAIN, [2.0, 2.1, 2.2], REDUCED, "holds"),
        (GAIN, [9.7, 9.8, 9.9], REDUCED, "holds"),
        (GAIN, [1.3, 1.5, 1.7], REDUCED, "weaker"),
        (GAIN, [0.10, 0.11, 0.12], REDUCED, "weaker"),
        (GAIN, [0.1, 3.0, -2.0], REDUCED, "undecided"),
        (GAIN, [-1.0, -1.1, -1.2], REDUCED, "opposite"),
        (GAIN, [0.0, 0.0, 0.0], REDUCED, "opposite"),
        (GAIN, [3.0], REDUCED, "undecided"),
        (GAIN, [math.inf, math.inf, math.inf], REDUCED, "opposite"),
        (GAIN, [math.inf, 1.0, 1.0], REDUCED, "undecided"),
        # Smaller is better where the effect is below no effect.
        (RATIO, [0.70, 0.71, 0.72], REDUCED, "holds"),
        (RATIO, [0.90, 0.91, 0.92], REDUCED, "weaker"),
        (RATIO, [1.20, 1.21, 1.19], REDUCED, "opposite"),
        # A loss that is said to be small.
        (LOSS, [-0.1, 0.0, 0.1], REDUCED, "holds"),
        (LOSS, [0.5, 0.6, 0.7], PAPER, "reproduced"),
        (LOSS, [-1.59, -1.6, -1.61], REDUCED, "opposite"),
        (LOSS, [-1.59, -1.6, -1.61], PAPER, "differs"),
        (LOSS, [-0.2, -0.6, -1.0], REDUCED, "undecided"),
        # Without a direction, only the paper's conditions say something.
        (ACCURACY, [60.0, 61.0, 62.0], REDUCED, "not tested"),
        # From shapes alone: no seed changes it.
        (SIZE, [1.703], {}, "reproduced"),
        (SIZE, [1.72], {}, "differs"),
    ],
)
def test_verdicts(claim, values, conditions, verdict):
    assert judge(claim, values, conditions).verdict == verdict


def test_a_value_that_no_seed_could_change_is_no_single_seed():
    assert judge(GAIN, [2.0], REDUCED).verdict == "undecided"
    assert judge(GAIN, [2.0], REDUCED, seeded=False).verdict == "holds"


@pytest.mark.parametrize("scale", [0.01, 1.0, 250.0])
@pytest.mark.parametrize("conditions", [PAPER, REDUCED])
def test_more_of_a_spread_never_turns_undecided_into_an_answer(scale, conditions):
    answers = []
    for spread in (0.001, 0.1, 0.4, 1.0, 3.0):
        claim = GAIN.model_copy(update={"value": 3 * scale, "tolerance": 0.5 * scale})
        values = [scale * (2.8 + spread * step) for step in (-1, 0, 1)]
        answers.append(judge(claim, values, conditions).verdict)
    first = answers.index("undecided")
    assert set(answers[first:]) == {"undecided"}


def test_an_undecided_verdict_says_how_many_seeds_would_decide():
    reason = judge(GAIN, [0.1, 3.0, -2.0, 2.0], REDUCED).reason
    count = int(re.search(r"(\d+) seeds would decide", reason)[1])
    # Half-width with that many seeds: below the mean's distance to no effect; with one seed less, not.
    mean, deviation = 0.775, 2.2066
    assert stats.t.ppf(0.975, count - 1) * deviation / math.sqrt(count) < mean
    assert count > 4


def test_an_undecided_measurement_without_seeds_asks_for_rounds():
    assert re.search(r"\d+ rounds would decide", judge(GAIN, [0.1, 3.0, -2.0, 2.0], REDUCED, seeded=False).reason)


def test_too_few_test_images_are_named():
    values, conditions = [0.01, 0.02, -0.02], REDUCED | {"test_images": 1000}
    assert "test images" in judge(GAIN, values, conditions).reason


GATED = GAIN.model_copy(update={"gates": [
    Gate(observed="baseline top-1", at_least={"digits": 90.0, "imagenet": 40.0}, shows="the baseline trains"),
    Gate(observed="skipped share", at_least=20.0, shows="the method skips layers")]})


@pytest.mark.parametrize(
    ("observed", "conditions", "said"),
    [
        ({}, REDUCED, "the run recorded no baseline top-1"),
        ({"baseline top-1": 10.4, "skipped share": 50}, REDUCED, "baseline top-1 is 10.4, not at least 90"),
        ({"baseline top-1": 95, "skipped share": 0}, REDUCED, "nothing shows that the method skips layers"),
        ({"baseline top-1": 95, "skipped share": 50}, {"dataset": "mnist"}, "no bound for dataset 'mnist'"),
        ({"baseline top-1": math.nan, "skipped share": 50}, REDUCED, "recorded no baseline top-1"),
    ],
)
def test_a_run_whose_gate_is_closed_cannot_speak(observed, conditions, said):
    judged = judge(GATED, [2.0, 2.1, 2.2], conditions, observed=observed)
    assert judged.verdict == "not tested"
    assert said in judged.reason


def test_a_run_whose_gates_are_open_speaks():
    # Only what a run observed opens a gate; what it was run under does not.
    named = judge(GATED, [2.0, 2.1, 2.2], REDUCED | {"baseline top-1": 95, "skipped share": 50}, observed={})
    assert named.verdict == "not tested"
    observed = {"baseline top-1": 95, "skipped share": 50}
    assert judge(GATED, [2.0, 2.1, 2.2], REDUCED, observed=observed).verdict == "holds"


def test_a_model_s_number_is_never_called_measured():
    assert judge(GAIN, [3.0, 3.0, 3.0], PAPER, by_model=True).verdict == "by a model"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tolerance": 3.0}, "the tolerance 3 is not smaller than the effect 3"),
        ({"neutral": None}, "needs neutral"),
        ({"kind": "value"}, "which has no neutral"),
        ({"conditions": {}}, "has no conditions"),
        ({"analytic": True}, "is an accuracy, which does not follow from shapes"),
        ({"gates": [{"observed": "x", "shows": "y"}]}, "a gate needs at_least or at_most"),
    ],
)
def test_a_claim_that_could_be_met_by_nothing_is_refused(changed, said):
    with pytest.raises(ValidationError, match=said):
        Claim(**GAIN.model_dump() | changed)


def spoken(text: str) -> str:
    """A text without marks, line breaks and hyphenation, to compare words."""
    return " ".join(re.sub(r"[|*_$\\{}^]", " ", text).split()).lower()


@pytest.mark.parametrize("name", sorted(strategies))
def test_every_claim_quotes_the_paper(name):
    folder = Path(__file__).resolve().parents[2] / "shared" / "papers"
    if not folder.is_dir():
        pytest.skip("needs the papers' texts in ../shared/papers")
    texts = [spoken(file.read_text()) for file in folder.glob("*.txt")]
    for claim in load_paper(name).claims:
        if claim.quote:
            assert any(spoken(claim.quote) in text for text in texts), f"{claim.id}: {claim.quote!r} is in no paper"


def test_rows_of_an_older_version_are_judged_anew():
    old = ClaimResult(paper="lars-skip", claim="time-saving", statement="x", where="y", unit="%", paper_value=0.0,
                      measured=5.0, values=[5.0, 5.1, 4.9], seeds=[0, 1, 2], profile="cpu",
                      conditions={"dataset": "imagenette"}, verdict="holds at reduced scale")
    new = load_paper("lars-skip").judged(old)
    assert new.verdict == "not tested"
    assert new.paper_value == 7.1
    assert new.published_share == pytest.approx(5.0 / 7.1)


def test_what_a_model_computed_stays_so_when_judged_anew():
    paper = load_paper("lars-skip")
    row = paper.not_run(paper.claim("time-saving"), "cpu").model_copy(
        update={"values": [7.0, 7.1, 7.2], "seeds": [0, 1, 2], "measured": 7.1, "by_model": True}
    )
    again = ClaimResult.model_validate_json(paper.judged(row).model_dump_json())
    assert paper.judged(again).verdict == "by a model"
    assert paper.judged(again.model_copy(update={"by_model": False})).verdict == "not tested"


def test_a_paper_file_that_is_wrong_is_named(tmp_path):
    file = tmp_path / "paper.toml"
    with pytest.raises(LayerlabError, match=r"'mine' has no .*paper.toml"):
        read_paper(file, "mine")
    file.write_text("title = ")
    with pytest.raises(LayerlabError, match=r"paper.toml cannot be read"):
        read_paper(file, "mine")
    file.write_text('title = "x"\n')
    with pytest.raises(LayerlabError, match=r"setting 'authors' Field required"):
        read_paper(file, "mine")


def test_the_scoreboard_says_the_same_in_every_form():
    row = ClaimResult(paper="mine", claim="gain", statement="a gain", where="Table I", unit="points", paper_value=3.0,
                      measured=1.25, interval=0.5, values=[1.0, 1.5], seeds=[0, 1], profile="cpu",
                      conditions={"dataset": "cifar10", "network": "vgg-f"}, verdict="holds")
    missing = ClaimResult(paper="mine", claim="other", statement="another", where="Fig. 1", unit="×", paper_value=2.0,
                          profile="cpu")
    table = scoreboard_table([row, missing])
    for text in (table.text(), table.text(40), table.markdown(), table.html(), table.csv(), table.latex(), table.json(),
                 scoreboard([row, missing]).to_string()):
        flat = " ".join(text.split())
        for part in ("a gain", "3 points", "1.25 ± 0.5", "vgg-f", "another", "not run", "2 ×"):
            assert part in flat


def test_where_it_was_measured_names_seeds_or_rounds():
    row = ClaimResult(paper="mine", claim="gain", statement="a gain", where="Table I", unit="×", paper_value=3.0,
                      values=[1.0, 1.5], seeds=[0, 1], profile="cpu", verdict="differs")
    assert row.setting_text == "cpu, 2 seeds"
    assert row.model_copy(update={"seeds": []}).setting_text == "cpu, 2 rounds"
    assert row.model_copy(update={"seeds": [], "values": [1.0]}).setting_text == "cpu, no seeds"


@pytest.mark.parametrize(
    ("authors", "short"),
    [("A. Author", "Author"), ("Ada B. Author, C. Second", "Author and Second"), ("A. Author, B, C", "Author et al."),
     ("", "?")],
)
def test_a_paper_is_cited_by_its_authors(authors, short):
    paper = Paper(title="A paper", authors=authors, year=2020, venue="", summary="", formula="", notebook="", claims=[],
                  profiles={})
    assert paper.citation == f"A paper ({short}, 2020)"
