"""What is told of errors that are not our own: one line each, also of one that says nothing."""

from __future__ import annotations

import inspect
import math
import pickle
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from layerlab import (
    Diverged,
    LayerlabError,
    Refused,
    Strategy,
    build_model,
    compare,
    evaluate,
    explore,
    fit,
    load_dataset,
    load_model,
    measure,
    noise,
    own_data,
    pass_order,
    prefixes,
)
from layerlab.base.errors import first_line, nearest, reason
from layerlab.testing.networks import mlp, plain_cnn
from layerlab.training.settings import ARGUMENTS, ARGUMENTS_OF_COMPARE, checked_settings


@pytest.mark.parametrize(
    ("error", "whole", "first"),
    [
        (LayerlabError("Too small; enlarge it."), "Too small; enlarge it.", "Too small; enlarge it."),
        (ValueError("\n  no\n  such  thing"), "ValueError: no such thing", "no"),
        (MemoryError(), "MemoryError", "MemoryError"),
        (RuntimeError(" \n"), "RuntimeError", "RuntimeError"),
    ],
)
def test_an_error_is_told_in_one_line(error, whole, first):
    assert reason(error) == whole
    assert first_line(error) == first


class Explodes(Strategy):
    """Makes gradients huge in the second epoch."""

    name: ClassVar[str] = "explodes"

    def on_after_backward(self, run) -> None:
        for parameter in run.model.parameters():
            parameter.grad *= 1e30 if run.epoch == 2 else 1.0


@pytest.mark.parametrize("build", [mlp, plain_cnn])
def test_a_training_that_diverges_keeps_its_history_and_its_traceback(build):
    data = load_dataset("digits", limit=96, test_limit=32, device="cpu")
    with pytest.raises(Diverged, match=r"loss of 'explodes' \(seed 0\) is (nan|inf) in epoch 2") as caught:
        fit(build, data, Explodes(), epochs=3, batch_size=32, measure=False, progress=False)
    first, last = caught.value.history
    assert first["test/top1"] >= 0
    assert last["epoch"] == 2
    assert not math.isfinite(last["train/loss"])
    assert any("loop.py" in line for line in caught.value._render_traceback_())
    assert pickle.loads(pickle.dumps(caught.value)).history[0] == first


@pytest.mark.parametrize(
    ("name", "near"),
    [("num_epochs", "epochs"), ("Batch-Size", "batch_size"), ("lrate", ""), ("weightdecay", "weight_decay"),
     ("wd", "weight_decay"), ("learning_rate", "lr"), ("batch", "batch_size"), ("device_name", "device"), ("cb", "")],
)
def test_the_name_that_is_meant_is_named(name, near):
    known = ("epochs", "max_steps", "batch_size", "lr", "weight_decay", "device", "momentum")
    assert nearest(name, known) == near


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_epochs": 3}, r"^fit has no setting 'n_epochs' \(did you mean 'epochs'\?\)\.$"),
        ({"callbacks": "f1"}, r"^fit has no setting 'callbacks' \(it has accumulate, .*whitening\)\.$"),
        ({"strategy": "mine"}, r"did you mean 'strategies'"),
        # One value that no alternative takes is one problem.
        ({"optimizer": "SGD"}, r"^fit: setting 'optimizer' should be 'sgd', .* or be a function, got 'SGD' \(did you "
                               r"mean 'sgd'\?\)\.$"),
        ({"optimizer": torch.optim.SGD([torch.zeros(900)])}, r"^.{0,200}…\.$"),
        ({"schedule": 3}, r"^fit: setting 'schedule' should be 'constant', .* or be a function, got 3\.$"),
    ],
)
def test_settings_that_do_not_exist_or_fit_are_told_in_one_short_sentence(settings, message):
    with pytest.raises(Refused, match=message):
        checked_settings(settings)


def test_the_arguments_of_fit_and_compare_that_are_no_settings_are_known_by_name():
    own = set(inspect.signature(fit).parameters) - {"model", "data", "settings"}
    assert set(ARGUMENTS) == own
    assert set(ARGUMENTS_OF_COMPARE) == set(inspect.signature(compare).parameters) - {
        "model", "data", "arms", "settings"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, data: fit(net, data, max_epochs=2), r"fit has no setting 'max_epochs' \(did you mean 'epochs'"),
        (lambda net, data: fit(net, data, seeds=[1]), r"fit has no setting 'seeds' \(did you mean 'seed'"),
        (lambda net, data: compare(net, data, {"a": ()}, seed=1), r"compare has no .*did you mean 'seeds'"),
        (lambda net, data: fit(net, data, seed="one"), "fit: setting 'seed' should be a valid integer"),
        (lambda net, data: fit(net, data, seed=["one"]), "^fit: setting 'seed.0' should be a valid integer, [^;]*$"),
        (lambda net, data: compare({"a": 3}, data, {"a": ()}), "setting 'model.a' should be an instance of Module"),
        (lambda net, data: fit(net, data, seed=1.5), "fit: setting 'seed' should be a valid integer"),
        (lambda net, data: fit(net, data, name=3), "fit: setting 'name' should be a valid string, got 3"),
        (lambda net, data: fit(net, data, observers="mlflow"), "fit: setting 'observers.*got 'mlflow'"),
        (lambda net, data: fit(net, data, 3), "strategies are objects of layerlab.Strategy, .* got 3"),
        (lambda net, data: fit(net, data, checkpoint=3), "setting 'checkpoint' should be a valid string or"),
        (lambda net, data: compare(net, data, {"a": ()}, at_once=0), "'at_once' should be greater than or equal to 1"),
        (lambda net, data: compare(net, data, {"a": ()}, keep_going=["b"]), r"got \['b'\]; the arms are 'a'"),
        (lambda net, data: evaluate(net(), data.test, batchsize=3), "did you mean 'batch_size'"),
        (lambda net, data: evaluate(net(), data), "evaluate takes a half of data, such as `data.test`"),
        (lambda net, data: evaluate(net(), data.test, views="mirror"), "did you mean 'mirrored'"),
        (lambda net, data: data.augmented("crop", pading=1), "did you mean 'padding'"),
        (lambda net, data: own_data((data, data), transfrom=1), "did you mean 'transform'"),
        (lambda net, data: prefixes(net(), torch.zeros(2, 64), kinds=nn.Linear), "did you mean 'kind'"),
        (lambda net, data: load_model("none.pt", devise="cpu"), "did you mean 'device'"),
        (lambda net, data: measure.time_by_turns({}, round=3), "did you mean 'rounds'"),
        (lambda net, data: explore.make_arms(combination=[]), "did you mean 'combinations'"),
    ],
)
def test_every_public_function_refuses_what_it_does_not_know(digits, call, message):
    with pytest.raises(LayerlabError, match=message):
        call(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits)


