"""The parts of fast recipes: each does what its source says, any network can take it, and it goes on bit-equal."""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import pytest
import torch
from helpers import Freezer, same_weights
from torch import nn

from layerlab import (
    Fit,
    LayerlabError,
    LayerlabWarning,
    Preflight,
    Replaced,
    Run,
    Strategy,
    build_model,
    evaluate,
    fit,
    load_dataset,
)
from layerlab.training import choosing
from layerlab.training.averaging import OWNER
from layerlab.training.muon import orthogonalised
from layerlab.training.settings import Settings, checked_settings, make_schedule, shortened

QUICK = dict(epochs=2, batch_size=256, progress=False)
PARTS = {
    "sizes": dict(sizes=((0.0, 0.5), (0.5, 1.0))),
    "alternate": dict(augment="translate-alternate", padding=1),
    "muon": dict(optimizer="muon", lr=0.02, muon_lr=0.02, muon_norm=True, bias_scale=4.0),
    "ema": dict(averaging="ema", averaging_every=2),
    "lookahead": dict(averaging="lookahead", averaging_every=2, averaging_power=1.0),
    "whitening": dict(whitening=True),
    "cycle": dict(schedule="one-cycle", schedule_each="step", warmup=0.3),
    "auto": dict(channels_last="auto"),
    "divided": dict(accumulate=2, clip_norm=0.5, views="mirrored"),
}


class Watch(Strategy):
    """Notes the rate and the shape of every step's images."""

    name: ClassVar[str] = "watch"
    rates: ClassVar[list[float]] = []
    shapes: ClassVar[list[tuple[int, ...]]] = []

    def preflight(self, network, example) -> Preflight:
        # The steps of the fit alone are watched.
        return Preflight.of(network)

    def on_fit_start(self, run: Run) -> None:
        self.rates.clear()
        self.shapes.clear()
        next(run.model.children()).register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if module.training:
            self.shapes.append(tuple(given[0].shape))

    def on_after_backward(self, run: Run) -> None:
        self.rates.append(run.optimizer.param_groups[0]["lr"])


def small() -> nn.Module:
    """A convolution, a batch norm and a linear layer, for images of any side."""
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 10))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stop", [1, 3])
def test_every_part_goes_on_bit_equal_with_layers_that_freeze_and_thaw(digits, tmp_path, part, stop, one_thread):
    options = dict(epochs=4, batch_size=256, **PARTS[part])
    first = Fit(small, digits, Freezer(), checkpoint=tmp_path / "a", **options)
    for _ in range(stop):
        first.train_epoch()
    second = fit(small, digits, Freezer(), checkpoint=tmp_path / "a", progress=False, **options)
    while not first.finished:
        first.checkpoint = None
        first.train_epoch()
    whole = first.finish()
    assert same_weights(whole.model, second.model)
    keep = ("train/loss", "test/loss", "test/top1")
    assert [[row[k] for k in keep] for row in whole.history] == [[row[k] for k in keep] for row in second.history]
    assert len({row["train/loss"] for row in whole.history}) == 4


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_without_the_part_is_another_fit_s(digits, tmp_path, part):
    fit(small, digits, checkpoint=tmp_path, **QUICK)
    with pytest.raises(LayerlabError, match="other arguments"):
        fit(small, digits, checkpoint=tmp_path, **QUICK | PARTS[part])


def test_alternating_flips_show_each_side_once_in_two_epochs_and_half_of_them_in_each(digits):
    train = digits.augmented("translate-alternate", 0).train
    generator = torch.Generator().manual_seed(3)
    plain = train.normalise(train.images)
    symmetric = (plain == plain.flip(-1)).flatten(1).all(1)
    mirrored = []
    for epoch in (1, 2, 3):
        train.moment.epoch = epoch
        order = torch.randperm(len(train), generator=_copy_of(generator))
        x = torch.cat([x for x, _ in train.batches(1, generator)])
        found = torch.zeros(len(train), dtype=torch.bool)
        found[order] = (x != plain[order]).flatten(1).any(1)
        mirrored.append(found)
    assert torch.equal(mirrored[0] ^ mirrored[1], ~symmetric)
    assert torch.equal(mirrored[0], mirrored[2])
    assert 0.4 < mirrored[0].float().mean() < 0.6


