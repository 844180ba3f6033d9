"""The figure of all papers: its points are the sentences' numbers, and it can be read with many methods, one, none."""

from __future__ import annotations

import itertools
import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from test_bottom_line import LOST, SAVED, paper, pays, row

from layerlab.reporting.overview import COLUMNS, METHOD, keep_overview, overview
from layerlab.reporting.wording import EQUAL, PLACEBO
from layerlab.runs.answer import ANSWERS_FILE
from layerlab.show.looks import TONES
from layerlab.show.overview import HOW, NOTHING
from layerlab.show.overview import overview as draw

KINDS = (METHOD, EQUAL, PLACEBO)
ALIKE = [
    ("One", "time", 0.7, 0.0), ("Two", "time", 0.71, 0.01), ("Three with a name of several words", "time", 1.2, -0.01),
    ("Four", "time", 0.9, math.nan), ("Five", "time", 0.7, 0.0), ("Six", "time", 0.7, 0.0),
    ("Seven", "compute", 0.6, -5.0), ("One", "memory", 0.4, 0.0),
]


def points(rows: list[tuple[str, str, float, float]]) -> pd.DataFrame:
    methods = list(dict.fromkeys(method for method, *_ in rows))
    made = [(method, methods.index(method), cost, METHOD, x, 0.02, y, 0.3) for method, cost, x, y in rows]
    made += [(method, methods.index(method), cost, EQUAL, x, math.nan, y - 0.2, 0.2) for method, cost, x, y in rows
             if math.isfinite(y)]
    return pd.DataFrame(made, columns=list(COLUMNS))


@pytest.fixture
def runs(tmp_path):
    """A paper's run in its folder, which `outcome` reads."""
    (tmp_path / "tables").mkdir()
    table = pd.DataFrame(pays(**{"above the placebo [points]": "+0.30 ± 0.60"}))
    table.to_csv(tmp_path / "tables" / "pays.csv", index=False)
    return {tmp_path: [row("gain", LOST), row("saving", SAVED)]}


def test_the_points_are_where_the_sentence_says(runs):
    found = overview([(paper(), runs)]).set_index("kind")
    assert list(found.index) == [METHOD, EQUAL, PLACEBO]
    assert list(found["x"]) == pytest.approx([0.68] * 3)
    # What the method is above each of them.
    assert list(found["y"]) == pytest.approx([-5.0, -4.9, -5.3])
    assert list(found["y ±"]) == pytest.approx([1.24, 0.4, 0.6], abs=0.01)


def test_a_method_stands_once_for_each_dataset_that_was_tested(runs, tmp_path):
    other = {"dataset": "mnist", "network": "small"}
    runs[tmp_path / "other"] = [row(claim, [value] * 2, conditions=other)
                                for claim, value in (("gain", 2.0), ("saving", 10.0))]
    found = overview([(paper(), runs)])
    methods = found[found["kind"] == METHOD].set_index("method")
    assert dict(methods["x"]) == pytest.approx({"Fake on cifar10": 0.68, "Fake on mnist": 0.9})
    assert dict(methods["y"]) == pytest.approx({"Fake on cifar10": -5.0, "Fake on mnist": 2.0})
    assert set(found["tone"]) == {0}


def test_what_counts_for_no_verdict_has_no_point(runs):
    for marked in ({"older": True}, {"changed": {"epochs": 3}}):
        others = {folder: [each.model_copy(update=marked) for each in rows] for folder, rows in runs.items()}
        assert overview([(paper(), others)]).empty


def test_a_method_has_the_same_colour_whether_others_have_points_or_not(runs):
    alone = overview([(paper(), {}), (paper(), runs)])
    assert set(alone["tone"]) == {1}


CROWD = [(f"Method {number} with a name of several words", "time", 0.7, 0.0) for number in range(12)]
SOME = [ALIKE, ALIKE[:1], ALIKE[3:4], [ALIKE[0], ALIKE[6]], CROWD]


@pytest.mark.parametrize("rows", SOME, ids=["many", "one", "bare", "two", "crowd"])
def test_no_text_of_the_figure_covers_another_or_is_cut(rows):
    figure = draw(points(rows), KINDS, "a note")
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    for axis in figure.axes:
        shown = [*axis.texts, axis.title, axis.xaxis.label, axis.yaxis.label]
        # Not an annotation's own, which takes its line along.
        boxes = [plt.Text.get_window_extent(text, renderer) for text in shown if text.get_text()]
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)
        for box in boxes:
            assert figure.bbox.x0 <= box.x0
            assert box.x1 <= figure.bbox.x1
        # Names stand beside their panel, not above or below it.
        for text, box in zip(shown, boxes, strict=False):
            if isinstance(text, plt.Annotation):
                assert axis.bbox.y0 - 1 <= box.y0
                assert box.y1 <= axis.bbox.y1 + 1
    said = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert HOW in said
    assert sum(text.startswith("better") for text in said) == len({cost for _, cost, *_ in rows})
    plt.close(figure)


def test_intervals_end_within_their_panel():
    wide = points([("One", "time", 0.8, 0.0), ("Two", "time", 1.5, 0.5)])
    wide.loc[wide["method"] == "Two", "x ±"] = 0.6
    figure = draw(wide, KINDS)
    low, high = figure.axes[0].get_xlim()
    assert low < 0.78
    assert high > 2.1
    plt.close(figure)


def test_names_have_the_colours_of_their_points():
    figure = draw(points(ALIKE), KINDS)
    names = {text.get_text().split("\n")[0]: text.get_color() for axis in figure.axes for text in axis.texts}
    assert [names[name] for name in ("One", "Two", "Seven")] == [TONES[0], TONES[1], TONES[6]]
    plt.close(figure)


def test_with_nothing_measured_it_says_so(tmp_path):
    figure = draw(points([]), KINDS)
    assert [text.get_text() for text in figure.axes[0].texts] == [NOTHING]
    plt.close(figure)
    file = keep_overview(tmp_path, overview([]))
    assert file.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "overview.csv").read_text() == ",".join(COLUMNS) + "\n"


def test_what_comparisons_measured_is_read_beside_the_claims(tmp_path):
    (tmp_path / ANSWERS_FILE).write_text('[{"arms": [{"comparison": "small, cifar10", "arm": "fake", "seeds": 3, '
                                         '"measured": {"time": [1.5, 0.1]}}]}]')
    (found,) = overview([(paper(costs={"time": ""}), {tmp_path: [row("gain", LOST)]})]).to_dict("records")
    assert (found["cost"], found["x"], found["x ±"]) == ("time", 1.5, 0.1)
