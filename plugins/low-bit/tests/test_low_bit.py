"""The strategy on networks: what trains, what is kept, what is reported, what comes back after an interruption."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import Freezer, same_weights
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.nn import functional

from layerlab import (
    Dataset,
    LayerlabError,
    Preflight,
    Run,
    Split,
    Strategy,
    build_model,
    evaluate,
    fit,
    load_dataset,
)
from layerlab.training.loop import Fit
from layerlab_low_bit import LowBit, analysis
from layerlab_low_bit.method.arithmetic import Arithmetic
from layerlab_low_bit.method.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset("digits", device="cpu")


class Network(nn.Module):
    """Convolutions of all kinds, batch norm, in-place and plain activations, pooling, a branch, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.shared = nn.Linear(8, 8)
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)), inplace=True)
        x = functional.max_pool2d(torch.relu(x + self.second(x)), 2)
        x = x.mean((2, 3))
        return self.last(torch.relu(self.shared(torch.relu(self.shared(x)))))


def arithmetic(network: nn.Module, bits: int, units: str = "emulated") -> Arithmetic:
    kinds = {kind: bits for kind in ("activation", "weight", "error", "gradient", "master")}
    store = Store(kinds, "statistic", 1e-4, 1.0, 1, 8, torch.device("cpu"))
    return Arithmetic(store, network.named_parameters, (False, False), True, units, None)


def gradients(network: nn.Module, data: Dataset, context: Any = None) -> list[Tensor]:
    x, y = next(data.train.batches(32, torch.Generator().manual_seed(0)))
    network.zero_grad()
    if context is None:
        functional.cross_entropy(network(x), y).backward()
    else:
        with context:
            loss = functional.cross_entropy(network(x), y)
        loss.backward()
    return [p.grad.clone() for p in network.parameters()]


def test_gradients_approach_the_floats_as_bits_grow(data):
    torch.manual_seed(0)
    network = Network()
    exact = torch.cat([g.flatten() for g in gradients(network, data)])
    off = []
    for bits in (4, 6, 8, 12, 16):
        rounded = torch.cat([g.flatten() for g in gradients(network, data, arithmetic(network, bits))])
        off.append(((rounded - exact).norm() / exact.norm()).item())
    assert off == sorted(off, reverse=True)
    assert off[-1] < 2e-3 < off[0]