def _copy_of(generator: torch.Generator) -> torch.Generator:
    other = torch.Generator()
    other.set_state(generator.get_state())
    return other


def test_a_translation_shows_the_reflection_outside_of_the_image(digits):
    train = digits.augmented("translate", 2).train
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(train), generator=_copy_of(generator))
    x, _ = next(train.batches(64, generator))
    padded = nn.functional.pad(train.normalise(train.images[order[:64]]), [2] * 4, mode="reflect")
    moved = set()
    for given, wide in zip(x, padded, strict=True):
        places = [(r, c) for r in range(5) for c in range(5) if torch.equal(given, wide[:, r:r + 8, c:c + 8])]
        assert places
        moved.update(places[:1])
    assert len(moved) > 15


def test_training_begins_with_small_images_and_its_cost_shows_it(digits):
    result = fit(small, digits, Watch(), **QUICK | dict(epochs=4), sizes=((0.0, 0.5), (0.5, 0.75), (0.75, 1.0)))
    steps = len(digits.train) // 256
    assert [shape[2:] for shape in Watch.shapes[::steps]] == [(4, 4), (4, 4), (6, 6), (8, 8)]
    flops = [row["cost/forward_flops"] for row in result.history]
    # Of a 3 × 3 convolution's outputs 2², 2², 4² and 6².
    assert flops[0] == flops[1] < flops[2] < flops[3]
    assert digits.train.shape == (1, 8, 8)


def test_rates_rise_and_fall_as_their_names_say_in_steps_of_the_whole_training(digits):
    def factors(**settings: object) -> list[float]:
        fit(small, digits, Watch(), **QUICK, lr=2.0, schedule_each="step", measure=False, **settings)
        return [rate / 2.0 for rate in Watch.rates]

    whole = 2 * (len(digits.train) // 256)
    assert whole == 10
    assert factors(schedule="triangle", warmup=0.4, lr_start=0.2, lr_end=0.1) == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0, 0.85, 0.7, 0.55, 0.4, 0.25])
    wanted = [step / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 7)) / 2 for step in range(10)]
    assert factors(schedule="one-cycle", lr_start=0.0) == pytest.approx(wanted)
    assert factors(schedule="cosine", lr_start=0.0, warmup=0.3) == pytest.approx(wanted)
    assert factors(schedule="constant", lr_start=0.5, warmup=0.2) == pytest.approx([0.5, 0.75] + 8 * [1.0])
    assert factors(schedule="step", milestones=(5,), warmup=0.2, lr_start=0.0) == pytest.approx(
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1])


def test_a_cycle_and_its_sizes_shorten_with_the_training():
    settings = checked_settings({"recipe": "fast", "epochs": 10})
    short = shortened(settings, steps=20, budget=50)
    assert (short.epochs, short.max_steps, short.sizes) == (3, 50, settings.sizes)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = make_schedule(short.model_copy(update={"warmup": 0.2, "lr_start": 0.0}), optimizer, 20)
    rates = []
    for _ in range(51):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates.index(max(rates)) == 10
    # Data that grew do not send it on a second way up.
    assert rates[50] == optimizer.param_groups[0]["lr"] == pytest.approx(settings.lr_end)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (8, 8)])
