"""fit: deterministic, in every precision and memory format, alone or by turns."""

from __future__ import annotations

import copy
import math
import warnings
from typing import ClassVar, get_type_hints

import pytest
import torch
import torch._inductor.config
from helpers import Freezer, same_weights, slow
from torch import fx, nn
from torch._inductor.cpu_vec_isa import pick_vec_isa

from layerlab import (
    LayerlabError,
    LayerlabWarning,
    Preflight,
    Strategy,
    build_model,
    compare,
    evaluate,
    fit,
    load_dataset,
)
from layerlab.training.settings import FitSettings, Settings, shortened

QUICK = dict(epochs=2, batch_size=256, progress=False)


def test_two_runs_give_identical_weights_and_another_seed_others(digits, residual):
    data = digits.augmented("crop-flip", 1)
    first = fit(residual, data, Freezer(), **QUICK)
    torch.rand(3)  # the global random state must not matter
    second = fit(residual, data, Freezer(), **QUICK)
    assert same_weights(first.model, second.model)
    assert not same_weights(first.model, fit(residual, data, Freezer(), seed=1, **QUICK).model)


def test_the_callers_random_state_is_left_alone(digits, residual):
    torch.manual_seed(7)
    wanted = torch.rand(4)
    torch.manual_seed(7)
    fit(residual, digits, **QUICK)
    assert torch.equal(torch.rand(4), wanted)


def test_by_turns_gives_what_each_gives_alone(digits, residual):
    together = compare(residual, digits, {"plain": (), "frozen": Freezer()}, seeds=[0, 1], **QUICK)
    for seed in (0, 1):
        assert same_weights(together.results["plain", seed].model, fit(residual, digits, seed=seed, **QUICK).model)
        alone = fit(residual, digits, Freezer(), seed=seed, **QUICK)
        assert same_weights(together.results["frozen", seed].model, alone.model)
    summary = together.summary.set_index("arm")
    assert summary.loc["plain", "seeds"] == 2
    assert summary.loc["frozen", "TFLOP"] < summary.loc["plain", "TFLOP"]


def test_each_arm_may_have_its_own_network(digits, residual):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    both = compare({"large": residual, "small": plain}, digits, {"small": (), "large": ()}, **QUICK)
    for arm, network in (("small", plain), ("large", residual)):
        assert same_weights(both.results[arm, 0].model, fit(network, digits, **QUICK).model)
    with pytest.raises(LayerlabError, match="No network is given for arm 'large'"):
        compare({"small": plain}, digits, {"small": (), "large": ()}, **QUICK)


def test_several_seeds_in_one_call(digits, residual):
    results = fit(residual, digits, seed=[0, 5], **QUICK)
    assert [result.seed for result in results] == [0, 5]


def test_measuring_changes_nothing(digits, residual):
    measured = fit(residual, digits, Freezer(), **QUICK)
    plain = fit(residual, digits, Freezer(), measure=False, **QUICK)
    assert same_weights(measured.model, plain.model)
    assert "cost/forward_flops" not in plain.final


def test_a_plain_loop_written_by_hand_gives_the_same_weights(digits, residual):
    torch.manual_seed(4)
    model = residual()
    model.drop.p = 0.0
    result = fit(model, digits, seed=4, lr=0.05, momentum=0.9, weight_decay=5e-4, **QUICK)
    by_hand = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, foreach=True)
    generator = torch.Generator().manual_seed(4)
    for _ in range(2):
        for x, y in digits.train.batches(256, generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(x), y).backward()
            optimizer.step()
    assert same_weights(result.model, by_hand)


@pytest.mark.parametrize("settings", [{"precision": "bfloat16"}, {"channels_last": True}, {"optimizer": "adamw"},
                                      {"schedule": "cosine", "schedule_each": "step"}, {"label_smoothing": 0.1}])
def test_settings_train(digits, residual, settings):
    result = fit(residual, digits, **{**QUICK, "epochs": 6, "batch_size": 64, "lr": 0.02, **settings})
    assert result.final["test/top1"] > 0.35
    assert result.final["train/loss"] < 0.85 * result.history[0]["train/loss"]


def test_own_optimizer_schedule_and_loss(digits, residual):
    result = fit(
        residual, digits, optimizer=lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
        schedule=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        loss=nn.MultiMarginLoss(), **QUICK,
    )
    assert result.final["train/loss"] < 1.0


@slow
def test_compiled_layers_that_were_frozen_learn_again_as_in_eager(digits, residual):
    options = dict(epochs=5, batch_size=256, progress=False, lr=0.02)
    model = residual()
    model.drop.p = 0.0  # compiled dropout draws other masks
    eager = fit(model, digits, Freezer(), **options)
    compiled = fit(model, digits, Freezer(), compile=True, **options)
    # 0, 2, 4, 2 and again 0 frozen modules: the first layers freeze and thaw.
    assert [row["freezer/frozen"] for row in compiled.history] == [0, 2, 4, 2, 0]
    for (name, a), b in zip(eager.model.state_dict().items(), compiled.model.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-4, rtol=1e-3), name
    assert not any(module._compiled_call_impl for module in compiled.model.modules())