def test_int8_units_and_their_emulation_give_the_same_bits(data):
    torch.manual_seed(0)
    network = Network()
    emulated = gradients(network, data, arithmetic(network, 8))
    on_units = gradients(network, data, arithmetic(network, 8, "int8"))
    assert all(torch.equal(a, b) for a, b in zip(emulated, on_units, strict=True))
    five = gradients(network, data, arithmetic(network, 5))
    eighths = gradients(network, data, arithmetic(network, 5, "fp8"))
    assert all(torch.equal(a, b) for a, b in zip(five, eighths, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(emulated, five, strict=True) if a.numel() > 10)


def test_a_training_run_on_int8_units_ends_with_the_emulations_weights(data):
    torch.manual_seed(0)
    network = Network()
    options = dict(epochs=1, batch_size=256, progress=False, measure=False)
    runs = [fit(network, data, LowBit(units=units), **options) for units in ("emulated", "int8")]
    assert same_weights(runs[0].model, runs[1].model)


def test_sixteen_bits_reach_the_float_solution_of_a_linear_problem():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (256, 1, 4, 4), dtype=torch.uint8)
    labels = torch.randint(0, 3, (256,))
    split = Split(images, labels, (127.5,), (73.6,))
    least = Dataset("least-squares", split, split, 3, "noise", "random")

    def squares(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.mse_loss(logits, functional.one_hot(labels, 3).float())

    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    design = np.hstack([split.normalise(images).flatten(1).double().numpy(), np.ones((256, 1))])
    solution = np.linalg.lstsq(design, functional.one_hot(labels, 3).double().numpy(), rcond=None)[0]

    def distance(bits: int) -> tuple[float, float]:
        result = fit(network, least, LowBit(bits=bits), epochs=60, batch_size=256, lr=1.0, momentum=0.3,
                     weight_decay=0.0, loss=squares, progress=False, measure=False)
        weight = result.model[1].weight.detach().double().numpy()
        position = result.strategies[0].statistics.query("tensor == '1.weight'")["position"].iloc[-1]
        return float(np.abs(weight.T - solution[:16]).max()), 2.0 ** (position - bits + 2)

    off, resolution = distance(16)
    assert off < 4 * resolution
    # The problem is none that any format solves.
    assert distance(4)[0] > 100 * off


def test_bytes_kept_for_backward_and_on_the_wire_shrink_with_the_bits():
    for network, size in (("vgg-cifar", 32), ("resnet-cifar", 16)):
        table = analysis.capacity(lambda network=network: build_model(network), (3, size, size), 8, [16, 8])
        ratios = table.set_index("what")
        for what in ("weights", "activations kept", "gradients on the wire"):
            # Poolings' places shrink from 8 bytes to 2 at either width.
            assert 1.95 < ratios.loc[what, "16 bits, ×"] < 2.3, (network, what)
            assert ratios.loc[what, "8 bits, ×"] == pytest.approx(4, abs=0.2), (network, what)


def test_one_tensor_has_one_set_of_codes():
    """ReLU's result, which the next convolution reads too, is kept once, as in plain PyTorch."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.ReLU())
    x = torch.randn(8, 4, 16, 16)
    kept = analysis.kept_bytes(network, x, 8)
    sizes = 8 * (4 * 16 * 16 + 16 * 14 * 14 + 16 * 12 * 12)
    assert kept == sizes
    assert analysis.kept_bytes(network, x, None) == 4 * sizes


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_are_reported_by_the_layers_name(data, poison):
    class Poison(Strategy):
        name: ClassVar[str] = "poison"
        where: str = "weight"

        def on_epoch_start(self, run: Run) -> None:
            if run.epoch == 2 and self.where == "weight":
                with torch.no_grad():
                    run.model.second.weight[1, 2] = poison

        def on_after_backward(self, run: Run) -> None:
            if run.epoch == 2 and self.where == "gradient":
                run.model.shared.bias.grad[1] = poison

    options = dict(epochs=2, batch_size=512, progress=False, measure=False)
    for interval in (1, 100):
        with pytest.raises(LayerlabError, match=r"layer 'second' \(weight\) has .*NaN or Inf"):
            fit(Network(), data, [Poison(), LowBit(interval=interval)], **options)
    with pytest.raises(LayerlabError, match=r"layer 'shared.bias' \(gradient\) has 1 values that are NaN or Inf in st"):
        fit(Network(), data, [Poison(where="gradient"), LowBit()], **options)


@pytest.mark.parametrize("settings", [{}, {"master_bits": 12, "steering": "delayed-max", "interval": 2}])
def test_resume_restores_the_statistics(data, tmp_path, settings):
    options = dict(epochs=3, batch_size=256)
    torch.manual_seed(0)
    network = Network()
    whole = fit(network, data, LowBit(**settings), progress=False, **options)
    first = Fit(network, data, LowBit(**settings), checkpoint=tmp_path, **options)
    first.train_epoch()
    again = fit(network, data, LowBit(**settings), checkpoint=tmp_path, progress=False, **options)
    assert same_weights(whole.model, again.model)
    before, after = whole.strategies[0], again.strategies[0]
    assert before.statistics["epoch"].nunique() == 3
    assert before.statistics.equals(after.statistics)
    assert before.histograms.equals(after.histograms)
    assert before.histograms.to_numpy().sum() > 0


def test_maps_of_formats_are_in_forward_order_though_errors_are_met_backwards(data):
    network = build_model("resnet-cifar", depth=8, channels=1)
    maps = fit(network, data, LowBit(), epochs=2, batch_size=512, progress=False).layer_maps
    layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for kind in ("weight", "error"):
        table = maps[f"low-bit: {kind} formats"].table
        assert [name.removesuffix(f".{kind}") for name in table.index] == layers
        assert list(table.columns) == [1, 2]


def test_evaluation_uses_the_formats_of_training(data):
    """A deployed format does not look at what it is given: values beyond it saturate."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 10, 3), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten())
    job = Fit(network, data, LowBit(), epochs=1, batch_size=256, measure=False)
    job.train_epoch()
    model, x = job.run.model.eval(), next(data.test.batches(16))[0]

    def logits(scale: float, shift: float) -> Tensor:
        with torch.no_grad(), job.run.autocast():
            model[0].bias += shift
            result = model(x * scale)
            model[0].bias -= shift
            return result

    held = job.strategies[0].statistics.copy()
    # Of the first layer's input, and of the second's, which training knows as what ReLU kept.
    assert torch.equal(logits(1e4, 0.0), logits(1e6, 0.0))
    assert torch.equal(logits(1.0, 1e4), logits(1.0, 1e6))
    assert not torch.equal(logits(1.0, 0.0), logits(1e4, 0.0))
    assert held.equals(job.strategies[0].statistics)


def test_the_network_left_is_plain_and_its_weights_are_b_bit_numbers(data):
    result = fit(Network(), data, LowBit(bits=6), epochs=1, batch_size=256, progress=False, measure=False)
    formats = result.strategies[0].statistics.set_index("tensor")["position"]
    for name in ("first", "second", "shared", "last"):
        weight = result.model.get_submodule(name).weight.detach()
        codes = weight / 2.0 ** (formats[f"{name}.weight"] - 6 + 2)
        assert torch.equal(codes, codes.round())
        assert codes.abs().max() <= 31
    # What the user evaluates differs from training's own evaluation only in that activations are floats.
    assert abs(evaluate(result.model, data.test)["test/top1"] - result.final["test/top1"]) < 0.1


def test_master_weights_are_fixed_point_after_every_update(data):
    class Watch(Strategy):
        name: ClassVar[str] = "watch"

        def on_epoch_end(self, run: Run) -> None:
            values = [p.detach().abs() for p in run.model.parameters()]
            run.log("watch/values", max(len(v.unique()) for v in values))

    options = dict(epochs=2, batch_size=256, progress=False, measure=False)
    counts = {bits: fit(Network(), data, [LowBit(master_bits=bits), Watch()], **options).final["watch/values"]
              for bits in (32, 6)}
    assert counts[6] <= 32 < counts[32]


def test_other_strategies_freeze_and_replace_the_step(data):
    class Stepper(Strategy):
        name: ClassVar[str] = "stepper"

        def training_step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
            return run.plain_step(x, y)

    torch.manual_seed(0)
    network = Network()
    options = dict(epochs=2, batch_size=256, progress=False)
    plain = fit(network, data, [LowBit(), Freezer()], **options)
    stepped = fit(network, data, [Stepper(), LowBit(), Freezer()], **options)
    assert same_weights(plain.model, stepped.model)
    backward = [row["cost/backward_flops"] for row in plain.history]
    assert backward[1] < backward[0]


def test_a_gradient_that_went_over_the_wire_is_not_rounded_again(data):
    class Average(Strategy):
        """As a strategy that communicates: the mean of what two workers send."""

        name: ClassVar[str] = "average"
        _kept: dict[str, Tensor] = PrivateAttr(default_factory=dict)

        def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
            # Alone it has no wire.
            return Preflight.of(network)

        def on_after_backward(self, run: Run) -> None:
            for name, parameter in run.training_model.named_parameters():
                sent = [run.wire.encode(name, part) for part in (parameter.grad, parameter.grad * 0.37)]
                assert {codes.dtype for codes, _ in sent} == {torch.int8}
                assert run.step == 0 or len({exponent for _, exponent in sent}) == 1
                parameter.grad.copy_(sum(run.wire.decode(*part) for part in sent) / 2)
            self._kept = {n: p.grad.clone() for n, p in run.training_model.named_parameters()}

        def on_epoch_end(self, run: Run) -> None:
            for name, parameter in run.training_model.named_parameters():
                assert torch.equal(parameter.grad, self._kept[name])

    result = fit(Network(), data, [Average(), LowBit()], epochs=1, batch_size=256, progress=False, measure=False)
    network = Network()
    expected = sum(p.numel() + 1 for p in network.parameters())
    assert result.final["low-bit/wire_bytes"] == expected
    assert result.strategies[1].statistics["kind"].eq("gradient").sum() == len(list(network.parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowBit(bits=1), "bits"),
        (lambda: LowBit(master_bits=20), "master_bits.*32"),
        (lambda: LowBit(units="fp8", bits=8), "up to 5 bits"),
    ],
)
def test_settings_that_cannot_be_get_one_sentence(data, make, message):
    with pytest.raises(LayerlabError, match=message):
        fit(Network(), data, make(), epochs=1, batch_size=512, progress=False)


def test_another_precision_is_refused(data):
    with pytest.raises(LayerlabError, match="leave precision at float32"):
        fit(Network(), data, LowBit(), epochs=1, batch_size=512, precision="bfloat16", progress=False)
