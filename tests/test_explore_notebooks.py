"""explore.ipynb and compare.ipynb as ordinary notebooks, small; at their defaults where time allows."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from helpers import slow
from PIL import Image

from layerlab import LayerlabError, load_model, strategies
from layerlab.runs.execution import execute
from layerlab.runs.jobs import notebook_job
from layerlab.runs.tracking.store import client, experiment_id

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def _run(name: str, **parameters: Any) -> str:
    """What the notebook showed, as text and HTML."""
    job = notebook_job(NOTEBOOKS / f"{name}.ipynb", parameters)
    execute(job)
    assert job.is_done(), job.state()
    outputs = [output for cell in nbformat.read(job.file, 4).cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    return "\n".join(output.get("text", "") or str(output.get("data", "")) for output in outputs)


@pytest.fixture
def mine(tmp_path) -> dict[str, Any]:
    """Images of one's own, bright and dark, and a network of one's own in a file."""
    random = np.random.default_rng(0)
    for half, count in (("train", 16), ("val", 6)):
        for name, level in (("bright", 200), ("dark", 50)):
            folder = tmp_path / "mine" / half / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.normal(level, 20, (20, 24, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    file = tmp_path / "my_network.py"
    file.write_text(textwrap.dedent("""
        from torch import nn
        def build(num_classes, channels):
            return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                 nn.Linear(4, num_classes))
    """))
    return {"data": str(tmp_path / "mine"), "image_size": 16, "network": f"{file}:build", "network_options": {},
            "batch_size": 8, "output": str(tmp_path / "out")}


def test_explore_ones_own_images_and_network(mine, tmp_path):
    shown = _run("explore", **mine, epochs=3, seeds=[0], settings={"alpha": 3})
    for part in ("bright, dark", "one seed, which says nothing", "Nothing can be told apart", "loaded again"):
        assert part in shown
    out = tmp_path / "out"
    page = (out / "answer.html").read_text()
    for part in ("Nothing can be told: one seed says nothing", "data:image/png;base64", "How to repeat it",
                 "layerlab reproduce notebooks/explore.ipynb -p data=", "alpha: 3"):
        assert part in page
    saved = load_model(out / "model.pt", mine["network"])
    assert saved.class_names == ("bright", "dark")
    assert saved.strategies == (("lars-skip", {"alpha": 3.0, "rule": "fixed", "memory": "forget",
                                              "forget_after": None}),)
    assert {file.name for file in (out / "figures").iterdir()} == {"curves.png", "side-by-side.png", "layers.png"}
    assert list(pd.read_csv(out / "tables" / "runs.csv")["arm"]) == [
        "baseline", "lars-skip", "lars-skip · equal flops"]
    runs = client().search_runs([experiment_id("explore")])
    assert {run.info.status for run in runs} == {"FINISHED"}
    # Where the strategy skips nothing of so few images, training of the same cost is the baseline itself.
    assert {run.data.tags.get("arm", run.data.tags.get("kind")) for run in runs} - {"lars-skip · equal flops"} == {
        "baseline", "lars-skip", "notebook"}


@slow
def test_explore_takes_a_recipe_of_one_s_own(mine):
    shown = _run("explore", **mine, epochs=3, seeds=[0], optimizer="adamw", lr=0.002, schedule="one-cycle",
                 validation=4, fit_settings={"clip_norm": 1.0, "averaging": "ema", "patience": 3, "weight_decay": 0.01})
    assert "Chosen by the validation images" in shown or "Nothing can be told apart" in shown
    wanted = {"optimizer": "adamw", "lr": "0.002", "schedule": "one-cycle", "clip_norm": "1.0", "averaging": "ema",
              "patience": "3", "weight_decay": "0.01"}
    fits = [run for run in client().search_runs([experiment_id("explore")]) if "arm" in run.data.tags]
    assert fits
    for run in fits:
        equal = {"patience": "None"} if "equal" in run.data.tags["arm"] else {}
        assert wanted | equal == {name: run.data.params[name] for name in wanted}
        assert "validation/top1" in run.data.metrics


@slow
def test_compare_strategies_of_which_one_refuses_the_network(tmp_path):
    out = tmp_path / "out"
    shown = _run("compare", strategies=["lars-skip", "network-with-subnetworks"], limit=256, epochs=2, seeds=[0, 1],
                 output=str(out))
    frame = pd.read_csv(out / "tables" / "against.csv").set_index("arm")
    assert list(frame.index) == ["lars-skip", "lars-skip + memory-reorder", "network-with-subnetworks"]
    assert frame.loc["lars-skip", "TFLOP"] < 1
    assert "batch norm" in frame.loc["network-with-subnetworks", "left out"]
    assert "left out: network-with-subnetworks cannot train" in shown
    # Whatever the numbers say of these few images, the question has an answer.
    assert any(answer in shown for answer in ("Use ", "Stay with the baseline", "Nothing can be recommended"))
    assert {file.name for file in (out / "figures").iterdir()} == {"curves.png", "side-by-side.png", "fronts.png"}


@slow
@pytest.mark.parametrize("name", ["explore", "compare"])
def test_at_its_defaults(name, tmp_path):
    shown = _run(name, output=str(tmp_path / "out"))
    assert "3 seeds: mean ± 95 % interval" in shown
    if name == "compare":
        frame = pd.read_csv(tmp_path / "out" / "tables" / "against.csv")
        assert set(strategies) <= set(frame["arm"])


@slow
@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("explore", {"network": "resnet-cifr"}, r"^Unknown network 'resnet-cifr'. Did you mean 'resnet-cifar'\?"),
        ("explore", {"data": "no/such/folder"}, r"^Unknown dataset 'no/such/folder'.*folder that exists"),
        ("explore", {"strategy": "lars-skp"}, r"^Unknown strategy 'lars-skp'. Did you mean 'lars-skip'\?"),
        ("explore", {"settings": {"alhpa": 1}}, r"^lars-skip has no setting 'alhpa'"),
        ("compare", {"combinations": ["lars-skip"]}, r"^Combination 'lars-skip' is none"),
        ("compare", {"network_options": {"depth": 9}}, r"^resnet-cifar has 6n \+ 2 layers"),
    ],
)
def test_what_is_written_wrong_gets_one_sentence(name, parameters, message):
    with pytest.raises(LayerlabError, match=message) as error:
        execute(notebook_job(NOTEBOOKS / f"{name}.ipynb", parameters))
    assert len(str(error.value).splitlines()) == 1
