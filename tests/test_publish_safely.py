"""`layerlab publish` of a folder that somebody sent: no link is followed, nothing of anybody's is replaced or deleted,
and a kill at any moment leaves the old results or the new."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
from helpers import slow
from matplotlib.figure import Figure

from layerlab import LayerlabError, Study
from layerlab.reporting import publish as module
from layerlab.reporting.publish import DIGESTS, digests, publish


@pytest.fixture
def sent(fake, tmp_path) -> Path:
    """The folder of a finished run."""
    fake()
    return finished(tmp_path / "sent", [2.0, 4.0])


def finished(folder: Path, values: list[float]) -> Path:
    study = Study("fake", "cpu", folder)
    study.claim("gain", values, seeds=[0, 1], conditions={"dataset": "digits"})
    study.table("I", pd.DataFrame({"gain": values}))
    study.figure("fig-1", Figure())
    study.finish()
    return study.folder


def everything(folder: Path) -> dict[str, bytes | str]:
    """Path → content of each file, target of each link."""
    return {str(file.relative_to(folder)): os.readlink(file) if file.is_symlink() else file.read_bytes()
            for file in folder.rglob("*") if file.is_symlink() or file.is_file()}


def _link(file: Path, to: Path) -> None:
    if file.is_dir():
        file.rename(file.with_name("moved"))
    else:
        file.unlink(missing_ok=True)
    file.symlink_to(to)


def _loop(file: Path, to: Path) -> None:
    _link(file, file)


def _pipe(file: Path, to: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def test_what_is_no_file_of_the_run_s_own_is_refused(sent, tmp_path):
    """Each file in turn, and a folder: a link to one that is right but somebody else's, a loop, and a pipe."""
    names = ["tables/I.csv", "figures/fig-1.png", "claims.json", "parameters.json", "manifest.json", "tables"]
    for number, (name, put) in enumerate(itertools.product(names, [_link, _loop, _pipe])):
        if (name, put) == ("tables", _pipe):
            continue
        folder, other = tmp_path / f"run-{number}", tmp_path / f"other-{number}"
        shutil.copytree(sent, folder)
        (shutil.copytree if name == "tables" else shutil.copyfile)(sent / name, other)
        put(folder / name, other)
        with pytest.raises(LayerlabError, match=r"is a link, which|There is no file|lacks (tables|figures)/"):
            publish([folder], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_only_what_the_run_s_pages_show_is_published(sent, tmp_path):
    (sent / "figures" / "loop").symlink_to(sent / "figures")
    (sent / "tables" / "key.csv").symlink_to("/etc/passwd")
    (sent / "tables" / "other.csv").write_text("a\n1\n")
    publish([sent], tmp_path / "results")
    assert {file.name for file in (tmp_path / "results" / "fake" / "cpu").rglob("*.*")} == {
        "claims.json", "identity.json", "parameters.json", "manifest.json", "digests.json", "I.csv", "fig-1.png"}


def test_a_damaged_run_is_refused_before_anything_is_replaced(sent, tmp_path):
    publish([sent], tmp_path / "results")
    before = everything(tmp_path / "results")
    parameters, table = "does not say what a run began with", "is no table that can be read"
    for file, content, message in (("parameters.json", "[1]", parameters), ("parameters.json", "{", parameters),
                                   ("tables/I.csv", "", table), ("tables/I.csv", "a\n\xff,1,2", table)):
        whole = (sent / file).read_bytes()
        (sent / file).write_text(content, encoding="latin-1")
        with pytest.raises(LayerlabError, match=message):
            publish([sent], tmp_path / "results")
        (sent / file).write_bytes(whole)
        assert everything(tmp_path / "results") == before


def test_rows_of_another_run_or_of_no_profile_are_refused(sent, tmp_path):
    (row, *_) = json.loads((sent / "claims.json").read_text())
    for rows, message in (([row, row | {"profile": "quick"}], "rows of several papers or profiles"),
                          ([row | {"profile": ""}], "Unknown profile ''"),
                          ([row | {"profile": "elsewhere"}], "Unknown profile 'elsewhere'"),
                          ([row | {"paper": "nobody"}], "Unknown strategy 'nobody'")):
        (sent / "claims.json").write_text(json.dumps(rows))
        with pytest.raises(LayerlabError, match=message):
            publish([sent], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_what_publish_did_not_write_is_neither_replaced_nor_deleted(sent, tmp_path):
    for number, mine in enumerate(["README.md", "overview.png", "fake/README.md", "fake/claims.json",
                                   "fake/cpu/thesis.txt", "fake/cpu", "fake", "fake/cpu/tables/I.csv"]):
        results = tmp_path / str(number)
        (results / mine).parent.mkdir(parents=True, exist_ok=True)
        (results / mine).write_text("years of work")
        before = everything(results)
        with pytest.raises(LayerlabError, match="move it away, or choose another folder with --to"):
            publish([sent], results)
        assert everything(results) == before


def test_a_file_that_somebody_puts_beside_published_ones_stays(sent, tmp_path):
    results = tmp_path / "results"
    publish([sent], results)
    (results / "fake" / "cpu" / "notes").mkdir()
    (results / "fake" / "cpu" / "notes" / "mine.txt").write_text("years of work")
    (results / "more.md").write_text("another page")
    before = everything(results)
    with pytest.raises(LayerlabError, match=r"holds notes/mine.txt, which `layerlab publish` did not write"):
        publish([sent], results)
    assert everything(results) == before
    (results / "fake" / "cpu" / "notes" / "mine.txt").unlink()
    publish([sent], results)
    assert (results / "more.md").read_text() == "another page"


def test_a_link_among_the_results_leads_nowhere(sent, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for number, link in enumerate(["fake", "fake/cpu"]):
        place = tmp_path / str(number) / link
        place.parent.mkdir(parents=True)
        place.symlink_to(precious)
        with pytest.raises(LayerlabError, match="no folder below"):
            publish([sent], tmp_path / str(number))
    assert everything(precious) == {"thesis.txt": b"years of work"}


def _dies(run: Path, results: Path, moment: int) -> bool:
    """Publish in a process that is killed at the so many-th call that renames or deletes something; whether it was."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)
    calls = itertools.count(1)

    def counted(call):
        def wrapped(*arguments, **options):
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return wrapped

    for owner, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (module, "swap")):
        setattr(owner, name, counted(getattr(owner, name)))
    publish([run], results)
    os._exit(0)


def _cannot(new: Path, old: Path) -> None:
    """As on a system that cannot exchange two folders at once."""
    raise OSError


@pytest.mark.parametrize("exchange", ["yes", pytest.param("no", marks=slow)])
def test_a_kill_at_any_moment_leaves_the_old_results_or_the_new(fake, tmp_path, exchange, monkeypatch):
    if exchange == "no":
        monkeypatch.setattr(module, "swap", _cannot)
    fake()
    old, new, results = finished(tmp_path / "old", [2.0, 4.0]), finished(tmp_path / "new", [3.0, 3.5]), tmp_path / "r"
    profile = results / "fake" / "cpu"
    publish([old], results)
    whole = [digests(profile)]
    publish([new], results)
    whole.append(digests(profile))
    publish([old], results)
    seen, moment = set(), 1
    while _dies(new, results, moment):
        if exchange == "no" and not profile.exists():
            # Between two renames: the old one waits beside its place.
            found = digests(profile.with_name(".new-cpu") / "old")
            assert found == whole[0]
        else:
            found = digests(profile)
            assert found == json.loads((profile / DIGESTS).read_text())
        seen.add(whole.index(found))
        publish([old], results)
        assert digests(profile) == whole[0]
        assert not list(results.rglob(".new-*"))
        moment += 1
    assert seen == {0, 1}
