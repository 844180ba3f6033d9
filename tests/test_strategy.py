"""The contract: settings, hooks in order, composition."""

from __future__ import annotations

from typing import ClassVar

import pandas as pd
import pytest
import torch
from helpers import Freezer, same_weights
from pydantic import Field
from torch import nn

from layerlab import LayerlabError, LayerMap, Replaced, Run, Strategy, fit
from layerlab.training.loop import Fit


class Recorder(Strategy):
    name: ClassVar[str] = "recorder"
    strength: float = Field(1.0, ge=0)

    def __init__(self, **settings):
        super().__init__(**settings)
        object.__setattr__(self, "events", [])

    def on_fit_start(self, run: Run) -> None:
        self.events.append("fit start")

    def on_epoch_start(self, run: Run) -> None:
        self.events.append(f"epoch {run.epoch} start")

    def on_after_backward(self, run: Run) -> None:
        assert all(p.grad is not None for p in run.model.parameters())
        self.events.append("after backward")

    def on_epoch_end(self, run: Run) -> None:
        self.events.append(f"epoch {run.epoch} end")

    def on_validation_end(self, run: Run) -> None:
        assert not run.model.training
        self.events.append(f"epoch {run.epoch} evaluated")
        run.log("recorder/evaluated", run.epoch)

    def on_fit_end(self, run: Run) -> None:
        self.events.append("fit end")


