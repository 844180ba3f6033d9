"""How results show themselves, in a terminal and in a notebook."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
from pydantic import Field

from layerlab import Strategy, compare, fit, load_dataset, load_paper
from layerlab.contract.registry import Plugin, Registry
from layerlab.show.interval import scale, spread
from layerlab.show.table import Table
from layerlab.training.results import EPOCHS


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (97.2143, 0.4021, "97.21 ± 0.40"), (97.2143, 12.3, "97 ± 12"), (0.70512, 0.0413, "0.705 ± 0.041"),
        (97.2143, math.nan, "97.21"), (1.0, 0.0, "1.000"), (31430.4, math.nan, "31,430"), (math.nan, math.nan, "—"),
        (-2.13, 4.0, "-2.1 ± 4.0"), (1234.0, math.nan, "1,234"),
    ],
)
def test_numbers_have_the_digits_that_their_interval_allows(mean, half, text):
    assert spread(mean, half) == text


def test_a_column_gets_the_unit_that_makes_its_largest_number_readable():
    assert scale([2.5e10, 1e9], "FLOP") == (1e-9, "GFLOP")
    assert scale([math.nan, 999.0], "B") == (1.0, "B")
    assert scale([], "B") == (1.0, "B")


def test_a_table_is_aligned_and_keeps_to_the_width():
    rows = [["one", "9.10", "a short text"], ["another", "10.25 ± 0.10", "word " * 30],
            ["third", "left out: " + "reason " * 20]]
    table = Table(["arm", "top-1 [%]", "why"], rows, "A caption.", ["A note."])
    lines = table.text(60).splitlines()
    assert lines[0] == "A caption."
    assert lines[-1] == "A note."
    assert max(map(len, lines)) <= 60
    # Numbers end where their heading ends; words begin where theirs does.
    (one,) = [line for line in lines if line.startswith("one")]
    assert one.index("9.10") + 4 == lines[1].index("top-1 [%]") + len("top-1 [%]")
    assert one.index("a short text") == lines[1].index("why")
    # The last cell of a shorter row has the rest to itself.
    (third,) = [line for line in lines if line.startswith("third")]
    assert len(third) > 50
    assert "colspan" in table._repr_html_()
    assert str(table) == table.text()


def test_html_escapes_what_others_write():
    shown = Table(["a"], [["<script>"]], "<b>", ["<i>"])._repr_html_()
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "&lt;script&gt;" in shown


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=128, test_limit=50, device="cpu")


QUICK = dict(batch_size=64, progress=False)


def test_a_fit_shows_its_epochs_or_every_so_many_th(data, residual):
    result = fit(residual, data, epochs=2, **QUICK)
    lines = str(result).splitlines()
    assert lines[0] == repr(result)
    assert "top-1 [%]" in lines[1]
    assert "time [s]" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["1", "2"]
    assert f"{100 * result.final['test/top1']:.2f}" in lines[-1]
    result.history = [{**result.final, "epoch": epoch} for epoch in range(1, 101)]
    shown = [int(line.split()[0]) for line in str(result).splitlines()[2:]]
    assert (shown[0], shown[-1]) == (1, 100)
    assert len(shown) <= EPOCHS + 1
    assert "<table>" in result._repr_html_()


def test_a_comparison_shows_intervals_with_units_and_says_what_one_seed_is_worth(data, residual):
    runs = compare(residual, data, {"plain": (), "again": ()}, seeds=[0, 1], epochs=2, **QUICK)
    text = repr(runs)
    assert "2 epochs, 2 seeds: mean ± 95 % interval" in text
    for heading in ("top-1 [%]", "time [s]", "compute [MFLOP]", "moved [MB]", "peak memory [MB]"):
        assert heading in text
    (row,) = [line for line in text.splitlines() if line.startswith("plain")]
    top1 = runs.summary.set_index("arm").loc["plain"]
    assert spread(100 * top1["top-1"], 100 * top1["top-1 ±"]) in row
    shown = runs._repr_html_()
    assert "data:image/png;base64," in shown
    assert "one seed, which says nothing" in repr(compare(residual, data, {"plain": ()}, epochs=1, **QUICK))


def test_a_comparison_shows_who_was_left_out_and_why(data, residual):
    class Broken(Strategy):
        name: ClassVar[str] = "broken"

        def on_epoch_start(self, run) -> None:
            raise ValueError("no <good>")

    runs = compare(residual, data, {"plain": (), "bad": Broken()}, epochs=1, keep_going=["bad"], **QUICK)
    assert "left out: ValueError: no <good>" in repr(runs)
    assert "left out: ValueError: no &lt;good&gt;" in runs._repr_html_()


class Documented(Strategy):
    name: ClassVar[str] = "documented"
    strength: float = Field(0.5, ge=0)
    """How strong it is."""


def test_a_strategy_shows_its_settings(data):
    shown = Documented(strength=0.25)._repr_html_()
    for part in ("documented", "strength", "0.25", "How strong it is."):
        assert part in shown


def test_a_dataset_shows_its_size_and_a_picture_of_each_class(data, tmp_path):
    shown = data._repr_html_()
    for part in ("128", "8 × 8 pixels, 1 channel", "scikit-learn", "data:image/png;base64,"):
        assert part in shown
    strip = data.samples()
    # Ten digits of eight pixels with a margin, enlarged to 64 pixels or more.
    assert strip.size == (10 * 10 * 8, 8 * 8)
    streamed = load_dataset("digits", limit=16, device="cpu", channels=3).samples(2)
    assert streamed.mode == "RGB"


def test_the_registry_shows_what_is_installed_and_what_is_broken():
    registry = Registry([Plugin("lars-skip", "layerlab_lars_skip:LarsSkip", "layerlab-lars-skip", "0.1.0"),
                         Plugin("gone", "no_such_module:Gone", "their-plugin", "1.2")])
    text = repr(registry)
    assert "lars-skip" in text
    assert "their-plugin 1.2" in text
    assert "broken: ModuleNotFoundError" in text
    assert "broken: ModuleNotFoundError" in registry._repr_html_()


def test_a_paper_shows_its_claims():
    paper = load_paper("lars-skip")
    for text in (str(paper), paper._repr_html_()):
        assert paper.title.split(":")[0][:20] in text
        assert paper.claims[0].id in text


def test_an_error_that_a_user_can_mend_is_one_line_in_a_notebook(capsys):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell("from layerlab import load_dataset\nload_dataset('no-such-data')")
    shown = capsys.readouterr().out.strip()
    assert shown.startswith("LayerlabError: Unknown dataset 'no-such-data'.")
    assert len(shown.splitlines()) == 1