def test_a_metric_that_nothing_has_logged_is_told_with_the_nearest_name(digits):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    runs = compare(network, digits, {"a": (), "b": ()}, epochs=1, progress=False, measure=False)
    result = runs.results["a", 0]
    for ask in (lambda: runs.paired("test/topp1", "a", "b"), lambda: result.time_to(0.1, "test/topp1"),
                lambda: result.total("test/topp1"), lambda: runs.speedup("a", "b", "test/topp1")):
        with pytest.raises(LayerlabError, match=r"Unknown metric 'test/topp1'. Did you mean 'test/top1'\?"):
            ask()
    assert math.isnan(result.total("cost/energy_joules"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: data.augmented("crop_flip"), r"Unknown augmentation 'crop_flip'. Did you mean 'crop-flip'\?"),
        (lambda data: data.augmented("Flip"), r"Did you mean 'crop-flip'\?"),
        (lambda data: data.augmented(None), r"Unknown augmentation None. Did you mean 'none'\?"),
        (lambda data: data.augmented(lambda x: x), r"Unknown augmentation <function .*Known: crop, crop-alt"),
        (lambda data: replace(data.train, augment="cutout"), r"Unknown augmentation 'cutout'"),
        (lambda data: data.augmented("crop", -1), r"padding must be a whole number of pixels, at least 0, got -1"),
        (lambda data: replace(data.train, share=(2, 2)), r"share must be \(index, count\)"),
        (lambda data: data.held_out(1), r"held_out: setting 'every' should be greater than or equal to 2, got 1"),
        (lambda data: data.with_validation(evry=3), r"has no setting 'evry' \(did you mean 'every'\?\)"),
        (lambda data: noise(0, (1, 8, 8)), r"noise: setting 'images' should be greater"),
        (lambda data: pass_order(4, 0, None), r"pass_order: setting 'batch_size' should be greater"),
        (lambda data: load_dataset("digits", size=8), r"no setting 'size' \(did you mean 'image_size'\?\)"),
        (lambda data: load_dataset("digits", channels=4), r"setting 'channels' should be 1 or 3, got 4"),
        (lambda data: load_dataset("digits", on_bad="skp"), r"'raise' or 'skip', got 'skp' \(did you mean 'skip'\?\)"),
        (lambda data: load_dataset(torch.zeros(3)), r"setting 'name' should be a valid string"),
    ],
)
def test_public_functions_on_data_refuse_what_they_do_not_know(digits, call, message):
    with pytest.raises(LayerlabError, match=message):
        call(digits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, data: fit(net, [(torch.zeros(4, 1, 8, 8), torch.zeros(4))]),
         r"data cannot be tensors; give \(train, test\), or .* or what load_dataset gives"),
        (lambda net, data: compare(net, data, ["lars-skip"]), r"arms must map the name of each arm .*, got list"),
        (lambda net, data: fit(net, data, "lars-skp"), r"Unknown strategy 'lars-skp'. Did you mean 'lars-skip'\?"),
        (lambda net, data: fit(net, data, loss=torch.nn.L1Loss(), batch_size=32),
         r"The loss does not map logits of shape \(2, 10\) and labels of shape \(2,\) to one number \(.*\); give a"),
        (lambda net, data: fit(net, data, loss=torch.nn.CrossEntropyLoss(reduction="none"), batch_size=32),
         r"it gives \(2,\)"),
        (lambda net, data: build_model("resnet18", num_clases=7), r"Network 'resnet18' cannot be"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_people_from_other_libraries_pass_is_told_in_one_sentence(digits, call, message):
    with pytest.raises(LayerlabError, match=message):
        call(mlp, digits)


def test_an_installed_strategy_can_be_given_by_its_name():
    data = load_dataset("digits", limit=64, test_limit=32, device="cpu")
    result = fit(plain_cnn, data, ["lars-skip"], epochs=1, batch_size=32, measure=False, progress=False)
    assert [strategy.name for strategy in result.strategies] == ["lars-skip"]
