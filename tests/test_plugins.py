"""What every installed plugin must do, whoever wrote it."""

from __future__ import annotations

import json

import pytest
from helpers import same_weights

from layerlab import fit, load_dataset, strategies
from layerlab.papers import load_paper
from layerlab.training import Fit

NAMES = [plugin.name for plugin in strategies.every()]


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", device="cpu")


@pytest.fixture
def network(name, data, residual):
    """Builds what the plugin trains: its own example, or for one that takes any network the residual one."""
    kind = strategies[name].load()
    if kind.example_network(data.shape, data.classes) is None:
        return residual
    return lambda: kind.example_network(data.shape, data.classes)


@pytest.mark.parametrize("name", NAMES)
def test_the_paper_is_complete(name):
    paper = load_paper(name)
    assert {"quick", "cpu", "paper"} <= paper.profiles.keys()
    assert len({claim.id for claim in paper.claims}) == len(paper.claims) > 0
    keys = [set(profile.parameters) for profile in paper.profiles.values()]
    assert all(each == keys[0] for each in keys)


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_takes_every_parameter_with_a_comment_and_has_no_outputs(name):
    paper = load_paper(name)
    cells = json.loads(paper.notebook_file.read_text())["cells"]
    (parameters,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    lines = [line for line in "".join(parameters["source"]).splitlines() if line and not line.startswith("#")]
    assert all("  # " in line for line in lines)
    assert {line.split(" = ")[0] for line in lines} == {"profile", "output", *paper.profile("quick").parameters}
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_documented(name):
    strategy = strategies[name].load()
    assert all(field.description for field in strategy.model_fields.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_after_every_epoch_is_bit_identical(name, optimizer, data, network, tmp_path):
    options = dict(epochs=4, batch_size=128, optimizer=optimizer, lr=0.01)
    whole = fit(network, data, strategies(name), progress=False, **options)
    assert len({row["train/loss"] for row in whole.history}) == 4
    for stop in (1, 2, 3):
        folder = tmp_path / str(stop)
        first = Fit(network, data, strategies(name), checkpoint=folder, **options)
        for _ in range(stop):
            first.train_epoch()
        again = fit(network, data, strategies(name), checkpoint=folder, progress=False, **options)
        assert same_weights(whole.model, again.model), f"after epoch {stop}"


@pytest.mark.parametrize("name", NAMES)
def test_layer_maps_have_every_epoch_and_name_their_numbers(name, data, network):
    result = fit(network, data, strategies(name), epochs=4, batch_size=256, progress=False)
    for each in result.layer_maps.values():
        assert list(each.table.columns) == [1, 2, 3, 4]
        assert each.table.index.is_unique
        assert len(each.table)
        assert each.label or each.states
        if each.states:
            assert set(each.table.to_numpy().ravel()) <= set(range(len(each.states)))


@pytest.mark.parametrize("name", NAMES)
def test_one_object_fits_twice(name, data, network):
    strategy = strategies(name)
    options = dict(epochs=3, batch_size=256)
    models = []
    for _ in range(2):
        job = Fit(network, data, strategy, **options)
        while not job.finished:
            job.train_epoch()
        models.append(job.finish().model)
    assert same_weights(*models)