def test_accuracy_and_loss_are_those_of_the_predictions(digits, residual):
    model = residual()
    row = evaluate(model, digits.test)
    x, y = next(digits.test.batches(len(digits.test)))
    logits = model(x)
    assert row["test/top1"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    order = logits.argsort(1, descending=True)[:, :5]
    assert row["test/top5"] == pytest.approx((order == y[:, None]).any(1).float().mean().item())
    assert row["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1}, "fit: setting 'lr' should be greater than or equal to 0, got -1"),
        ({"learning_rate": 1}, "fit has no setting 'learning_rate'"),
        ({"epochs": 0}, "'epochs' should be greater than or equal to 1"),
        ({"batch_size": 10**6}, "batch_size 1000000 is larger than the 1433 training images"),
        ({"precision": "float8"}, "setting 'precision' should be 'float32', 'bfloat16' or 'float16'"),
        ({"compile": "gcc"}, "setting 'compile' should be true, false or one of .*inductor.*, got 'gcc'"),
        ({"device": "cuda:99"}, "Device 'cuda:99' is not available here"),
        ({"strategies": [3]}, "is no strategy"),
        ({"lr": 1e30}, "Training diverged.*lower the learning rate"),
    ],
)
def test_bad_input_gets_one_sentence(digits, residual, change, message):
    with pytest.raises(LayerlabError, match=message):
        fit(residual, digits, **QUICK | change)


def test_a_network_that_does_not_fit_the_data_is_refused_with_its_shape():
    data = load_dataset("digits", device="cpu")
    with pytest.raises(LayerlabError, match=r"does not take images of shape \(1, 8, 8\)"):
        fit(build_model("mlp", image_size=28), data, **QUICK)
    with pytest.raises(LayerlabError, match="10 classes"):
        fit(build_model("mlp", num_classes=7, image_size=8), data, **QUICK)


def test_help_shows_every_setting_with_its_default_and_its_meaning():
    text = " ".join((fit.__doc__ or "").split())
    for name, field in Settings.model_fields.items():
        assert f"{name} ({field.default!r}): {' '.join((field.description or '').split())}" in text


def test_type_checkers_know_the_settings_that_are_validated():
    fields = get_type_hints(Settings)
    assert get_type_hints(FitSettings) == {name: fields[name] for name in Settings.model_fields}


def test_a_training_may_end_within_an_epoch_and_its_cosine_with_it(digits, residual):
    # 5 steps an epoch: two whole epochs and two steps.
    rates: list[float] = []

    class Watch(Strategy):
        name: ClassVar[str] = "watch"

        def preflight(self, network, example) -> Preflight:
            # Watch the steps of the fit alone.
            return Preflight.of(network)

        def on_after_backward(self, run) -> None:
            rates.append(run.optimizer.param_groups[0]["lr"])

    options = dict(epochs=10, max_steps=12, batch_size=256, lr=0.1, schedule="cosine", progress=False)
    result = fit(residual, digits, Watch(), schedule_each="step", **options)
    assert (result.steps, len(result.history)) == (12, 3)
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(12)])
    first, _, last = [row["cost/forward_flops"] for row in result.history]
    assert last == pytest.approx(first * 2 / 5)
    rates.clear()
    fit(residual, digits, Watch(), **options)
    # By epochs: the whole is 2.4 of them.
    wanted = [0.05 * (1 + math.cos(math.pi * (step // 5) / 2.4)) for step in range(12)]
    assert rates == pytest.approx(wanted)


def test_a_shortened_step_schedule_falls_at_the_same_share_of_the_training():
    settings = Settings(epochs=10, schedule="step", milestones=(5, 8))
    short = shortened(settings, steps=20, budget=50)
    # A quarter of 200 steps; the rate falls after 100 and 160 of them.
    assert (short.epochs, short.max_steps, short.schedule_each, short.milestones) == (3, 50, "step", (25, 40))
    again = shortened(short, steps=20, budget=100)
    assert again.milestones == (50, 80)
    with pytest.raises(LayerlabError, match="cannot be shortened"):
        shortened(Settings(schedule=lambda optimizer: None), steps=20, budget=50)


def test_a_traced_network_is_compiled_although_its_blocks_are_never_called(digits):
    inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    network = nn.Sequential(nn.Sequential(inner), nn.Flatten(), nn.Linear(4 * 6 * 6, 10))
    (row,) = fit(fx.symbolic_trace(network), digits, epochs=1, batch_size=512, compile="aot_eager",
                 progress=False).history
    assert row["compile/graphs"] > 0


def test_what_gives_batches_as_the_contract_says_is_evaluated_as_a_split_is(digits, residual):
    class Plain:
        def __len__(self) -> int:
            return len(digits.test)

        def batches(self, batch_size, generator, dtype, memory_format):
            return digits.test.batches(batch_size, generator, dtype, memory_format)

    model = residual()
    assert evaluate(model, Plain()) == evaluate(model, digits.test)


@slow
@pytest.mark.parametrize(("width", "said"), [(1, 1), (None, 0)])
def test_a_compiled_run_that_cannot_use_the_processor_s_vectors_says_so_once(digits, width, said):
    if width is None and not pick_vec_isa():
        pytest.skip("this processor has no vector instructions that torch.compile uses")
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    with torch._inductor.config.patch({"cpp.simdlen": width}), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(network, digits, Freezer(), epochs=2, batch_size=512, compile=True, progress=False)
    ours = [str(each.message) for each in caught if issubclass(each.category, LayerlabWarning)]
    assert sum("torch.compile finds no vector instructions" in each for each in ours) == said
