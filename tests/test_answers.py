"""Answers: JSON of every command, the table of a batch, and what MLflow shows of a notebook and of an arm's seeds."""

from __future__ import annotations

import csv
import io
import json

import pytest
from click.testing import CliRunner
from fake_paper import FINISH, OPEN, TRAIN
from helpers import Freezer, Residual, slow
from test_bottom_line import row

from layerlab import Session
from layerlab.base.files import write_json
from layerlab.cli.main import main
from layerlab.reporting.answers import answers_table
from layerlab.runs import tracking
from layerlab.runs.answer import Against, Answer, answer_metrics, answers_of
from layerlab.runs.batch.local import run_batch
from layerlab.runs.batch.plans import Entry, Plan, jobs_of
from layerlab.runs.description import answer_tags
from layerlab.runs.jobs import Job, told_apart
from layerlab.runs.record import read_record
from layerlab.runs.tracking import LONGEST_TAG
from layerlab.show.interval import mean_interval

pytestmark = pytest.mark.usefixtures("known_plugins")
# What starts something or writes a plugin, and has nothing to tabulate.
SILENT = {"new", "lab", "ui", "completion"}


def _call(*arguments: str, status: int = 0, width: int = 80) -> str:
    result = CliRunner(env={"COLUMNS": str(width)}).invoke(main, arguments)
    assert result.exit_code == status, result.output
    return result.stdout


def test_every_command_that_shows_something_takes_json():
    without = {name for name, command in main.commands.items()
               if not any("--json" in option.opts for option in command.params)}
    assert without == SILENT & set(main.commands)


@pytest.mark.parametrize(("arguments", "columns"), [
    (["list"], ["strategy", "installed by", "paper"]),
    (["data"], ["dataset", "", "where"]),
    (["scoreboard", "lars-skip"], None),
    (["doctor"], ["", ""]),
    (["preflight", "lars-skip", "resnet18"], None),
])
def test_a_table_is_one_json_object(arguments, columns):
    content = json.loads(_call(*arguments, "--json"))
    assert set(content) == {"caption", "columns", "rows", "notes"}
    assert content["rows"]
    assert columns is None or content["columns"] == columns