class Stepper(Strategy):
    name: ClassVar[str] = "stepper"

    def training_step(self, run: Run, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        run.optimizer.zero_grad(set_to_none=True)
        loss = run.loss(run.training_model(x), y)
        run.backward(loss)
        run.optimizer.step()
        return loss


class Mapped(Freezer):
    name: ClassVar[str] = "mapped"

    def layer_maps(self, history):
        table = pd.DataFrame({row["epoch"]: [float(index < row["freezer/frozen"]) for index in range(4)]
                              for row in history}, index=["conv1", "bn1", "conv2", "bn2"])
        return {"frozen": LayerMap(table, "", ("learns", "frozen"))}


def test_a_result_has_the_layer_maps_of_its_strategies(digits, residual):
    result = fit(residual, digits, [Stepper(), Mapped()], epochs=3, batch_size=512, progress=False)
    assert list(result.layer_maps) == ["mapped: frozen"]
    table = result.layer_maps["mapped: frozen"].table
    assert list(table.columns) == [1, 2, 3]
    assert [int(table[epoch].sum()) for epoch in table] == [0, 2, 4]
    assert fit(residual, digits, epochs=1, batch_size=512, progress=False).layer_maps == {}


def test_hooks_are_called_in_order(digits, residual):
    # Strategies are copied for a comparison, so the list is read from the result's own.
    result = fit(residual(), digits, Recorder(), epochs=2, batch_size=512, progress=False)
    steps = ["after backward"] * (len(digits.train) // 512)
    assert result.strategies[0].events == [
        "fit start", "epoch 1 start", *steps, "epoch 1 end", "epoch 1 evaluated",
        "epoch 2 start", *steps, "epoch 2 end", "epoch 2 evaluated", "fit end",
    ]
    assert [row["recorder/evaluated"] for row in result.history] == [1, 2]


def test_a_replaced_step_calls_the_other_strategies_after_backward_and_trains_the_same(digits, residual):
    torch.manual_seed(0)
    model = residual()
    plain = fit(model, digits, Recorder(), epochs=1, batch_size=512, progress=False)
    stepped = fit(model, digits, [Stepper(), Recorder()], epochs=1, batch_size=512, progress=False)
    assert stepped.strategies[1].events == plain.strategies[0].events
    assert stepped.final["train/loss"] == plain.final["train/loss"]


def test_two_strategies_that_replace_the_step_are_refused_with_the_reason(digits, residual):
    class Other(Stepper):
        name: ClassVar[str] = "other"

    with pytest.raises(LayerlabError, match=r"'stepper' and 'other' cannot run together.*training_step"):
        fit(residual(), digits, [Stepper(), Other()], epochs=1, progress=False)


class Headless(Strategy):
    """From the second epoch on, the classifier trains alone, on two stored halves of what comes before it."""

    name: ClassVar[str] = "headless"
    replaces_network: ClassVar[bool] = True

    def on_epoch_start(self, run: Run) -> None:
        if run.epoch == 2:
            run.training_model, run.data = Joined(run.model.classifier), Halves(len(run.data))


class Joined(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, halves: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.layer(torch.cat(halves, 1))


class Halves:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size, generator, dtype, memory_format):
        for _ in range(self.count // batch_size):
            yield (torch.ones(batch_size, 6), torch.zeros(batch_size, 10)), torch.zeros(batch_size, dtype=torch.long)


def test_the_network_that_trains_and_its_data_may_be_others_than_the_one_that_predicts(digits, residual):
    result = fit(residual(), digits, Headless(), epochs=2, batch_size=512, progress=False)
    first, second = result.history
    assert second["cost/forward_flops"] == 2 * 512 * 16 * 10 * (len(digits.train) // 512)
    # The weights that do not train at present are in memory too; of the step there is little more.
    weights = sum(4 * parameter.numel() for parameter in result.model.parameters())
    assert 2 * weights + 4 * 512 * 16 < second["cost/peak_memory_bytes"] < first["cost/peak_memory_bytes"]


def test_a_strategy_that_replaces_the_network_is_refused_beside_one_that_replaces_the_step(digits, residual):
    with pytest.raises(LayerlabError, match=r"'headless' and 'stepper' cannot run together.*the network that trains"):
        fit(residual(), digits, [Stepper(), Headless()], epochs=1, progress=False)


class OwnRates(Strategy):
    """The classifier learns at the fit's rate, everything else at one that falls with every step."""

    name: ClassVar[str] = "own-rates"

    def __init__(self, **settings):
        super().__init__(**settings)
        object.__setattr__(self, "rates", [])

    def on_fit_start(self, run: Run) -> None:
        (group,) = run.optimizer.param_groups
        last = list(run.model.classifier.parameters())
        rest = [parameter for parameter in group["params"] if all(parameter is not other for other in last)]
        run.optimizer.param_groups[:] = [{**group, "params": last}, {**group, "params": rest}]
        run.schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, [lambda _: 1.0, lambda step: 0.8**step])
        run.schedule_each = "step"

    def on_after_backward(self, run: Run) -> None:
        self.rates.append(tuple(group["lr"] for group in run.optimizer.param_groups))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_strategy_may_put_its_own_rates_and_schedule_in_place(digits, residual, tmp_path, optimizer):
    # Cosine steps each epoch and would fail on two groups, if it were still there.
    options = dict(epochs=3, batch_size=512, lr=0.1, schedule="cosine", optimizer=optimizer)
    whole = fit(residual, digits, OwnRates(), progress=False, **options)
    steps = 3 * (len(digits.train) // 512)
    assert whole.strategies[0].rates == [(0.1, pytest.approx(0.1 * 0.8**step)) for step in range(steps)]
    Fit(residual, digits, OwnRates(), checkpoint=tmp_path, **options).train_epoch()
    again = fit(residual, digits, OwnRates(), checkpoint=tmp_path, progress=False, **options)
    assert again.strategies[0].rates == whole.strategies[0].rates[steps // 3:]
    assert same_weights(whole.model, again.model)


def test_a_strategy_knows_where_the_checkpoint_lies(digits, residual, tmp_path):
    seen = []

    class Looking(Strategy):
        name: ClassVar[str] = "looking"

        def on_fit_start(self, run: Run) -> None:
            seen.append(run.folder)

    for folder in (None, tmp_path):
        fit(residual(), digits, Looking(), epochs=1, batch_size=512, checkpoint=folder, progress=False)
        # The pre-flight, which has no folder, comes before.
        assert seen[-1] == folder


def test_one_strategy_twice_is_refused(digits, residual):
    with pytest.raises(LayerlabError, match="given twice"):
        fit(residual(), digits, [Recorder(), Recorder()], epochs=1, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1}, r"recorder: setting 'strength' should be greater than or equal to 0, got -1"),
        ({"strengh": 1}, r"recorder has no setting 'strengh'"),
    ],
)
def test_settings_that_do_not_validate_get_one_sentence(settings, message):
    with pytest.raises(LayerlabError, match=message):
        Recorder(**settings)


def test_frozen_sets_of_two_strategies_add_up_and_the_users_own_are_never_thawed(digits, residual):
    class Second(Strategy):
        name: ClassVar[str] = "second"

        def on_epoch_start(self, run: Run) -> None:
            run.freeze(self.name, [run.model.conv2])
            trainable = {n for n, p in run.model.named_parameters() if p.requires_grad}
            object.__setattr__(self, "seen", trainable)

    model = residual()
    model.classifier.bias.requires_grad_(False)
    result = fit(model, digits, [Freezer(), Second()], epochs=2, batch_size=512, progress=False)
    # In epoch 2 the freezer holds conv1 and bn1, the other conv2.
    assert result.strategies[1].seen == {"bn2.weight", "bn2.bias", "classifier.weight"}
    assert [n for n, p in result.model.named_parameters() if not p.requires_grad] == ["classifier.bias"]


def test_a_frozen_layer_takes_its_batch_norm_along(digits, residual):
    class Watch(Freezer):
        name: ClassVar[str] = "freezer"

        def on_epoch_end(self, run: Run) -> None:
            super().on_epoch_end(run)
            run.log("freezer/mean", run.model.bn1.running_mean.sum().item())
            run.log("freezer/weight", run.model.conv1.weight.sum().item())

    history = fit(residual(), digits, Watch(), epochs=4, batch_size=128, progress=False).history
    for name in ("freezer/mean", "freezer/weight"):
        values = [row[name] for row in history]
        # Frozen in epochs 2 to 4 (2, 4, 2 modules: conv1 and bn1 first), learning in the first.
        assert values[1] == values[0]
        assert values[3] == values[0]
    thawed = fit(residual(), digits, Watch(), epochs=5, batch_size=128, progress=False).history
    assert thawed[4]["freezer/mean"] != thawed[3]["freezer/mean"]
    assert thawed[4]["freezer/weight"] != thawed[3]["freezer/weight"]


def test_the_network_is_left_as_the_user_would_have_it(digits, residual):
    model = residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fit(model, digits, Freezer(), epochs=2, batch_size=512, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not result.model.training
    assert all(p.requires_grad and p.grad is None for p in result.model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in result.model.modules())
    fresh: nn.Module = residual()
    fresh.load_state_dict(result.model.state_dict())


def test_a_change_of_structure_takes_optimizer_and_freezing_along(digits, residual):
    class Halves(Strategy):
        name: ClassVar[str] = "halves"

        def on_epoch_start(self, run: Run) -> None:
            run.freeze(self.name, [run.model.bn2] if run.epoch == 2 else [])
            if run.epoch != 2:
                return
            model, replaced = run.model, []
            kept = slice(0, 8)
            for layer, names in ((model.conv1, ("weight", "bias")), (model.bn1, ("weight", "bias")),
                                 (model.conv2, ("weight", "bias")), (model.bn2, ("weight", "bias"))):
                for name in names:
                    old = getattr(layer, name)
                    new = nn.Parameter(old.detach()[kept].clone())
                    setattr(layer, name, new)
                    replaced.append(Replaced(old, new, lambda tensor: tensor[kept]))
            for bn in (model.bn1, model.bn2):
                bn.running_mean, bn.running_var, bn.num_features = bn.running_mean[kept], bn.running_var[kept], 8
            for layer in (model.conv2, model.classifier):
                old = layer.weight
                layer.weight = nn.Parameter(old.detach()[:, kept].clone())
                replaced.append(Replaced(old, layer.weight, lambda tensor: tensor[:, kept]))
            for parameter, state in run.optimizer.state.items():
                state["momentum_buffer"].copy_(parameter.detach())
            # conv1's bias goes and has no successor.
            model.conv1.bias = None
            run.restructure(model, replaced)

    job = Fit(residual, digits, Halves(), epochs=3, batch_size=256)
    job.train_epoch()
    run, groups = job.run, job.run.optimizer.param_groups
    run.epoch = 2
    job.strategies[0].on_epoch_start(run)
    live = dict(run.model.named_parameters())
    assert "conv1.bias" not in live
    assert run.optimizer.param_groups is groups
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in live.values()]
    assert set(run.optimizer.state) == set(live.values())
    for parameter in live.values():
        assert torch.equal(run.optimizer.state[parameter]["momentum_buffer"], parameter)
    assert {name for name, p in live.items() if not p.requires_grad} == {"bn2.weight", "bn2.bias"}
    run.freeze("halves", [])
    assert all(p.requires_grad for p in live.values())
    job.train_epoch()

    run.training_model = nn.Identity()
    with pytest.raises(LayerlabError, match="structure cannot change while another strategy trains a part"):
        run.restructure(run.model)


def test_a_strategy_says_how_gradients_travel_and_another_sends_them_so(digits, residual):
    class Eighths(Strategy):
        name: ClassVar[str] = "eighths"

        def on_fit_start(self, run: Run) -> None:
            run.wire = self

        def encode(self, name: str, gradient: torch.Tensor) -> tuple[torch.Tensor, int]:
            return (gradient * 8).round().to(torch.int16), -3

        def decode(self, codes: torch.Tensor, exponent: int) -> torch.Tensor:
            return codes * 2.0**exponent

    class Sender(Strategy):
        name: ClassVar[str] = "sender"

        def on_after_backward(self, run: Run) -> None:
            # Alone, as in its pre-flight, there is none.
            if run.wire is None:
                return
            for name, parameter in run.training_model.named_parameters():
                parameter.grad.copy_(run.wire.decode(*run.wire.encode(name, parameter.grad)))

    torch.manual_seed(0)
    model = residual()
    options = dict(epochs=1, batch_size=512, lr=0.5, momentum=0.0, weight_decay=0.0, progress=False)
    sent = fit(model, digits, [Sender(), Eighths()], **options)
    moved = [after - before for after, before in zip(sent.model.parameters(), model.parameters(), strict=True)]
    # Every step of 0.5 × a multiple of 1/8 is a multiple of 1/16.
    assert max(m.abs().max() for m in moved) > 0
    assert all(torch.allclose(16 * m, (16 * m).round(), atol=1e-4) for m in moved)
