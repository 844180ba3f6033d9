"""What is published stays together: claims, tables and figures of one run, and pages that say what the claims say."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import nbformat
import pandas as pd
import pytest
from click.testing import CliRunner
from fake_paper import OPEN
from IPython.core.formatters import DisplayFormatter
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure
from traitlets.config import Config

from layerlab import LayerlabError, Study, load_paper, strategies
from layerlab.base.provenance import machine_name, processor_of
from layerlab.cli.main import main
from layerlab.reporting.overview import CAPTION, NOTHING_YET, OVERVIEW
from layerlab.reporting.pages import LONG, PICTURE, SUMMARY, paper_page, scoreboard_page, with_results
from layerlab.reporting.publish import DIGESTS, digests, publish
from layerlab.runs.batch.plans import jobs_of, read_plan
from layerlab.runs.execution import execute
from layerlab.runs.jobs import notebook_job
from layerlab.runs.own_folder import MARK

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = sorted(file.parent.relative_to(ROOT) for file in ROOT.glob("results/*/*/claims.json"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=str)
def test_committed_figures_tables_and_claims_are_of_one_run(folder):
    """To mend it: publish the run again; never edit what lies here."""
    assert digests(ROOT / folder) == json.loads((ROOT / folder / DIGESTS).read_text())


def test_the_committed_pages_say_what_the_committed_claims_say():
    """To mend it: `layerlab publish`."""
    if set(strategies) != {folder.parent.name for folder in ROOT.glob("plugins/*/pyproject.toml")}:
        pytest.skip("other plugins are installed than this project's")
    readme = (ROOT / "README.md").read_text()
    assert (ROOT / "results" / "README.md").read_text() == scoreboard_page(ROOT / "results")
    assert with_results(readme, ROOT / "results") == readme
    for name in {folder.parent.name for folder in PUBLISHED}:
        folder = ROOT / "results" / name
        assert (folder / "README.md").read_text() == paper_page(folder, load_paper(name))


def test_what_is_left_for_a_gpu_can_be_run(tmp_path):
    # Names, profiles and parameters that a plugin no longer has are mistakes of the plan, and raised.
    assert jobs_of(read_plan(ROOT / "results" / "gpu.yaml"), tmp_path)


@pytest.fixture
def study(fake) -> Study:
    """A finished one, at a profile that is published."""
    fake()
    return finished([2.0, 4.0])


def finished(values: list[float]) -> Study:
    study = Study("fake", "cpu")
    study.claim("gain", values, seeds=[0, 1], conditions={"dataset": "digits"})
    study.table("I", pd.DataFrame({"gain": values}))
    study.figure("fig-1", Figure())
    study.finish()
    return study


def test_runs_are_published_from_mlflow_as_from_their_folder(study, tmp_path):
    (tmp_path / "README.md").write_text(f"# Mine\n\n{SUMMARY[0]}\n{SUMMARY[1]}\n\nThe end.\n")
    pages = publish([study.folder], tmp_path / "results")
    assert [page.relative_to(tmp_path).as_posix() for page in pages] == [
        "results/fake/README.md", "results/README.md", "README.md"]
    there = tmp_path / "results" / "fake"
    assert {file.name for file in (there / "cpu").rglob("*.*")} == {
        "claims.json", "identity.json", "parameters.json", "manifest.json", "digests.json", "I.csv", "fig-1.png"}
    assert "a gain | Table I | 3 points | 3 ± 13 points | 1 | cpu, digits, 2 seeds" in (there / "README.md").read_text()
    assert "## fake\n\nA paper (Author, 2020). [Tables and figures](fake/README.md).\n" in pages[1].read_text()
    readme = pages[2].read_text()
    assert "- **fake**: 1 undecided of 1 claims.  \n  <sub>`fake`: Author, *A paper*, 2020; [claims and fig" in readme
    assert readme.startswith("# Mine\n")
    assert readme.endswith("\nThe end.\n")

    publish(["fake"], tmp_path / "again")
    assert digests(tmp_path / "again" / "fake" / "cpu") == digests(there / "cpu")


def test_a_page_of_tables_alone_says_where_they_were_made(fake, tmp_path):
    fake()
    study = Study("fake", "cpu")
    study.table("I", pd.DataFrame({"seconds": [1.0]}))
    study.finish()
    page = publish([study.folder], tmp_path)[0].read_text()
    assert "Command: `layerlab reproduce fake --profile cpu`. Machine: " in page


@pytest.fixture
def ipython(monkeypatch) -> Iterator[InteractiveShell]:
    """IPython in this process, as a notebook's kernel has it."""
    # It takes the place of the main module.
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    yield InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    InteractiveShell.clear_instance()