def test_muon_s_update_has_singular_values_near_one_and_the_same_directions(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = left * torch.linspace(0.3, 3.0, left.shape[1]) @ right
    inner = left.T @ orthogonalised(matrix) @ right.T
    assert ((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3)).all()
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-3


def test_muon_trains_kernels_and_hidden_matrices_by_it_and_the_rest_by_sgd(digits, residual):
    run = Fit(residual, digits, optimizer="muon", lr=0.1, muon_lr=0.02, bias_scale=4.0, weight_decay=0.01).run
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    groups = [(sorted(names[each] for each in group["params"]), group["lr"], group["weight_decay"], group["hidden"])
              for group in run.optimizer.param_groups]
    flat = sorted(name for parameter, name in names.items() if parameter.dim() == 1)
    # The network declares its classifier first and runs it last.
    assert groups == [
        (["conv1.weight", "conv2.weight"], 0.02, 0.01, True),
        (["classifier.weight"], 0.1, 0.01, False),
        (flat, 0.4, 0.0025, False),
    ]
    result = fit(residual, digits, optimizer="muon", lr=0.1, muon_lr=0.02, progress=False, epochs=3, batch_size=64)
    assert result.final["test/top1"] > 0.5


def test_an_ema_is_the_average_that_a_loop_by_hand_keeps_and_the_training_goes_on_without_it(digits):
    options = dict(batch_size=256, lr=0.05, progress=False)
    averaged = Fit(small, digits, averaging="ema", averaging_every=2, averaging_decay=0.8, epochs=3, batch_size=256)
    plain = Fit(small, digits, epochs=3, batch_size=256)
    for _ in range(2):
        averaged.train_epoch()
        plain.train_epoch()
    assert same_weights(averaged.run.model, plain.run.model)
    assert averaged.run.history[-1]["test/loss"] != plain.run.history[-1]["test/loss"]

    torch.manual_seed(0)
    model, step, average = small().train(), 0, None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, foreach=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for x, y in digits.train.batches(256, generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            step += 1
            if step % 2 == 0:
                now = [each.detach().clone() for each in model.parameters()]
                average = now if average is None else [0.8 * a + 0.2 * b for a, b in zip(average, now, strict=True)]
    result = fit(small, digits, averaging="ema", averaging_every=2, averaging_decay=0.8, epochs=3, **options)
    for own, by_hand in zip(result.model.parameters(), average, strict=True):
        assert torch.allclose(own, by_hand, atol=1e-5)


@pytest.mark.parametrize("kind", ["ema", "lookahead"])
def test_batch_norm_statistics_are_those_of_the_averaged_weights(digits, kind):
    model = fit(small, digits, averaging=kind, averaging_decay=0.9, averaging_every=1, epochs=3, batch_size=256,
                lr=0.3, progress=False).model
    x = digits.train.normalise(digits.train.images)
    outputs = model[0](x)
    norm = model[1]
    assert torch.allclose(norm.running_mean, outputs.mean((0, 2, 3)), atol=0.03)
    assert torch.allclose(norm.running_var, outputs.var((0, 2, 3)), rtol=0.05)
    assert norm.momentum == 0.1


def test_lookahead_sets_the_weights_to_their_average(digits):
    job = Fit(small, digits, averaging="lookahead", averaging_every=5, epochs=2, batch_size=256)
    job.train_epoch()
    # Five steps an epoch: the last one ended with an update.
    assert job.run.step == 5
    for parameter in job.run.model.parameters():
        assert torch.equal(parameter, job.run.kept[OWNER][parameter])


def test_an_average_follows_a_change_of_structure(digits):
    job = Fit(small, digits, averaging="ema", averaging_every=1, epochs=2, batch_size=256)
    job.train_epoch()
    old = job.run.model
    new = copy.deepcopy(old)
    new[0], new[1], new[5] = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)
    kept = {name: job.run.kept[OWNER][each] for name, each in old.named_parameters()}
    replaced = [
        Replaced(each, new.get_parameter(name), None if name == "5.bias" else
                 (lambda given: given[:, :4] if given.dim() == 2 else given[:4]))
        for name, each in old.named_parameters()
    ]
    job.run.restructure(new, replaced)
    assert torch.equal(job.run.kept[OWNER][new[0].weight], kept["0.weight"][:4])
    assert set(job.run.kept[OWNER]) == set(new.parameters()) - {new[5].bias}
    job.train_epoch()
    assert job.finish().model[0].weight.shape == (4, 1, 3, 3)


def test_the_first_convolution_whitens_the_patches_of_the_training_images():
    data = load_dataset("digits", channels=3, image_size=8, device="cpu")
    torch.manual_seed(0)
    noise = torch.randint(0, 256, data.train.images.shape, dtype=torch.uint8)
    data.train.images.copy_(noise)
    network = nn.Sequential(nn.Conv2d(3, 24, 2), nn.Flatten(), nn.Linear(24 * 49, 10))
    layer = Fit(network, data, whitening=True, epochs=4, batch_size=256).run.model[0]
    assert not layer.weight.requires_grad
    assert torch.equal(layer.weight[12:], -layer.weight[:12])
    outputs = layer(data.train.normalise(data.train.images))[:, :12].transpose(0, 1).flatten(1)
    assert torch.allclose(outputs @ outputs.T / outputs.shape[1], torch.eye(12), atol=0.01)


def test_the_bias_of_the_whitening_learns_in_the_first_epochs_and_is_thawed_at_the_end(digits):
    job = Fit(lambda: nn.Sequential(nn.Conv2d(1, 8, 2), nn.Flatten(), nn.Linear(8 * 49, 10)), digits, whitening=True,
              epochs=4, batch_size=256)
    biases = []
    for _ in range(4):
        job.train_epoch()
        biases.append(job.run.model[0].bias.detach().clone())
    assert biases[0].abs().max() > 0
    assert torch.equal(biases[0], biases[3])
    layer = job.finish().model[0]
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)


