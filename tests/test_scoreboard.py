"""The scoreboard in one line a claim, and pages that show nothing twice and every number in a unit that can be read."""

from __future__ import annotations

import io
import json
import re

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_bottom_line import paper, row

from layerlab.contract.claims import ClaimResult
from layerlab.contract.paper import PublishedTable
from layerlab.contract.rows import completed
from layerlab.reporting.claim_lines import claim_lines
from layerlab.reporting.pages import run_part
from layerlab.reporting.readable import papers_alone, readable
from layerlab.reporting.scoreboard import BRIEF, Collected, board, claims_table, page, wrapped
from layerlab.show.stamp import same_picture, stamped

CPU, OTHER = {"dataset": "cifar10", "network": "small"}, {"dataset": "mnist", "network": "small"}


@pytest.fixture
def rows() -> list[ClaimResult]:
    """A claim that two datasets and a run with other parameters measured, one that a model computed, two not run."""
    modelled = row("saving", [50.0, 50.0]).model_copy(update={"verdict": "by a model", "by_model": True})
    older = row("gain", [9.0, 9.1, 9.2], "quick", older=True)
    return completed(paper(), [row("gain", [2.9, 3.0, 3.1], conditions=CPU),
                               row("gain", [0.3, 0.4, 0.5], conditions=OTHER), older, modelled])


def test_a_claim_is_one_line_with_its_runs_beside_each_other(rows):
    gain, saving, faster, share = claim_lines(rows)
    assert gain.measured == ("cpu cifar10, 3 seeds: 3.00 ± 0.25 points; cpu mnist, 3 seeds: 0.40 ± 0.25 points; "
                             "[quick, made by older code, 3 seeds: 9.10 ± 0.25 points]")
    assert gain.share == "1; 0.13"
    assert gain.verdict == "holds (cpu cifar10), weaker (cpu mnist)"
    assert [line.state for line in (gain, saving, faster, share)] == ["settled", "by a model", "open", "open"]
    assert (faster.measured, faster.verdict, saving.measured) == ("—", "not run", "cpu, 2 seeds: 50 %")


def test_numbers_below_zero_have_a_minus_sign():
    (line,) = claim_lines([row("gain", [-2.9, -3.0, -3.1], "gpu-2", conditions=CPU)])
    assert line.measured == "gpu-2, 3 seeds: −3.00 ± 0.25 points"
    assert line.share == "−1"


def test_settled_open_and_modelled_claims_stand_apart(rows):
    shown = [cells[0] if isinstance(cells[0], str) else cells[0].text for cells in claims_table(rows).rows]
    assert shown == ["Settled", "more top-1", "Open", "times faster", "share of the size", "By a model, apart",
                     "less time"]