def test_a_page_heads_columns_as_the_paper_s_file_says(fake, tmp_path):
    fake()
    with (load_paper("fake").folder / "paper.toml").open("a") as stream:
        stream.write("\n[headings.costs]\nlatency = 'latency [µs]'\nsaved = { text = 'FLOPs saved', share = true }\n"
                     "\n[headings.costs-digits]\nlatency = 'latency on digits [µs]'\n")
    study = Study("fake", "cpu")
    # The second begins with the first one's name, the third does not.
    for name in ("costs", "costs-digits", "costs2"):
        study.table(name, pd.DataFrame({"latency": [1.5], "saved": [-0.25], "of": [name]}))
    study.finish()
    page = publish([study.folder], tmp_path)[0].read_text()
    rows = [line for line in page.splitlines() if line.startswith(("| latency", "| 1.5"))]
    assert rows == ["| latency [µs] | FLOPs saved [%] | of |", "| 1.5 | −25 | costs |",
                    "| latency on digits [µs] | FLOPs saved [%] | of |", "| 1.5 | −25 | costs-digits |",
                    "| latency | saved | of |", "| 1.5 | −0.25 | costs2 |"]


@pytest.mark.parametrize("name", sorted({folder.parent.name for folder in PUBLISHED}))
def test_headings_are_of_columns_that_there_are(name):
    columns: dict[str, set[str]] = {}
    for file in (ROOT / "results" / name).glob("*/tables/*.csv"):
        columns.setdefault(file.stem, set()).update(pd.read_csv(file, nrows=0).columns)
    for table, headings in load_paper(name).headings.items():
        there = [columns[each] for each in columns if each == table or each.startswith(f"{table}-")]
        assert set(headings) <= set().union(*there), table


def test_a_page_tells_what_it_shows_as_the_notebook_does(fake, ipython, tmp_path):
    text, again = nbformat.v4.new_markdown_cell, "keep(next(names))"
    file = fake(
        "profile = 'cpu'", OPEN.replace(", epochs=epochs, pause=pause", ""), "import pandas as pd",
        "def keep(name, rows=1):\n    study.table(name, pd.DataFrame({'x': [name] * rows}))", "names = iter('cd')",
        text("## Curves\n\nThin lines are seeds."),
        "from matplotlib.figure import Figure\nstudy.figure(f'{profile}, 8', Figure());",
        text("And in numbers:"), "%who str\nfor name in ('b', 'a, ends'):\n    keep(name)", again,
        text("So much for that.\n\n## Costs\n\nSeconds."), f"for _ in range(2):\n    keep('costs', {LONG + 1})", again,
        "study.claim('gain', [2.0], seeds=[0]); study.finish();",
    ) / "fake_plugin" / "notebook.ipynb"
    for cell in nbformat.read(file, 4).cells[1:]:
        if cell.cell_type == "code":
            ipython.run_cell(cell.source, store_history=True).raise_error()
    page = publish([ipython.user_ns["study"].folder], tmp_path / "results")[0].read_text()

    def table(name):
        return f"Table [{name}](cpu/tables/{quote(name)}.csv):\n\n| x |\n| --- |\n| {name} |\n\n"

    shown, _, costs = page.partition("### Curves")[2].partition("### Costs")
    assert shown == ("\n\nThin lines are seeds.\n\n![cpu, 8](cpu/figures/cpu%2C%208.png)\n\nAnd in numbers:\n\n"
                     + table("b") + table("a, ends") + table("c") + "So much for that.\n\n")
    assert costs.startswith("\n\nSeconds.\n\nTable [costs](cpu/tables/costs.csv):\n\n<details><summary>21 rows<")
    assert costs.endswith("</details>\n\n" + table("d").removesuffix("\n"))
    assert page.count("Table [") == 5


