"""How results show themselves, in a terminal and in a notebook."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from typing import ClassVar

import click
import mistune
import pandas as pd
import pytest
from click.testing import CliRunner
from pydantic import Field

from layerlab import LayerlabError, Strategy, Table, compare, fit, load_dataset, load_paper, scoreboard
from layerlab.cli.main import main
from layerlab.contract.claims import ClaimResult
from layerlab.contract.registry import Plugin, Registry
from layerlab.reporting.pages import run_part
from layerlab.show.interval import scale, spread
from layerlab.show.table import Cell
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


ROWS = [["one", "9.10", "a short text"], ["another", "10.25 ± 0.10", "word " * 30],
        ["third", "left out: " + "reason " * 20]]
TABLE = Table(["arm", "top-1 [%]", "why"], ROWS, "A caption.", ["A note."])
# What each form would obey if it were not escaped.
HOSTILE = "a|b <script>x</script> *c* `d` &lt; $5 #1 100% _e_ {f} [g](h) ~~i~~ back\\slash \x1b[31mred\x9b0m\u202e\a"
SHOWN = HOSTILE.translate({0x1b: "\\x1b", 0x9b: "\\x9b", 0x202e: "\\u202e", 7: "\\x07"})


def test_a_table_is_aligned_and_keeps_to_the_width():
    lines = TABLE.text(60).splitlines()
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
    assert str(TABLE) == repr(TABLE) == TABLE.text()


@pytest.mark.parametrize("width", [24, 40, 80, 160])
def test_at_any_width_each_word_is_there_and_no_line_is_longer(width):
    text = TABLE.text(width)
    assert max(map(len, text.splitlines())) <= width
    assert text.split().count("word") == 30
    assert text.split().count("reason") == 20
    for part in ("A caption.", "top-1", "10.25 ± 0.10", "A note."):
        assert part in text, part
    assert not any(line != line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("width", range(40, 90, 7))
def test_no_line_ends_within_a_number_wherever_it_stands(width):
    numbers = ["0.5563 ± 0.0025 ×", "−1.12 ± 0.82 points", "44.4 ± 0.2 %"]
    rows = [["it is smaller than before", f"cpu, 3 seeds: {number}"] for number in numbers]
    table = Table(["claim", "measured"], rows)
    lines = table.text(width).splitlines()
    assert max(map(len, lines)) <= width
    for number in numbers:
        assert any(number in line for line in lines)


def test_where_columns_have_no_room_side_by_side_each_value_stands_behind_its_heading():
    table = Table(["name", "path", "note"], [["one", "/a/long/path/to/something", ""], ["two", "/another", "a note"],
                                             ["three", "left out"]])
    assert table.text(40).splitlines() == [
        "name   path                       note", "one    /a/long/path/to/something",
        "two    /another                   a note", "three  left out"]
    assert table.text(34).splitlines() == [
        "name  one", "path  /a/long/path/to/something", "", "name  two", "path  /another", "note  a note", "",
        "name  three", "      left out"]


def test_rows_stand_apart_where_the_first_column_takes_several_lines():
    rows = [["several words of a claim", "1"], ["other words of another one", "2"]]
    assert "" not in Table(["claim", "value"], rows).text(60).splitlines()
    assert Table(["claim", "value"], rows).text(20).splitlines() == [
        "claim          value", "several words      1", "of a claim", "", "other words        2", "of another", "one"]


def test_a_word_without_room_in_a_single_column_is_broken():
    assert Table(["page"], [["x" * 50], ["y"]]).text(40).splitlines() == ["page", "x" * 40, "x" * 10, "y"]


def test_wide_characters_count_as_the_columns_that_they_take():
    lines = Table(["name", "n"], [["層ごと", "1"], ["b", "22"]]).text(40).splitlines()
    assert lines == ["name     n", "層ごと   1", "b       22"]


def test_colours_are_there_when_asked_for_and_never_otherwise():
    table = Table(["claim", "verdict"], [["gain", Cell("holds", "good")]])
    assert "\x1b" not in table.text(80)
    coloured = table.text(80, colour=True)
    assert "\x1b[32mholds\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d*m", "", coloured) == table.text(80)
    assert "background-color" in table.html()


def test_a_command_prints_no_colours_into_a_pipe():
    assert "\x1b" not in CliRunner().invoke(main, ["data"], color=False).output
    assert "\x1b" in CliRunner().invoke(main, ["data"], color=True).output


def test_every_form_has_every_cell():
    for text in (TABLE.text(80), TABLE.markdown(), TABLE.html(), TABLE.csv(), TABLE.latex(), TABLE.json()):
        for part in ("arm", "top-1", "10.25 ± 0.10", "a short text", "left out: reason reason"):
            assert part in text, (part, text)
        assert not text.endswith("\n")
    for text in (TABLE.text(80), TABLE.markdown(), TABLE.html(), TABLE.latex(), TABLE.json()):
        assert "A caption." in text
        assert "A note." in text
    assert TABLE._repr_html_() == TABLE.html()


def test_csv_and_json_are_read_back():
    assert list(csv.reader(io.StringIO(TABLE.csv()))) == [
        list(TABLE.header), ROWS[0], [*ROWS[1][:2], ROWS[1][2].strip()], ["third", ROWS[2][1].strip(), ""]]
    content = json.loads(TABLE.json())
    assert content["columns"] == list(TABLE.header)
    assert content["rows"][2] == ["third", ROWS[2][1].strip()]
    assert (content["caption"], content["notes"]) == ("A caption.", ["A note."])


def test_a_cell_that_spans_columns_does_so_in_each_form():
    assert '<td colspan="2" style="text-align: left' in TABLE.html()
    assert r"third & \multicolumn{2}{l}{left out: reason" in TABLE.latex()
    (line,) = [line for line in TABLE.markdown().splitlines() if line.startswith("| third")]
    assert line.endswith("reason |  |")


def test_numbers_are_aligned_at_the_right_in_each_form():
    table = Table(["arm", "top-1 [%]", "note"], [["one", "9.10", ""], ["two", "—", ""]])
    assert table.text(80).splitlines()[1:] == ["one       9.10", "two          —"]
    assert "| --- | ---: | --- |" in table.markdown()
    assert r"\begin{tabular}{lrl}" in table.latex()
    assert '<td style="text-align: right; vertical-align: top">9.10</td>' in table.html()


@pytest.mark.parametrize("where", ["cell", "heading", "caption", "note"])
def test_each_form_shows_a_text_and_obeys_none_of_it(where):
    table = {
        "cell": Table(["a", "b"], [[HOSTILE, ""]]), "heading": Table([HOSTILE, "b"], [["1", "2"]]),
        "caption": Table(["a", "b"], [["1", "2"]], HOSTILE), "note": Table(["a", "b"], [["1", "2"]], "", [HOSTILE]),
    }[where]
    for text in (table.text(200), table.text(200, colour=True), table.markdown(), table.html(), table.csv(),
                 table.latex(), table.json()):
        assert not set(text) & {"\x9b", "\u202e", "\a"}
        assert "\x1b[31m" not in text
    assert SHOWN in table.text(200)
    assert html.escape(SHOWN) in table.html()
    assert "<script>" not in table.html()
    if where in ("cell", "heading"):
        assert any(SHOWN in row for row in csv.reader(io.StringIO(table.csv())))
    found = json.loads(table.json())
    assert SHOWN in (*found["columns"], *found["rows"][0], found["caption"], *found["notes"])


def test_a_scoreboard_obeys_no_text_of_a_run(fake, tmp_path):
    """Every text of a row that somebody sent, in every form, and in the page that is published of it."""
    fake()
    row = ClaimResult(
        paper="fake", claim="gain", statement=HOSTILE, where=HOSTILE, unit=HOSTILE, paper_value=1.0, measured=1.0,
        values=[1.0], seeds=[0], profile="cpu", conditions={"dataset": HOSTILE, "network": HOSTILE}, machine=HOSTILE,
        versions={HOSTILE: HOSTILE}, commit=HOSTILE, verdict="holds", reason=HOSTILE, mlflow_run=HOSTILE)
    folder = tmp_path / "cpu"
    folder.mkdir()
    (folder / "parameters.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (folder / "manifest.json").write_text("[]")
    page = "\n\n".join(run_part(folder, load_paper("fake"), "cpu", [row]))
    read = mistune.create_markdown(plugins=["table", "strikethrough"])
    found = scoreboard.Collected(load_paper("fake"), [row], HOSTILE)
    pages = [scoreboard.page([found]), read(page.replace("<details>", "")),
             *(read(table([row]).markdown()) for table in (scoreboard.scoreboard_table, scoreboard.run_table))]
    # The page has scripts of its own, which hold its texts, too.
    assert re.sub(r"(?s)<script[^>]*>.*?</script>", "", pages[0]).count("<script") == 0
    assert "<script>x" not in pages[0]
    assert not any("<script" in shown for shown in pages[1:])
    for shown in (*pages, scoreboard.scoreboard_table([row]).text(200, colour=True)):
        assert not set(shown) & {"\x9b", "\u202e", "\a"}
        assert "\x1b[31mred" not in shown


def test_a_sentence_on_the_screen_obeys_nothing_of_what_it_quotes(tmp_path):
    (tmp_path / "claims.json").write_text(json.dumps([{"paper": "\x1b[2J\x9b31m/x"}]))
    for name in ("import", "publish"):
        place = tmp_path / ("claims.json" if name == "import" else "")
        result = CliRunner().invoke(main, [name, str(place)], color=True)
        assert result.exit_code == 2
        assert "x1b[2J" in result.output
        assert not {"\x9b", "\x1b"} & set(click.unstyle(result.output))


def test_markdown_reads_as_the_text():
    """Through the reader of Jupyter, which knows GitHub's tables."""
    read = mistune.create_markdown(plugins=["table", "strikethrough"])
    (cell,) = re.findall(r"<td>(.*)</td>", read(Table(["a"], [[HOSTILE]]).markdown()))
    assert html.unescape(cell) == SHOWN


