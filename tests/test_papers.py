"""Verdicts are computed, and a paper's file is checked."""

from __future__ import annotations

import math

import pytest

from layerlab import LayerlabError
from layerlab.contract.claims import Claim, ClaimResult
from layerlab.contract.paper import Paper, read_paper
from layerlab.contract.rows import scoreboard
from layerlab.contract.verdicts import judge
from layerlab.reporting.scoreboard import scoreboard_table

CLAIM = Claim(id="gain", statement="a gain", value=3.0, unit="points", where="Table I", neutral=0.0, tolerance=0.5,
              conditions={"dataset": "imagenet", "epochs": 20})
SAVING = Claim(id="ratio", statement="a ratio", value=0.6, unit="×", where="Table II", neutral=1.0, tolerance=0.1)
PAPER = {"dataset": "imagenet", "epochs": 20, "seeds": 3}
REDUCED = {"dataset": "digits", "epochs": 20}


@pytest.mark.parametrize(
    ("claim", "values", "conditions", "verdict"),
    [
        (CLAIM, [], PAPER, "not run"),
        (CLAIM, [2.9, 3.1, 3.2], PAPER, "reproduced"),
        (CLAIM, [1.0, 3.0, 5.0], PAPER, "differs"),
        (CLAIM, [1.0, 1.1, 1.2], PAPER, "differs"),
        (CLAIM, [4.0], PAPER, "differs"),
        (CLAIM, [1.0, 1.1, 1.2], REDUCED, "holds at reduced scale"),
        (CLAIM, [0.1], REDUCED, "holds at reduced scale"),
        (CLAIM, [3.0, 3.0, 3.0], REDUCED, "holds at reduced scale"),
        (CLAIM, [0.1, 3.0, -2.0], REDUCED, "differs"),
        (CLAIM, [-1.0], REDUCED, "differs"),
        (CLAIM, [0.0], REDUCED, "differs"),
        (CLAIM, [3.0, math.nan], PAPER, "differs"),
        (CLAIM, [math.inf], REDUCED, "differs"),
        (SAVING, [0.9, 0.91, 0.89], REDUCED, "holds at reduced scale"),
        (SAVING, [1.2, 1.21, 1.19], REDUCED, "differs"),
        (SAVING.model_copy(update={"analytic": True}), [0.65], {}, "reproduced"),
        (SAVING.model_copy(update={"analytic": True}), [0.75], {}, "differs"),
        (SAVING.model_copy(update={"neutral": None}), [0.6], REDUCED, "differs"),
    ],
)
def test_verdicts(claim, values, conditions, verdict):
    assert judge(claim, values, conditions)[0] == verdict


@pytest.mark.parametrize(
    ("values", "conditions", "reason"),
    [
        ([1.0, 3.0, 5.0], PAPER, "undecided: the interval has values within 0.5 points and others"),
        ([2.0, 4.0, 6.0], PAPER, "undecided: the interval has values within 0.5 points and others"),
        ([5.0, 5.1, 5.2], PAPER, "off by +2.1 points"),
        ([4.0], PAPER, "off by +1 points"),
        ([0.1, 3.0, -2.0], REDUCED, "undecided: the interval includes no effect"),
        ([-0.1, -3.0, 2.0], REDUCED, "undecided: the interval includes no effect"),
        ([-1.0, -1.1, -1.2], REDUCED, "other direction"),
        ([-1.0], REDUCED, "other direction"),
        ([0.0, 0.0], REDUCED, "no effect"),
    ],
)
def test_what_an_interval_leaves_open_is_not_said_to_be_otherwise(values, conditions, reason):
    assert judge(CLAIM, values, conditions) == ("differs", reason)


def test_a_value_that_no_seed_could_change_is_not_called_one_seed():
    assert judge(CLAIM, [1.0], REDUCED) == ("holds at reduced scale", "one seed")
    assert judge(CLAIM, [1.0], REDUCED, seeded=False) == ("holds at reduced scale", "same direction")


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
                      conditions={"dataset": "cifar10", "network": "vgg-f"}, verdict="holds at reduced scale")
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