def test_what_no_cell_of_the_notebook_keeps_stands_at_the_end_of_the_page(study, tmp_path):
    page = publish([study.folder], tmp_path)[0].read_text()
    assert page.endswith("| gain |\n| ---: |\n| 2 |\n| 4 |\n\n![fig-1](cpu/figures/fig-1.png)\n")


@pytest.mark.parametrize("page", sorted(ROOT.glob("results/*/README.md")), ids=lambda page: page.parent.name)
def test_what_the_committed_pages_link_to_is_there(page):
    addresses = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert addresses
    assert [address for address in addresses if not (page.parent / unquote(address)).exists() or " " in address] == []


def test_a_page_gives_the_command_that_makes_it_with_what_was_changed(fake, tmp_path):
    fake()
    study = Study("fake", "cpu", epochs=7)
    study.claim("gain", [2.0], seeds=[0])
    study.finish()
    page = publish([study.folder], tmp_path / "results")[0].read_text()
    assert "Command: `layerlab reproduce fake --profile cpu -p epochs=7`." in page


def test_a_notebook_shows_a_figure_as_it_was_kept(fake):
    fake()
    study = Study("fake", "cpu")
    shown, details = DisplayFormatter().format(study.figure("fig-1", Figure(figsize=(6, 4), dpi=100)))
    content = (study.folder / "figures" / "fig-1.png").read_bytes()
    assert shown["image/png"] == content
    assert len(shown["text/plain"]) < 200
    pixels = struct.unpack(">II", content[16:24])
    # 144 pixels an inch were kept; the figure itself has 100.
    assert details["image/png"] == {"width": round(pixels[0] / 1.44), "height": round(pixels[1] / 1.44)}


def test_a_newer_run_takes_the_place_of_an_older_one(study, tmp_path):
    publish(["fake"], tmp_path)
    finished([3.0, 3.1])
    publish(["fake"], tmp_path)
    (row,) = json.loads((tmp_path / "fake" / "claims.json").read_text())
    assert row["values"] == [3.0, 3.1]
    assert [folder.name for folder in (tmp_path / "fake").iterdir() if folder.is_dir()] == ["cpu"]


def test_what_a_newer_run_makes_no_more_is_not_published_as_its_own(study, tmp_path):
    again = Study("fake", "cpu")
    assert again.folder == study.folder
    again.claim("gain", [3.0, 3.1], seeds=[0, 1], conditions={"dataset": "digits"})
    again.finish()
    publish([again.folder], tmp_path)
    assert {file.name for file in (tmp_path / "fake" / "cpu").rglob("*.*")} == {
        "claims.json", "identity.json", "parameters.json", "manifest.json", "digests.json"}


def test_a_run_leaves_alone_what_somebody_else_has_in_its_folder(fake, tmp_path):
    fake()
    mine = tmp_path / "mine" / "figures" / "photo.png"
    mine.parent.mkdir(parents=True)
    mine.touch()
    for epochs in (4, 5):
        # The second one does not go on with the first, and deletes what that one showed.
        study = Study("fake", "cpu", tmp_path / "mine", epochs=epochs)
        study.figure(f"fig-{epochs}", Figure())
        assert {file.name for file in mine.parent.iterdir()} == {"photo.png", f"fig-{epochs}.png"}
    with pytest.raises(LayerlabError, match=r"photo.png would be replaced, and layerlab did not write it"):
        study.figure("photo", Figure())
    assert mine.read_bytes() == b""


@pytest.mark.parametrize("name", ["parameters.json", "claims.json", "manifest.json", "study.json"])
def test_a_run_refuses_a_folder_whose_files_it_would_replace(fake, tmp_path, name):
    fake()
    mine = tmp_path / "mine"
    (mine / "figures").mkdir(parents=True)
    (mine / "figures" / "photo.png").touch()
    (mine / name).write_text('{"years": "of work"}')
    with pytest.raises(LayerlabError, match=rf"{name} would be replaced.*choose another folder with --output"):
        Study("fake", "cpu", mine)
    assert (mine / name).read_text() == '{"years": "of work"}'
    assert (mine / "figures" / "photo.png").exists()


