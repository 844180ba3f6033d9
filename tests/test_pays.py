"""`layerlab pays`: the true answer on the bundled digits, for a method that pays, one that does not, and a placebo."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers import slow

import layerlab
from layerlab.cli.main import main
from layerlab.reporting.pays import Question, does_it_pay
from layerlab.runs.tracking.store import client, experiment_id

# A network with much that is useless, and three methods whose truth is known: one leaves that out, one leaves out as
# much of what is needed, one does nothing but cost.
METHODS = """
import torch
from torch import nn
from layerlab import Strategy

class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.useful = nn.Linear(64, 128)
        self.parts = nn.ModuleList(nn.Linear(128, 128) for _ in range(12))
        self.output = nn.Linear(144, num_classes)
        self.skipped = ()

    def forward(self, x):
        pixels = x.flatten(1)
        x = torch.relu(self.useful(pixels))
        hidden = torch.zeros(len(x), 128)
        for number, part in enumerate(self.parts):
            if number not in self.skipped:
                # The last part is needed, the others are ballast.
                hidden = hidden + (number == 11) * torch.relu(part(x))
        return self.output(torch.cat([hidden, pixels[:, ::4]], dim=1))

class Skip(Strategy):
    name = "skip"
    what: tuple[int, ...] = tuple(range(11))
    def on_fit_start(self, run):
        run.model.skipped = self.what
    def placebo(self, result):
        return Lame() if type(self) is Skip else None

class Lame(Skip):
    name = "lame"
    what: tuple[int, ...] = tuple(range(1, 12))

class Waste(Strategy):
    name = "waste"
    def on_after_backward(self, run):
        run.model(run.example)
        run.model(run.example)
"""


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Install the three methods; gives their network."""
    site = tmp_path / "site"
    info = site / "small_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "small_methods.py").write_text(textwrap.dedent(METHODS))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: small-methods\nVersion: 1.0\n")
    points = "".join(f"{name} = small_methods:{name.capitalize()}\n" for name in ("skip", "lame", "waste"))
    (info / "entry_points.txt").write_text(f"[layerlab.strategies]\n{points}")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    layerlab.strategies.refresh()
    yield "small_methods:Net"
    layerlab.strategies.refresh()


def _ask(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["pays", *arguments])
    assert result.exit_code == status, result.output
    return result


def _answer(*arguments: str) -> tuple[dict[str, str], str, str]:
    """(what `--json` gives, the page, the lines that were told on the way)."""
    result = _ask(*arguments, "--json")
    told = json.loads(result.stdout)
    return told, Path(told["page"]).read_text(), result.stderr


@slow
def test_of_three_methods_the_one_that_pays_is_recommended_and_no_placebo(methods, tmp_path):
    """Within two minutes; on a busy machine with fewer seeds."""
    told, page, lines = _answer(methods, "digits", "--budget", "2min", "-s", "skip", "-s", "waste", "-s", "lame")
    assert told["answer"].startswith("Yes, skip pays for small_methods:Net on digits: skip is ")
    assert "points above plain training of the same cost; it beats its placebo (" in told["answer"]
    assert "lame loses more than 1 point" in page
    for part in ("<!doctype html>", "data:image/png;base64", "skip", "waste", "neither time nor compute nor memory",
                 "layerlab pays small_methods:Net digits --budget 120s", "How to repeat it"):
        assert part in page, part
    # It needs nothing else: no script, no style sheet, no picture from anywhere.
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "rate 0.3: " in lines
    (run,) = [run for run in client().search_runs([experiment_id("pays")], "tags.kind = 'notebook'")]
    assert run.data.tags["answer"] == told["answer"]
    assert run.data.metrics["skip/time high"] > 0
    # Asked again, it has the answer.
    again, same, told_again = _answer(methods, "digits", "--budget", "2min", "-s", "skip", "-s", "waste", "-s", "lame")
    assert (again, same) == (told, page)
    assert "finished before" in told_again


def test_what_cannot_pay_is_not_even_compared(methods):
    told, page, lines = _answer(methods, "digits", "--budget", "30s", "-s", "waste")
    assert told["answer"] == ("No, no strategy can pay for small_methods:Net on digits: each was left out before the "
                              "comparison.")
    assert "it saved neither time nor compute nor memory and was not more accurate" in page
    assert "seed 1" not in lines


@slow
def test_interrupted_it_goes_on_with_what_it_had_chosen(methods):
    question = Question(methods, "digits", 60.0, ["skip"])
    first: list[str] = []

    def stop(line: str) -> None:
        first.append(line)
        if "seed 1 of" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        does_it_pay(question, stop)
    rest: list[str] = []
    found = does_it_pay(question, rest.append)
    assert any("rate 0.1" in line for line in first)
    assert not any("rate " in line or "pilot" in line for line in rest)
    assert found.page.exists()
    assert len(client().search_runs([experiment_id("pays")], "tags.kind = 'notebook'")) == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["digits", "--budget", "soon"], "'soon' is no time; write it as 90s, 20min or 1.5h"),
    (["digits", "-p", "epoch=3"], "Unknown parameter of pays 'epoch'"),
    (["digits", "-p", "limit=many"], "limit should be a number, got 'many'"),
    (["digits", "-p", "equal=joules"], "equal should be flops or seconds, got 'joules'"),
    (["digits", "-p", "tolerance=-1"], "tolerance should be above 0, got -1"),
    (["nowhere"], "Unknown dataset 'nowhere'"),
    (["digits", "-s", "lars-skp"], "Unknown strategy 'lars-skp'. Did you mean 'lars-skip'?"),
    (["digits", "--budget", "0.001s"], "carries no comparison; give at least --budget"),
])
def test_what_is_asked_wrong_gets_one_sentence(arguments, message):
    result = _ask("mlp", *arguments, status=2)
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