def test_several_tables_are_a_list_and_a_mistake_is_no_json(tmp_path):
    tables = json.loads(_call("describe", "lars-skip", "--json"))
    assert [table["columns"][0] for table in tables] == ["", "setting", "profile", "claim"]
    assert tables[0]["notes"][0].startswith("Notebook: ")
    assert json.loads(_call("scoreboard", "lars-skip", "--format", "json")) == json.loads(
        _call("scoreboard", "lars-skip", "--json"))
    result = CliRunner().invoke(main, ["describe", "lars-skp", "--json"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Did you mean 'lars-skip'?" in result.stderr


def _grid(**grid: list) -> list:
    return jobs_of(Plan(jobs=[Entry(paper=["fake"], grid=grid, parameters={"pause": 0.0})]), None)


def test_jobs_are_told_apart_by_what_differs_alone(fake):
    fake(OPEN, TRAIN, FINISH)
    jobs = _grid(epochs=[1, 4])
    # 4 is the profile's own, so it is no change, and still what tells the second one from the first.
    assert [job.differs for job in jobs] == [{"epochs": 1}, {"epochs": 4}]
    assert [job.label for job in jobs] == ["epochs=1 · fake quick", "epochs=4 · fake quick"]
    (alone,) = _grid(epochs=[1])
    assert (alone.differs, alone.label) == ({}, "fake quick epochs=1")
    assert [job.differs for job in told_apart([*jobs, alone])] == [{"epochs": 1}, {"epochs": 4}, {"epochs": 1}]


@slow
def test_a_batch_ends_with_its_answers_which_the_table_and_mlflow_have_too(fake, tmp_path):
    fake(OPEN, TRAIN, FINISH)
    plan = tmp_path / "plan.yaml"
    plan.write_text("[{paper: fake, grid: {epochs: [1, 2]}}]")
    shown = _call("batch", str(plan), "--workers", "1")
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    # The rows of the answers, below those of the files.
    rows = [line.split() for line in lines if line.startswith("epochs=") and "·" not in line]
    assert [row[:2] for row in rows[:2]] == [["epochs=1", "frozen"], ["epochs=2", "frozen"]]

    (found,) = [line.split()[1] for line in lines if line.startswith("Batch ")]
    for name in ("text", "markdown", "latex", "html"):
        told = _call("table", "--batch", found[:5], "--format", name, width=120)
        assert all(f"epochs={epochs}" in told for epochs in (1, 2)), name
    table = list(csv.DictReader(io.StringIO(_call("table", "--format", "csv"))))
    assert [row["epochs"] for row in table] == ["1", "2"]
    assert [row["arm"] for row in table] == ["frozen", "frozen"]
    assert 0 < float(table[0]["compute"]) <= 1
    assert json.loads(_call("table", "--json"))["rows"] == [list(row.values()) for row in table]
    assert "1 undecided of 1 claims" in table[0]["answer"]
    assert "Unknown batch 'zzz'" in CliRunner().invoke(main, ["table", "--batch", "zzz"]).output

    client = tracking.client()
    runs = client.search_runs([tracking.experiment_id("fake")], "tags.kind = 'notebook'")
    assert {run.info.run_name for run in runs} == {
        f"epochs={epochs} · fake · quick · notebook" for epochs in (1, 2)}
    assert {run.data.tags["batch"] for run in runs} == {found}
    for run in runs:
        (row,) = [row for row in table if row["run"] == run.info.run_id]
        assert run.data.params == {"epochs": row["epochs"]}
        assert run.data.tags["answer"] == row["answer"]
        described = run.data.tags["mlflow.note.content"]
        assert described.startswith(row["answer"])
        assert "| undecided" in described
        assert run.data.metrics["frozen/compute"] == pytest.approx(float(row["compute"]), rel=1e-5)

    # Run again, nothing is trained, and the batch is the same with the same answers.
    assert found in _call("batch", str(plan), "--workers", "1")
    assert list(csv.DictReader(io.StringIO(_call("table", "--format", "csv")))) == table


@slow
def test_what_has_not_come_to_its_end_has_no_answer(fake):
    fake(OPEN, "raise ValueError('broke')", FINISH)
    run_batch(_grid(epochs=[1, 2]), workers=1)
    (row, other) = json.loads(_call("table", "--json"))["rows"]
    assert row[3] == other[3] == "not finished"
    assert _call("table").count("not finished") == 2


def test_the_seeds_of_an_arm_are_a_run_with_their_mean_and_interval(digits, tmp_path):
    session = Session("test", "a title", tmp_path, {})
    options = dict(epochs=2, batch_size=256, progress=False)
    arms = {"plain": (), "frozen": Freezer()}
    session.compare("main", Residual, digits, arms, seeds=[0, 1], **options)
    runs = session.compare("main", Residual, digits, arms, seeds=[0, 1, 2], **options)
    one = session.compare("other", Residual, digits, {"plain": ()}, seeds=[0], **options)
    assert one.arms == ["plain"]
    found = tracking.client().search_runs([tracking.experiment_id("test")], "tags.kind = 'arm'")
    assert {run.data.tags["arm"] for run in found} == {"plain", "frozen"}
    assert len(found) == 2
    for run in found:
        top1 = [result.final["test/top1"] for result in runs.of(run.data.tags["arm"])]
        mean, half = mean_interval(top1)
        told = run.data.metrics
        assert (told["test/top1"], told["test/top1 low"], told["test/top1 high"], told["seeds"]) == pytest.approx(
            (mean, mean - half, mean + half, 3))
        seeds = tracking.client().search_runs([tracking.experiment_id("test")],
                                              f"tags.`layerlab.group` = '{run.data.tags['layerlab.group']}' AND "
                                              "tags.seed LIKE '%'")
        assert sorted(each.data.tags["seed"] for each in seeds) == ["0", "1", "2"]
        assert {each.data.tags["arm"] for each in seeds} == {run.data.tags["arm"]}
        assert run.info.run_name == f"mean · {run.data.tags['arm']} · main"
    session.close()
    # What tells apart trainings of one arm on the same data in a list of runs.
    names = {run.info.run_name for run in tracking.client().search_runs([tracking.experiment_id("test")])}
    assert {"plain · main · seed 0", "plain · other · seed 0"} <= names


def test_an_answer_is_told_with_its_page_and_without_what_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arm = Against(comparison="runs", arm="mine", seeds=3, pays="yes",
                  measured={"points": (0.5, 0.25), "time": (0.8, None), "compute": (None, None), "memory": (1.0, 0.0)})
    answer = Answer(sentence="Yes, mine pays.", arms=[arm], page=str(tmp_path / "out" / "answer.html"), run="r")
    write_json(tmp_path / "job" / "study.json", {"finished": True, "answers": [answer.model_dump()]})
    text = answers_table([Job("mine.ipynb", str(tmp_path / "job"))]).text(80)
    for part in ("+0.50 ± 0.25", "0.8000", "—", "yes", "Yes, mine pays.", "out/answer.html"):
        assert part in text, text
    assert answer_metrics(answer) == {
        "mine/points": 0.5, "mine/points low": 0.25, "mine/points high": 0.75, "mine/time": 0.8, "mine/memory": 1.0,
        "mine/memory low": 1.0, "mine/memory high": 1.0}


def test_the_conclusion_s_word_on_an_arm_counts_more_than_its_own_interval(digits, tmp_path):
    session = Session("test", "a title", tmp_path, {})
    session.compare("main", Residual, digits, {"plain": (), "frozen": Freezer()}, seeds=[0, 1], epochs=1,
                    batch_size=256, equal="flops", progress=False)
    session.conclude("No, frozen does not pay.", "<p>a page</p>", {"frozen": "no"})
    session.close()
    (answer,) = answers_of(read_record(tmp_path))
    assert (answer.sentence, [(arm.arm, arm.pays) for arm in answer.arms]) == (
        "No, frozen does not pay.", [("frozen", "no")])
    assert (tmp_path / "answer.html").read_text() == "<p>a page</p>"


def test_a_run_s_description_is_its_answer_with_every_claim_and_short_enough_for_mlflow():
    claims = [row("gain", [-2.9, -3.0, -3.1])]
    tags = answer_tags("It pays: 1 | 2.", claims)
    assert tags["answer"] == "It pays: 1 | 2."
    above, below = tags["mlflow.note.content"].split("\n\n")
    assert above == r"It pays: 1 \| 2."
    assert "| −3.00 ± 0.25 points |" in below
    assert answer_tags("Mine.")["mlflow.note.content"] == "Mine."
    assert answer_tags("Mine.", claims * 100)["mlflow.note.content"] == "Mine."
    assert {len(text) for text in answer_tags("m" * 9000).values()} == {LONGEST_TAG}