def test_a_notebook_is_not_executed_onto_itself_or_another(fake, tmp_path):
    file = fake("1") / "fake_plugin" / "notebook.ipynb"
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("mine.ipynb", "other.ipynb"):
        (mine / name).write_text(file.read_text())
    before = (mine / "mine.ipynb").read_bytes()
    with pytest.raises(LayerlabError, match=r"mine.ipynb would be replaced, and layerlab did not write it"):
        execute(notebook_job(mine / "mine.ipynb", output=mine))
    assert (mine / "mine.ipynb").read_bytes() == before


def test_a_folder_of_an_older_version_is_known_by_its_record(fake, tmp_path):
    fake()
    folder = finished([2.0, 4.0]).folder
    (folder / MARK).unlink()
    assert Study("fake", "cpu", epochs=5, output=folder).folder == folder
    assert not list((folder / "tables").iterdir())


def test_nothing_is_published_of_what_is_not_there(fake, tmp_path):
    fake()
    Study("fake", "quick").finish()
    for what, message in (("fake", "no finished run of 'fake' beyond `quick`"), ("nothing", "no id of a result")):
        with pytest.raises(LayerlabError, match=message):
            publish([what], tmp_path / "results")
    (tmp_path / "claims.json").write_text("[]")
    with pytest.raises(LayerlabError, match="holds a run without any claim"):
        publish([tmp_path], tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("lost", "message"),
    [("figures/fig-1.png", "lacks figures/fig-1.png, which its manifest.json lists; run `layerlab reproduce` again"),
     ("manifest.json", "lacks its manifest.json; run `layerlab reproduce` again")],
)
def test_a_run_that_lost_what_it_showed_is_not_published(study, tmp_path, lost, message):
    (study.folder / lost).unlink()
    with pytest.raises(LayerlabError, match=message):
        publish([study.folder], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_figure_that_was_exchanged_is_noticed(study, tmp_path):
    publish(["fake"], tmp_path)
    folder = tmp_path / "fake" / "cpu"
    (folder / "figures" / "fig-1.png").write_bytes(b"another")
    assert digests(folder) != json.loads((folder / DIGESTS).read_text())


def test_the_sentence_of_a_paper_is_the_same_wherever_it_stands(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    fake()
    with (load_paper("fake").folder / "paper.toml").open("a") as stream:
        stream.write("\n[headline]\nmethod = 'Fake'\naccuracy = 'gain'\ncosts = { time = 'saving' }\n")
        stream.write("\n[[claims]]\nid = 'saving'\nstatement = 'less time'\nvalue = 40.0\nunit = '%'\n"
                     "where = 'Fig. 1'\nkind = 'effect'\nneutral = 0.0\ntolerance = 1.0\n"
                     "conditions = { dataset = 'imagenet' }\n")
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(["# Mine", *PICTURE, *SUMMARY, ""]))
    publish([], tmp_path / "results")
    assert NOTHING_YET in readme.read_text()
    study = Study("fake", "cpu")
    for claim, values in (("gain", [2.0, 2.02]), ("saving", [30.0, 32.0])):
        study.claim(claim, values, seeds=[0, 1], conditions={"dataset": "digits"})
    study.finish()
    publish([study.folder], tmp_path / "results")
    said = (" against plain training: 31 ± 13 % less training time and 2.01 ± 0.13 points more accuracy; not compared "
            "with plain training of the same cost; not tested at the paper's scale (here digits, 2 seeds, "
            f"{processor_of(machine_name())}).")
    assert readme.read_text().count(f"- **Fake**{said}") == 1
    assert (tmp_path / "results" / "README.md").read_text().count(f"- **Fake**{said}") == 1
    assert (tmp_path / "results" / "fake" / "README.md").read_text().count(f"**Fake{said}**") == 1
    result = CliRunner().invoke(main, ["scoreboard", "fake"])
    assert result.stdout.count(f"Fake{said}") == 1
    # And its point stands in the figure.
    assert f"(results/{OVERVIEW}.png)\n\n{CAPTION}" in readme.read_text()
    (point,) = pd.read_csv(tmp_path / "results" / f"{OVERVIEW}.csv").to_dict("records")
    assert (point["method"], point["cost"], point["x"], point["y"]) == ("Fake", "time", 0.69, pytest.approx(2.01))