def test_latex_has_no_character_that_it_would_obey():
    (line,) = [line for line in Table(["a", "b"], [[HOSTILE, "x"]]).latex().splitlines() if line.endswith(r" & x \\")]
    rest = re.sub(r"\\(text\w+\{\}|[&%$#_{}])", "", line.removesuffix(r" & x \\"))
    assert not set(rest) & set("&%$#_{}~^\\")


def test_a_link_leads_somewhere_in_markdown_and_html():
    table = Table(["run"], [[Cell("a & b", link="http://here/?a=1&b=2")]])
    assert "[a & b](http://here/?a=1&b=2)" in table.markdown()
    assert '<a href="http://here/?a=1&amp;b=2">a &amp; b</a>' in table.html()
    assert table.csv().splitlines() == ["run", "a & b"]


def test_a_table_without_rows_is_its_heading_in_each_form():
    table = Table(["a", "b"], [])
    assert table.text(80) == "a  b"
    assert table.markdown() == "| a | b |\n| --- | --- |"
    assert table.csv() == "a,b"
    assert json.loads(table.json())["rows"] == []
    assert "<tbody></tbody>" in table.html()
    assert r"a & b \\" in table.latex()


def test_a_row_that_does_not_fit_the_heading_is_named():
    for rows in ([["1"], ["1", "2", "3"]], [["1"], []]):
        with pytest.raises(LayerlabError, match=r"Row 2 of a table has (3|0) cells under 2 headings"):
            Table(["a", "b"], rows)


def test_a_pandas_table_shows_four_digits_and_nothing_for_what_is_missing():
    frame = pd.DataFrame({"name": ["x", None], "value": [0.123456, math.nan], "count": [123456, 2]})
    assert list(csv.reader(io.StringIO(Table.from_frame(frame).csv()))) == [
        ["name", "value", "count"], ["x", "0.1235", "123456"], ["", "", "2"]]


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