def test_accumulated_parts_have_the_gradient_of_the_whole(digits):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    whole = fit(network, digits, **QUICK)
    parts = fit(network, digits, accumulate=3, **QUICK)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert parts.final["train/loss"] == pytest.approx(whole.final["train/loss"], rel=1e-5)


def test_a_clipped_step_is_as_long_as_the_norm(digits):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    result = fit(network, digits, clip_norm=0.01, lr=1.0, momentum=0.0, weight_decay=0.0, max_steps=1, **QUICK)
    moved = [a - b for a, b in zip(result.model.parameters(), network.parameters(), strict=True)]
    assert sum(each.square().sum() for each in moved).sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_views_are_judged_by_their_mean_logits(digits):
    model = small().eval()
    x, y = next(digits.test.batches(len(digits.test)))
    around = nn.functional.pad(x, [1] * 4, mode="reflect")
    up_left, down_right = around[..., :-2, :-2], around[..., 2:, 2:]
    mirrored = [(model(each) + model(each.flip(-1))) / 2 for each in (x, up_left, down_right)]
    for views, logits in (("mirrored", mirrored[0]),
                          ("shifted", 0.5 * mirrored[0] + 0.25 * mirrored[1] + 0.25 * mirrored[2])):
        row = evaluate(model, digits.test, views=views)
        assert row["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
        assert row["test/top1"] == pytest.approx((logits.argmax(1) == y).float().mean().item())


def test_only_the_last_epochs_pay_for_views(digits):
    fits = [fit(small, digits, **QUICK | {"epochs": 4, **more}) for more in (
        {}, {"views": "shifted"}, {"views": "shifted", "views_from": 0.75}, {"views": "shifted", "views_from": 1.0})]
    plain, everywhere, late, last = [[row["test/loss"] for row in each.history] for each in fits]
    assert all(a != b for a, b in zip(plain, everywhere, strict=True))
    assert late == [*plain[:2], *everywhere[2:]]
    assert last == [*plain[:3], everywhere[3]]
    assert all(same_weights(fits[0].model, each.model) for each in fits)


def test_a_format_that_was_measured_is_one_of_both_and_touches_no_random_state(digits, residual):
    chosen = Fit(residual, digits, channels_last="auto", **{k: v for k, v in QUICK.items() if k != "progress"})
    last = chosen.run.memory_format is torch.channels_last
    measured = fit(residual, digits, channels_last="auto", **QUICK)
    plain = [fit(residual, digits, channels_last=each, **QUICK) for each in (False, True)]
    assert any(same_weights(measured.model, each.model) for each in plain)
    assert last or chosen.run.memory_format is torch.contiguous_format


@pytest.mark.parametrize("text", ["", "{}", '{"memory_format": "sideways"}', "[1]"])
def test_a_damaged_choice_of_format_is_one_sentence(digits, residual, tmp_path, text):
    Fit(residual, digits, channels_last="auto", checkpoint=tmp_path, epochs=2, batch_size=256).train_epoch()
    (tmp_path / choosing.CHOSEN).write_text(text)
    with pytest.raises(LayerlabError, match="does not say in which memory format this fit computes; delete the folder"):
        Fit(residual, digits, channels_last="auto", checkpoint=tmp_path, epochs=2, batch_size=256)


def test_slow_bfloat16_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setattr(choosing, "SLOWER", 0.0)
    with pytest.warns(LayerlabWarning, match=r"takes [0-9.]+ times as long .* in bfloat16 .*; use precision='float32'"):
        choosing.warn_of_slow(torch.device("cpu"), torch.bfloat16)


def test_a_recipe_is_a_bundle_whose_every_setting_can_be_given():
    plain, fast = Settings(), checked_settings({"recipe": "fast"})
    assert fast.whitening
    assert fast.optimizer == "muon"
    own = checked_settings({"recipe": "fast", "optimizer": "sgd", "lr": 0.1, "whitening": False})
    assert (own.optimizer, own.lr, own.whitening, own.sizes) == ("sgd", 0.1, False, fast.sizes)
    # What is plain's and given counts, too; and what `compare` hands on stays as it is.
    assert checked_settings({"recipe": "fast", "epochs": plain.epochs}).epochs == plain.epochs
    assert checked_settings(own.keywords()) == own


def test_the_fast_recipe_trains_airnet_and_a_strategy_with_it():
    data = load_dataset("digits", channels=3, image_size=16, device="cpu")
    network = lambda: build_model("airnet", widths=(8, 16, 16))  # noqa: E731
    options = dict(recipe="fast", epochs=4, batch_size=64, progress=False)
    plain = fit(network, data, **options)
    frozen = fit(network, data, Freezer(), **options)
    assert min(plain.final["test/top1"], frozen.final["test/top1"]) > 0.5
    assert plain.history[0]["cost/forward_flops"] < plain.history[-1]["cost/forward_flops"]


class Sends(Strategy):
    """Uses gradients while backward runs."""

    name: ClassVar[str] = "sends"
    acts_in_backward: ClassVar[bool] = True


class Steps(Strategy):
    """Replaces the step."""

    name: ClassVar[str] = "steps"

    def training_step(self, run: Run, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return run.plain_step(x, y)


@pytest.mark.parametrize(("change", "message"), [
    ({"recipe": "quick"}, "setting 'recipe' should be 'fast', got 'quick'"),
    ({"augment": "crop_flip"}, "setting 'augment' should be 'none', 'crop', 'crop-flip'"),
    ({"sizes": ((0.5, 0.5), (0.2, 1))}, "'sizes' should begin each size at a later share"),
    ({"sizes": ((0, 24),)}, "'sizes' should have sides that are shares"),
    ({"sizes": ((0, 0.25),)}, r"does not take images of 2 pixels a side .*; leave sizes=\(\)"),
    ({"warmup": 1.0}, "'warmup' should be less than 1"),
    ({"averaging": "swa"}, "'averaging' should be 'none', 'ema' or 'lookahead'"),
    ({"clip_norm": 0}, "'clip_norm' should be greater than 0"),
    ({"accumulate": 0}, "'accumulate' should be greater than or equal to 1"),
    ({"strategies": Steps(), "accumulate": 2}, "steps replaces the training step.*leave accumulate=1"),
    ({"strategies": Sends(), "clip_norm": 1.0}, "sends uses gradients while backward runs.*clip_norm=None"),
])
def test_bad_input_gets_one_sentence(digits, change, message):
    with pytest.raises(LayerlabError, match=message):
        fit(small, digits, **QUICK | change)


@pytest.mark.parametrize(("network", "message"), [
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "first layer, which has to be a plain convolution.*'1' is Linear"),
    (nn.Sequential(nn.Conv2d(1, 19, 3), nn.Flatten(), nn.Linear(19 * 36, 10)), "at most 18 filters.*'0' has 19"),
])
def test_a_first_layer_that_cannot_whiten_is_refused_with_the_reason(digits, network, message):
    with pytest.raises(LayerlabError, match=message):
        fit(network, digits, whitening=True, **QUICK)


def test_airnet_is_refused_other_than_three_widths():
    with pytest.raises(LayerlabError, match=r"three blocks, got widths=\(8, 8\)"):
        build_model("airnet", widths=(8, 8))