@pytest.mark.parametrize("width", [80, 200])
def test_it_fits_the_terminal(rows, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = board([Collected(paper(), rows, "A sentence of many words. " * 12)])
    assert max(map(len, text.splitlines())) <= width
    # In columns, not as a heading and a value a line.
    assert re.search(rf"^{BRIEF[0]} +{'where' if width == 200 else BRIEF[1]} +", text, re.MULTILINE)
    assert ("÷ published" in text) == (width == 200)


def test_a_number_stays_in_one_line_with_its_interval_and_its_unit():
    line = "Mine against plain training: 18 ± 1 % less time and 2.96 ± 0.99 points less accuracy (−2.1 ± 1.7 points)."
    for width in range(25, 60):
        lines = wrapped(line, width).splitlines()
        assert max(map(len, lines)) <= width
        assert " ".join(each.strip() for each in lines) == line
        for number in ("18 ± 1 %", "2.96 ± 0.99 points", "(−2.1 ± 1.7 points)"):
            assert any(number in each for each in lines)


def test_the_page_needs_nothing_else_and_has_a_filter_for_each_column(rows):
    name = paper().headline.method
    text = page([Collected(paper(), rows, f"{name} against a <b>sentence</b>.")])
    assert f"<li><strong>{name}</strong> against a &lt;b&gt;sentence&lt;/b&gt;.</li>" in text
    assert not re.findall(r"""(?:src|href|import)\s*=?\s*["']https?://[^"']+\.(?:js|css)""", text)
    assert "searchList" in text
    assert text.count("weaker (cpu mnist)") >= 1


def test_numbers_are_in_units_in_words():
    frame = readable(pd.DataFrame({
        "layer": ["a", "b"], "bytes moved": [2_679_685_120, 1_000_000_000], "MACs": [50_000_000, 20_000_000],
        "off": [1.7e-16, 0.2], "top-1": [0.405, None], "top-5 accuracy": ["0.900 ± 0.006", "0.5"], "seeds": [3, 3],
        "text": ["1.0 ± 1.7e-16", "nan (nanometres)"], "share of twelve": [12.0, 3.0], "top-1 ±": [0.0, 0.002],
        "top-5 ±": [7.1e-05, 0.01], "nothing": [0.0, 0.5]}))
    assert frame.to_dict("list") == {
        "layer": ["a", "b"], "moved [GB]": ["2.68", "1"], "MACs [M]": ["50", "20"], "off": ["≈ 0", 0.2],
        "top-1 [%]": ["40.5", ""], "top-5 accuracy [%]": ["90.0 ± 0.6", "50"], "seeds": [3, 3],
        "text": ["1.0", "— (nanometres)"],
        "share of twelve": [12.0, 3.0], "top-1 ± [%]": ["0", "0.2"], "top-5 ± [%]": ["0.01", "1"],
        "nothing": [0.0, 0.5]}


def test_a_table_of_the_paper_s_rows_alone_is_told_from_a_measured_one():
    of = paper().model_copy(update={"tables": [PublishedTable(
        id="I", title="T", columns=["method", "top-1"], rows=[["plain", 0.405], ["mine", 0.435]])]})
    alone = pd.DataFrame({"where": ["paper"] * 2, "method": ["plain", "mine"], "top-1": ["0.405", "0.435×"]})
    assert papers_alone(alone, "I", of)
    assert not papers_alone(alone, "II", of)
    measured = pd.concat([alone, pd.DataFrame({"where": ["here"], "method": ["plain"], "top-1": ["0.5 ± 0.1"]})])
    assert not papers_alone(measured, "I", of)


def test_a_page_shows_nothing_twice_whatever_its_stamp(tmp_path):
    stream = io.BytesIO()
    figure = Figure(figsize=(2, 1))
    figure.savefig(stream, format="png", dpi=100)
    before: dict = {}
    parts = []
    for name in ("cpu", "quick"):
        folder = tmp_path / name
        (folder / "figures").mkdir(parents=True)
        (folder / "tables").mkdir()
        (folder / "figures" / "cuts.png").write_bytes(stamped(stream.getvalue(), f"layerlab · {name}"))
        pd.DataFrame({"x": [1.5]}).to_csv(folder / "tables" / "t.csv", index=False)
        (folder / "parameters.json").write_text("{}")
        (folder / "manifest.json").write_text(json.dumps([{"shows": [
            {"kind": "figure", "name": "cuts"}, {"kind": "table", "name": "t"}]}]))
        changed = row("gain", [1.0], name, changed={"lr": None})
        parts.append("\n".join(run_part(folder, paper(), name, [changed], before)))
    assert "![cuts](cpu/figures/cuts.png)" in parts[0]
    assert "| 1.5 |" in parts[0]
    assert "![" not in parts[1]
    assert "| 1.5 |" not in parts[1]
    assert "Figure cuts is the same as [above](cpu/figures/cuts.png)." in parts[1]
    assert "differs from today's profile in 1 parameter; it counts for no verdict" in parts[0]
    assert "- `lr`: the run did not know it" in parts[0]


def test_a_stamp_is_no_part_of_the_picture():
    pictures = []
    for colour in ("red", "red", "blue"):
        stream = io.BytesIO()
        Image.new("RGB", (90, 50), colour).save(stream, "png", dpi=(100, 100))
        pictures.append(stamped(stream.getvalue(), f"stamp {len(pictures)}"))
    assert pictures[0] != pictures[1]
    assert same_picture(pictures[0], pictures[1])
    assert not same_picture(pictures[0], pictures[2])
