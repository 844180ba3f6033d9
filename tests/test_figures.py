"""Figures: every one of every notebook can be read, and what is written at an axis is what is drawn there."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drawn_figures
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, PercentFormatter

from layerlab import LayerlabError, Session, figures
from layerlab.testing import check_figure

ROOT = Path(__file__).parents[1]
PLACES = drawn_figures.places()
DRAWN = [(place, name) for place, make in PLACES.items() for name in make()]
# Functions of figures that give no figure of a notebook: they prepare one.
PARTS = {"canvas", "panels"}


@pytest.fixture(autouse=True)
def _closed() -> Any:
    yield
    plt.close("all")


@pytest.mark.parametrize(("place", "name"), DRAWN)
def test_every_figure_can_be_read(place, name):
    assert check_figure(drawn_figures.drawn(place, name)) == []


def drawing_functions(module: Any) -> set[str]:
    return {name for name, function in inspect.getmembers(module, inspect.isfunction)
            if not name.startswith("_") and inspect.signature(function).return_annotation in ("Figure", Figure)}


def test_no_function_that_draws_is_left_out():
    packages = sorted(ROOT.glob("plugins/*/layerlab_*/pictures.py"))
    for file in packages:
        module = importlib.import_module(f"{file.parent.name}.pictures")
        plugin = file.parents[1].name
        assert drawing_functions(module) == set(PLACES[plugin]()), plugin
    assert drawing_functions(figures) - PARTS == set(PLACES["core"]())


def test_every_figure_that_a_notebook_keeps_comes_from_such_a_function():
    wrong = []
    for file in sorted(ROOT.glob("notebooks/*.ipynb")):
        known = set(PLACES["core"]()) | set(PLACES.get(file.stem, dict)())
        for cell in json.loads(file.read_text())["cells"]:
            source = re.sub(r"^\s*[%!].*$", "pass", "".join(cell["source"]), flags=re.M)
            for node in ast.walk(ast.parse(source)) if cell["cell_type"] == "code" else ():
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "figure":
                    drawn = ast.unparse(node.args[1])
                    if not any(drawn.startswith((f"figures.{name}(", f"pictures.{name}(")) for name in known):
                        wrong.append(f"{file.name}: {drawn}")
    assert wrong == []


def one_panel(**settings: Any) -> tuple[Figure, Any]:
    figure, ((axis,),) = figures.canvas()
    axis.plot([0, 0.2, 0.4], [0.96, 0.97, 0.99])
    axis.set(**{"xlabel": "x", "ylabel": "y"} | settings)
    return figure, axis


def hide_the_step(axis: Any) -> None:
    axis.yaxis.set_major_locator(FixedLocator([0.960, 0.965, 0.970, 0.975]))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def lie(axis: Any) -> None:
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value + 0.01:.2f}"))


def two_alike(axis: Any) -> None:
    axis.lines[0].set_label("one")
    axis.plot([0, 0.2, 0.4], [0.9, 0.9, 0.9], label="two")


def repeat_a_formula(axis: Any) -> None:
    axis.yaxis.set_major_locator(FixedLocator([0.96, 0.97, 0.98]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda *_: "$10^{-2}$"))


def legend_on_data(axis: Any) -> None:
    axis.lines[0].set_label("a long name")
    axis.legend(loc="center")


def same_entries(axis: Any) -> None:
    figures.legend_below(axis.figure, [axis.lines[0], axis.lines[0]], ["one", "two"])


FAULTS: dict[str, Callable[[Any], Any]] = {
    r"'0.21' stands at 0.2 of the x axis": lie,
    "'96%' stands at 2 ticks of the y axis": hide_the_step,
    "'98%' stands at 0.975 of the y axis": hide_the_step,
    r"10\^\{-2\}\$' stands at 3 ticks of the y axis": repeat_a_formula,
    "overlap": lambda axis: (axis.text(0.2, 0.985, "one text"), axis.text(0.21, 0.985, "another text")),
    "is cut by the edge": lambda axis: axis.annotate("beyond", (1.05, 0.5), xycoords="figure fraction"),
    "'inside' is cut": lambda axis: axis.text(0.4, 0.98, "inside", clip_on=True),
    "A line crosses 'here'": lambda axis: axis.text(0.19, 0.969, "here"),
    "A line crosses the legend": legend_on_data,
    "pixels high in a column": lambda axis: axis.text(0.0, 0.985, "tiny", fontsize=3),
    "has no label": lambda axis: axis.set_xlabel(""),
    "is longer than the y axis": lambda axis: axis.set_ylabel("what a method needs a line and a half to say of it"),
    "stands apart from the numbers": lambda axis: (axis.set_ylim(1e9, 3e9), axis.ticklabel_format(useOffset=True,
                                                                                               scilimits=(0, 0))),
    "differ by colour alone": two_alike,
    "look the same in the legend": same_entries,
}


@pytest.mark.parametrize("said", FAULTS)
def test_what_makes_a_figure_unreadable_is_found(said):
    figure, axis = one_panel()
    assert check_figure(figure) == []
    FAULTS[said](axis)
    assert any(re.search(said, fault) for fault in check_figure(figure)), check_figure(figure)


@pytest.mark.parametrize("rotation", [30, 45, 90])
def test_names_beside_each_other_may_slant(rotation):
    figure, ((axis,),) = figures.canvas()
    axis.bar(range(8), range(8))
    axis.set_xticks(range(8), [f"a long name {number}" for number in range(8)], rotation=rotation)
    axis.set_ylabel("y")
    assert check_figure(figure) == []


@pytest.mark.parametrize("asked", [False, True])
def test_a_session_refuses_a_figure_that_cannot_be_read_where_tests_ask_for_it(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("LAYERLAB_CHECK_FIGURES", "1" if asked else "")
    session = Session("figures", "a try", tmp_path / "out", {})
    figure, _ = one_panel(xlabel="")
    if asked:
        with pytest.raises(LayerlabError, match="figure 'mine' cannot be read: The x axis of panel 1 has no label"):
            session.figure("mine", figure)
    else:
        session.figure("mine", figure)
    session.close()
    assert (tmp_path / "out" / "figures" / "mine.png").exists() == (not asked)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.31, 0.47), (0.9, 0.93), (0.981, 0.9865), (0.99, 0.991)])
@pytest.mark.parametrize("kind", ["curves", "grouped_bars", "tradeoff"])
def test_each_label_of_a_share_says_its_tick_s_value_and_none_repeats(kind, low, high):
    shares = [low + (high - low) * step / 5 for step in range(6)]
    if kind == "curves":
        frame = pd.DataFrame({"arm": "a", "seed": 0, "epoch": range(1, 7), "seconds": range(1, 7), "test/top1": shares})
        drawn = figures.curves(frame, "test/top1")
        axes = [drawn.axes[0].yaxis]
    elif kind == "grouped_bars":
        frame = pd.DataFrame({"x": range(6), "y": shares, "hue": "a"})
        drawn = figures.grouped_bars(frame, "x", "y", "hue", "share", percent=True)
        axes = [drawn.axes[0].yaxis]
    else:
        frame = pd.DataFrame({"x": shares, "y": shares, "name": list("abcdef"), "panel": "p"})
        drawn = figures.tradeoff(frame, "x", "y", "name", "panel", "cost", "share")
        axes = [drawn.axes[0].xaxis, drawn.axes[0].yaxis]
    drawn.canvas.draw()
    for axis in axes:
        texts = [label.get_text() for label in axis.get_ticklabels()]
        assert len(set(texts)) == len(texts)
        for place, text in zip(axis.get_ticklocs(), texts, strict=True):
            assert float(text.rstrip("%").replace("−", "-")) == pytest.approx(100 * place, abs=1e-6)


@pytest.mark.parametrize(("low", "high"), [(60e3, 130e3), (2.4, 3.1), (650, 1.2e6), (0.003, 40), (0.97, 1.04)])
def test_a_logarithmic_axis_has_ticks_with_their_numbers(low, high):
    figure, ((axis,),) = figures.canvas()
    axis.plot(np.geomspace(low, high, 5), range(5))
    axis.set(xlabel="x", ylabel="y")
    figures.ticks.logarithmic(axis.xaxis, letters=True)
    assert check_figure(figure) == []
    shown = [place for place in axis.get_xticks() if low <= place <= high]
    assert 2 <= len(shown) <= 9


def test_curves_show_time_as_a_multiple_of_the_first_arm_s_under_the_same_seed():
    # In seed 1 the machine is ten times as slow from the third epoch on; `half` takes half of an epoch, and half as
    # many again; `alone` took no turns.
    seconds = {("plain", 0): [1, 2, 3, 4], ("plain", 1): [1, 2, 12, 22],
               ("half", 0): [0.5, 1, 1.5, 2, 2.5, 3], ("half", 1): [0.5, 1, 6, 11, 16.5, 22],
               ("alone", 0): [math.nan] * 4, ("alone", 1): [math.nan] * 4}
    frame = pd.concat([
        pd.DataFrame({"arm": arm, "seed": seed, "epoch": range(1, len(each) + 1), "seconds": each, "test/top1": 0.5})
        for (arm, seed), each in seconds.items()])
    axis = figures.curves(frame, "test/top1").axes[1]
    assert axis.get_xlabel() == "training time, in epochs of plain"
    lines = [line.get_xdata() for line in axis.lines]
    half = [0.5, 1, 1.5, 2, 2.5, 3]
    wanted = [[1, 2, 3, 4]] * 3 + [half, [0.5, 1, 1.5, 2, 3, 4], [0.5, 1, 1.5, 2, 2.75, 3.5]] + [[math.nan] * 4] * 3
    for drawn, each in zip(lines, wanted, strict=True):
        np.testing.assert_allclose(drawn, each)


def test_curves_of_panels_have_their_own_ranges_and_one_legend():
    low = drawn_figures.learning(["conventional", "mine"], 4).assign(panel="small")
    high = low[low["arm"] == "mine"].assign(panel="large", **{"test/top1": 0.99})
    figure = figures.curves(pd.concat([low, high]), "test/top1")
    large, small = figure.axes
    assert [axis.get_title() for axis in (large, small)] == ["large", "small"]
    assert large.get_ylim()[0] > small.get_ylim()[1]
    assert {axis.get_xlabel() for axis in (large, small)} == {"epoch"}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["mine", "conventional"]


def test_an_arm_looks_the_same_in_every_figure_and_whatever_else_is_drawn():
    frame = drawn_figures.learning(["conventional", "mine", "mine · equal flops", "mine · placebo", "other"], 4)
    def colours(part: pd.DataFrame) -> dict[str, Any]:
        lines = figures.curves(part, "test/top1").axes[0].lines
        return {str(line.get_label()): (line.get_color(), line.get_marker()) for line in lines
                if not str(line.get_label()).startswith("_")}
    whole = colours(frame)
    assert len(set(whole.values())) == 5
    for arms in (["other", "mine"], ["mine · placebo", "conventional"]):
        assert colours(frame[frame["arm"].isin(arms)]) == {arm: whole[arm] for arm in arms}
    points = figures.side_by_side(frame.rename(columns={"test/top1": "top-1"}), {"top-1": "top-1"}).axes[0].lines
    assert whole["mine"][0] in [line.get_color() for line in points]


def test_plain_training_is_grey_in_every_notebook():
    from layerlab.show.looks import PLAIN

    for plugin, arm in (("lars-skip", "conventional"), ("low-bit", "float32"), ("comm-overlap", "no overlap"),
                        ("learn-and-drop", "plain"), ("network-with-subnetworks", "ref-model2"),
                        ("adaptive-pruning", "conventional"), ("memory-reorder", "plain PyTorch")):
        drawn_figures.pictures_of(plugin)
        assert figures.look(arm).colour == PLAIN, arm
    assert figures.look("baseline").colour == PLAIN


def test_a_pruned_network_is_held_against_the_conventional_one_of_the_same_epoch():
    # Both lose five points at every stage, though accuracies rise.
    rows = [{"arm": arm, "seed": 0, "stage": stage, "epoch": 4 * stage + 4, "top-1": 0.5 + 0.1 * stage - lost,
             "parameters": 1e5 * (1 if arm == "conventional" else 1 - 0.2 * stage), "batch 1 [ms]": 2.0 + stage}
            for arm, lost in (("conventional", 0.0), ("adaptive pruning", 0.05)) for stage in range(3)]
    figure = drawn_figures.pictures_of("adaptive-pruning").choices(
        pd.DataFrame(rows), ["dense", "80% left", "60% left"], [1])
    heights = [height for line in figure.axes[0].lines for height in np.atleast_1d(line.get_ydata())]
    assert set(np.round(heights, 6)) == {0.0, -5.0}
    assert "80% left, after 8 epochs" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_nothing_has_no_bar_on_a_logarithmic_axis():
    figure = drawn_figures.drawn("low-bit", "rates_figure")
    for axis in figure.axes:
        for bar, number in zip(axis.patches, axis.texts, strict=True):
            assert (bar.get_height() <= axis.get_ylim()[0]) == (number.get_text() == "0")


def test_the_layer_nearest_the_input_is_at_the_bottom():
    table = drawn_figures.layers(5, 3)
    figure = figures.layer_epoch_map({"a run": table}, "score")
    axis = figure.axes[0]
    names = dict(zip([label.get_text() for label in axis.get_yticklabels()], axis.get_yticks(), strict=True))
    assert names[table.index[0]] < names[table.index[-1]]
    assert axis.get_ylim()[0] < axis.get_ylim()[1]
    assert axis.collections[0].get_array().data == pytest.approx(table.to_numpy())
