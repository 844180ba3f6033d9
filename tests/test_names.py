"""Names that come from files or users stay names: one folder or file, wherever they are used."""

from __future__ import annotations

import json

import pytest
from helpers import Freezer

from layerlab import LayerlabError, Session, compare
from layerlab.base.names import file_name
from layerlab.contract.paper import read_paper
from layerlab.runs.manifest import read_manifest
from layerlab.runs.record import read_results
from layerlab.runs.tracking.import_runs import import_file

# What would lead elsewhere, hide, be no name at all, or drive a terminal.
NO_NAMES = ["", " ", ".", "..", "../../precious", "/etc", "a/b", "a\\b", ".hidden", "a\0b", "a\nb", "\x1b[2Ja", 
            "a\u202eb", "é" * 101]
NAMES = ["cpu", "a, ends", "lars-skip + low-bit", "low-bit · equal flops", "100 %", "層ごと", "a..b", "é" * 100]

ROW = {"paper": "fake", "claim": "gain", "statement": "a gain", "where": "I", "unit": "%", "paper_value": 1.0,
       "profile": "cpu"}


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_in_a_file_that_leads_elsewhere_is_refused_in_one_sentence(tmp_path, name):
    for field in ("paper", "profile"):
        if (field, name) == ("profile", ""):
            continue  # a row that stands for no run
        (tmp_path / "claims.json").write_text(json.dumps([ROW | {field: name}]))
        for read in (read_results, lambda folder: import_file(folder / "claims.json")):
            with pytest.raises(LayerlabError, match=f"{field}.*should be a name") as caught:
                read(tmp_path)
            assert "\n" not in str(caught.value)
    (tmp_path / "manifest.json").write_text(json.dumps([{"shows": [{"kind": "table", "name": name}]}]))
    with pytest.raises(LayerlabError, match=r"manifest.json.*should be a name"):
        read_manifest(tmp_path)
    key = json.dumps(name)
    (tmp_path / "paper.toml").write_text(
        "title = 't'\nauthors = 'a'\nyear = 1\nvenue = 'v'\nsummary = 's'\nformula = 'f'\nnotebook = 'n'\nclaims = []\n"
        f"[profiles.{key}]\ndescription = 'd'\n", errors="surrogatepass")
    with pytest.raises(LayerlabError, match=r"paper.toml"):
        read_paper(tmp_path / "paper.toml", "fake")


@pytest.mark.parametrize("name", NAMES)
def test_names_as_people_give_them_are_taken_as_they_are(tmp_path, name):
    (tmp_path / "claims.json").write_text(json.dumps([ROW | {"profile": name}]))
    assert read_results(tmp_path)[0].profile == name
    assert file_name(name) == name


def test_any_text_has_a_file_s_name_of_its_own(tmp_path):
    texts = [*NO_NAMES, *NAMES, "x" * 500, "x" * 501, "../x", "..//x", "a/b/", "a_b", "\ud800"]
    made = [file_name(text) for text in texts]
    assert len(set(made)) == len(texts)
    for name in made:
        assert file_name(name) == name
        (tmp_path / name).touch()
    assert {file.name for file in tmp_path.iterdir()} == set(made)


def test_an_arm_s_name_leaves_the_folder_of_checkpoints_for_nowhere(tmp_path, digits, residual):
    arms = {"../../out": (), "/tmp/out": Freezer(), "3/4": ()}
    folder = tmp_path / "deep" / "checkpoints"
    found = compare(residual, digits, arms, epochs=1, batch_size=512, checkpoint=folder, progress=False)
    assert found.arms == [*arms]
    assert len(list(folder.glob("*-seed0/state.pt"))) == 3
    assert {file for file in tmp_path.rglob("state.pt")} == set(folder.glob("*-seed0/state.pt"))


def test_a_session_s_table_whose_name_leads_elsewhere_is_refused(tmp_path):
    import pandas as pd

    session = Session("test", "a try", tmp_path / "session", {})
    with pytest.raises(LayerlabError, match=r"The table '\.\./\.\./x'.*should be a name"):
        session.table("../../x", pd.DataFrame({"a": [1]}))
    assert not list(tmp_path.rglob("x.csv"))
