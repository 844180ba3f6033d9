"""The executor: plain PyTorch's weights, whatever the network does, and nothing left behind."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from helpers import take_step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from layerlab import LayerlabError, Refused, Run, Strategy, fit, forward_order, load_dataset
from layerlab.training.loop import Fit
from layerlab_memory_reorder import MemoryReorder
from layerlab_memory_reorder.method import measuring, operations
from layerlab_memory_reorder.method.executor import Takeover

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}
# Everything in the order that this package is for, as small as the networks here are.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "at once, in slabs": {"slab": 512, "at_once": 0},
    "weight first": {"order": "weight-first", "at_once": 0},
    "checkpointing": {"checkpointing": True, "at_once": 0, "slab": 512},
    "the paper's part": {"fuse": (), "slab": 0, "at_once": 0},
    "signs without places": {"fuse": ("relu",), "slab": 0},
    "places without signs": {"fuse": ("pool", "norm"), "slab": 0},
}
# Slabs are products of other shapes than the whole, for which a library may add up in another order: a few ulps of
# float32 (1.2e-7) of a weight's scale, times the steps. Everything else must be bit for bit.
ULPS = 1e-6


def trained(
    model: nn.Module, optimizer: str, settings: dict[str, Any] | None, steps: int = 4,
    shape: tuple[int, ...] = (3, 16, 16), prepare: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    model = copy.deepcopy(model).train()
    if prepare:
        prepare(model)
    chosen = OPTIMIZERS[optimizer](list(model.parameters()))
    numbers = torch.Generator().manual_seed(3)
    torch.manual_seed(5)
    takeover = None
    if settings is not None:
        example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        takeover = Takeover(model, chosen, example, **settings)
        takeover.attach()
    for _ in range(steps):
        x = torch.randn(6, *shape, generator=numbers)
        y = torch.randint(0, 10, (6,), generator=numbers)
        take_step(model, chosen, x, y, None if takeover is None else takeover.finish)
        if takeover is not None:
            assert all(p.grad is None for p in model.parameters())
    if takeover is not None:
        takeover.detach()
    return model


def assert_same(a: nn.Module, b: nn.Module, slabs: bool = False) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        if slabs:
            torch.testing.assert_close(second[name], first[name], rtol=ULPS, atol=ULPS)
        else:
            assert torch.equal(first[name], second[name]), name


class Plain(nn.Sequential):
    """Convolutions with ReLU, pooling with overlap and padding, dropout, linear layers, a group and a stride."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
                nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
                nn.LocalResponseNorm(3), nn.Conv2d(12, 12, 3, stride=2, padding=1), nn.ReLU(inplace=True),
                nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            nn.Flatten(), nn.Sequential(
                nn.Linear(48, 64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3),
                nn.Linear(64, 10)))


class Twice(nn.Module):
    """A convolution called twice, a weight shared by two layers, and one used by a function too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.a, self.b = nn.Linear(96, 96), nn.Linear(96, 96)
        self.b.weight = self.a.weight
        self.last = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = self.relu(self.again(self.relu(self.again(x))))
        x = F.max_pool2d(x, 4).flatten(1)
        x = self.b(torch.tanh(self.a(x)))
        return self.last(x) + 0.1 * F.linear(x, self.last.weight)


class Held(nn.Module):
    """Code that holds activations and uses them again: a skip over three layers, and a list that outlives the step."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.out = nn.Linear(8 * 64, 10)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        if self.training:
            self.seen.append(x)
        y = self.pool(self.two(x))
        return self.out((y * x[..., ::2, ::2]).flatten(1))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", [Plain, Twice, Held])
def test_weights_are_plain_pytorchs(kind, optimizer, settings):
    torch.manual_seed(0)
    model = kind()
    plain = trained(model, optimizer, None)
    assert not torch.equal(next(plain.parameters()), next(model.parameters()))
    assert_same(plain, trained(model, optimizer, SETTINGS[settings]), slabs="slab" in SETTINGS[settings])


@pytest.mark.parametrize(("pool", "size"), [
    (nn.MaxPool2d(3, 2, ceil_mode=True), 2), (nn.MaxPool2d(3, 2, ceil_mode=True), 8), (nn.MaxPool2d(2), 7),
    (nn.MaxPool2d(3, 1, 1), 5), (nn.MaxPool2d((3, 2), (1, 2), (1, 0)), 6), (nn.MaxPool2d(2, 2), 20000)])
@pytest.mark.parametrize("relu", [True, False])
def test_pooling_of_every_shape(pool, size, relu):
    torch.manual_seed(0)
    # Whole numbers, so that windows have ties, and many without a positive element.
    x = torch.randint(-3, 3, (3, 2, 4 if size > 100 else size, size)).float()
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True) if relu else nn.Identity(), pool)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[:, :, None, None])
        model[0].bias.zero_()
    x.requires_grad_()
    given = torch.randn_like(model(x))
    (wanted,) = torch.autograd.grad(model(x), x, given)
    with Takeover(model, torch.optim.SGD(model.parameters(), lr=0.0), x.detach()), PlacesInTheImage():
        y = model(x)
        assert torch.equal(y.detach(), model.eval()(x).detach())
        model.train()
        assert torch.equal(torch.autograd.grad(y, x, given)[0], wanted)


class PlacesInTheImage(TorchDispatchMode):
    """Fails where a pooling's backward is given a place outside of its image: the kernel writes there unchecked."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.max_pool2d_with_indices_backward.grad_input:
            image, places = arguments[1], arguments[-1]
            assert places.min() >= 0
            assert places.max() < image.shape[-2] * image.shape[-1]
        return function(*arguments, **(keywords or {}))


def test_slabs_are_applied_in_backward_and_whole_gradients_never_made(monkeypatch):
    torch.manual_seed(0)
    rows = []
    original = Takeover.apply_slabs
    monkeypatch.setattr(Takeover, "apply_slabs",
                        lambda self, weight, *rest: (rows.append(weight.shape), original(self, weight, *rest)))
    trained(Plain(), "sgd", {"slab": 512, "at_once": 0}, steps=1)
    assert rows == [torch.Size([10, 64]), torch.Size([64, 64]), torch.Size([64, 48])]


def random_network(seed: int) -> nn.Module:
    choose = random.Random(seed)
    layers: list[nn.Module] = []
    channels, size = 3, 16
    for _ in range(choose.randint(2, 6)):
        after = choose.choice([4, 6, 8])
        kernel = choose.choice([1, 3, 5])
        layers.append(nn.Conv2d(channels, after, kernel, padding=kernel // 2, bias=choose.random() < 0.7,
                                groups=2 if channels % 2 == 0 and choose.random() < 0.3 else 1))
        channels = after
        if choose.random() < 0.4:
            layers.append(nn.BatchNorm2d(channels))
        layers.append(choose.choice([nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.GELU(), nn.Identity()]))
        if choose.random() < 0.2:
            layers.append(nn.LocalResponseNorm(3))
        if size > 4 and choose.random() < 0.5:
            layers.append(choose.choice([nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.MaxPool2d(2, 2)]))
            size //= 2
        if choose.random() < 0.2:
            layers.append(nn.Dropout(0.2))
    layers += [nn.Flatten(), nn.LazyLinear(32), choose.choice([nn.ReLU(), nn.ReLU(inplace=True)]), nn.Linear(32, 10)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        model.eval()(torch.zeros(2, 3, 16, 16))
    return model


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_under_anomaly_detection(seed):
    torch.manual_seed(seed)
    model = random_network(seed)
    optimizer = list(OPTIMIZERS)[seed % 4]
    plain = trained(model, optimizer, None)
    with torch.autograd.set_detect_anomaly(True):
        assert_same(plain, trained(model, optimizer, {"slab": 0, "at_once": 0}))
        if optimizer != "adamw":
            # A bias before a batch norm has no gradient but rounding errors, of which AdamW makes whole steps: an ulp
            # does not stay one.
            assert_same(plain, trained(model, optimizer, {"slab": 1024, "at_once": 0}), slabs=True)


@pytest.mark.parametrize("settings", SETTINGS)
def test_frozen_layers_and_frozen_biases_stay(settings):
    torch.manual_seed(0)

    def prepare(model: nn.Module) -> None:
        layers = dict(model.named_modules())
        for name in ("0.3", "0.4"):
            layers[name].requires_grad_(False)
        layers["2.0"].weight.requires_grad_(False)  # type: ignore[union-attr]
        layers["2.5"].bias.requires_grad_(False)  # type: ignore[union-attr]

    model = Plain()
    result = trained(model, "sgd", SETTINGS[settings], prepare=prepare)
    assert_same(trained(model, "sgd", None, prepare=prepare), result, slabs="slab" in SETTINGS[settings])
    assert torch.equal(result.get_submodule("0.3").weight, model.get_submodule("0.3").weight)  # type: ignore[arg-type]


def test_an_activation_changed_in_place_is_noticed_as_by_pytorch():
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.a(x)) + 0
            y = self.b(x)
            x.add_(1)
            return y

    with pytest.raises(RuntimeError, match="modified by an inplace"):
        trained(Changed(), "sgd", None, shape=(8,))
    with pytest.raises(RuntimeError, match="modified in place"):
        trained(Changed(), "sgd", {}, shape=(8,))


def test_backward_twice_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with Takeover(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.zeros(2, 4)):
        loss = model(torch.ones(2, 4)).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(LayerlabError, match="one graph serves one backward"):
            loss.backward()


def test_the_inputs_memory_is_free_before_the_input_gradient_is_made(monkeypatch):
    """What the paper is about, seen directly: when dX is computed, X is gone."""
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    alive, inputs = [], []
    layer[1].register_forward_pre_hook(lambda module, arguments: inputs.append(
        weakref.ref(arguments[0].untyped_storage())))
    original = operations._input_gradient
    monkeypatch.setattr(operations, "_input_gradient",
                        lambda *arguments: (alive.append(inputs[-1]() is not None), original(*arguments))[1])
    with Takeover(layer, torch.optim.SGD(layer.parameters(), lr=0.1), torch.zeros(2, 3, 8, 8)):
        layer(torch.randn(2, 3, 8, 8)).sum().backward()
    assert alive == [False]


def test_nothing_is_left_behind():
    torch.manual_seed(0)
    model = Plain()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    before = [dict(vars(module)) for module in model.modules()]
    with Takeover(model, optimizer, torch.zeros(2, 3, 16, 16), checkpointing=True):
        assert any("forward" in vars(module) for module in model.modules())
    for module, was in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == was.keys()
        assert "forward" not in vars(module)
    assert all(not getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


# ------------------------------------------------------------------------------------ as a strategy


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", image_size=16, channels=3, limit=192, test_limit=64, device="cpu")


@pytest.mark.parametrize("settings", [{}, {"slab": 512, "at_once": 0}, {"checkpointing": True, "at_once": 0}])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fit_ends_as_without_it(data, settings, precision):
    options: dict[str, Any] = dict(epochs=2, batch_size=64, lr=0.01, progress=False, precision=precision)
    plain, ours = fit(Plain, data, **options), fit(Plain, data, MemoryReorder(**settings), **options)
    if precision == "float32":
        assert_same(plain.model, ours.model, slabs="slab" in settings)
    else:
        # Gradients are rounded to bfloat16 (2^-8) by the same operations, summed by other ones for small shapes.
        for a, b in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)
    assert type(ours.model.get_submodule("0.0")) is nn.Conv2d
    assert not any("forward" in vars(module) for module in ours.model.modules())
    if precision == "float32" and not settings:
        assert ours.final["cost/peak_memory_bytes"] < plain.final["cost/peak_memory_bytes"]


def test_resume_with_slabs_and_momentum(data, tmp_path):
    options: dict[str, Any] = dict(epochs=4, batch_size=64, lr=0.01)
    strategy = MemoryReorder(slab=512, at_once=0)
    for optimizer in ("sgd", "adamw"):
        whole = fit(Plain, data, strategy, progress=False, optimizer=optimizer, **options)
        first = Fit(Plain, data, strategy, checkpoint=tmp_path / optimizer, optimizer=optimizer, **options)
        first.train_epoch()
        first.train_epoch()
        again = fit(Plain, data, strategy, checkpoint=tmp_path / optimizer, progress=False, optimizer=optimizer,
                    **options)
        assert_same(whole.model, again.model)
        assert len(again.history) == 4


def test_it_composes_with_freezing(data):
    class Freeze(Strategy):
        name: ClassVar[str] = "freeze"

        def on_epoch_start(self, run: Run) -> None:
            order = [module for _, module in forward_order(run.model, run.example)]
            run.freeze(self.name, order[: (0, 3, 1)[run.epoch % 3]])

    options: dict[str, Any] = dict(epochs=4, batch_size=64, lr=0.01, progress=False)
    plain = fit(Plain, data, [Freeze()], **options)
    assert_same(plain.model, fit(Plain, data, [Freeze(), MemoryReorder()], **options).model)
    assert_same(plain.model, fit(Plain, data, [MemoryReorder(), Freeze()], **options).model)


def test_clipping_the_whole_model_is_refused_with_the_reason(data):
    class Clip(Strategy):
        name: ClassVar[str] = "clip"

        def on_after_backward(self, run: Run) -> None:
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)

    options: dict[str, Any] = dict(epochs=1, batch_size=64, progress=False)
    for both in ([Clip(), MemoryReorder()], [MemoryReorder(), Clip()]):
        with pytest.raises(LayerlabError, match=r"each gradient as soon as it is applied, and Clip reads gradients"):
            fit(Plain, data, both, **options)

    def clipping(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(parameters, 1.0))
        return optimizer

    with pytest.raises(LayerlabError, match="clipping the whole model's gradient"):
        fit(Plain, data, MemoryReorder(), optimizer=clipping, **options)
    with pytest.raises(LayerlabError, match="LBFGS needs all gradients at once"):
        fit(Plain, data, MemoryReorder(), optimizer=lambda p: torch.optim.LBFGS(p), **options)


@pytest.mark.parametrize("settings", [{"slab": -1}, {"order": "other"}, {"at_once": "much"}, {"fuse": "perhaps"}])
def test_bad_settings_get_one_sentence(settings):
    with pytest.raises(LayerlabError, match=f"memory-reorder: setting '{next(iter(settings))}' .*, got "):
        MemoryReorder(**settings)


def test_updates_per_parameter_see_the_schedules_rate(data):
    options: dict[str, Any] = dict(epochs=3, batch_size=64, lr=0.05, schedule="cosine", schedule_each="step",
                                   progress=False)
    assert_same(fit(Plain, data, **options).model, fit(Plain, data, MemoryReorder(at_once=0), **options).model)


# ------------------------------------------------------------------------------------ before the first step


def squeezed(channels: int, expand: int) -> nn.Module:
    """An inverted residual: expanded by 1 × 1, depthwise, narrowed again, each with its batch norm."""
    wide = channels * expand
    return nn.Sequential(
        nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
        nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
        nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))


def mobile(channels: int, expand: int, blocks: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, 2, 1), *(squeezed(channels, expand) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def test_a_preflight_says_what_the_method_saves():
    torch.manual_seed(0)
    found = MemoryReorder().preflight(Plain(), torch.randn(2, 3, 16, 16))
    assert set(found.covered) == {"0.0", "0.3", "0.7", "0.9", "2.0", "2.2", "2.5"}
    assert found.left_out == {"0.4": "it keeps PyTorch's backward"}
    (share,) = found.saves.values()
    wanted = [measuring.measured_peak(Plain(), (3, 16, 16), 32, arm) for arm in (measuring.OURS, measuring.FUSED)]
    assert share == pytest.approx(1 - wanted[0] / wanted[1])


@pytest.mark.parametrize("network", [lambda: mobile(16, 6, 4), lambda: mobile(24, 4, 6)])
def test_a_preflight_says_where_the_method_with_checkpointing_is_worse_than_pytorchs(network):
    torch.manual_seed(0)
    found = MemoryReorder(checkpointing=True).preflight(network(), torch.randn(2, 3, 64, 64))
    assert not found.saves
    assert "this method is worse here. Checkpoint blocks in PyTorch instead." in found.notes[-1]


@pytest.mark.parametrize("network", [Plain, Twice])
def test_what_memory_reorder_cannot_train_is_refused_before_the_first_step(network, data):
    with pytest.raises(Refused, match="Every parameter of the network is frozen"):
        fit(network().requires_grad_(False), data, MemoryReorder(), epochs=1, progress=False)
    found = MemoryReorder().preflight(network().requires_grad_(False), torch.randn(2, 3, 16, 16))
    assert set(found.left_out.values()) == {"frozen before the fit"}

    class Again(nn.Module):
        """Uses its last layer twice in training, once in evaluation."""

        def __init__(self) -> None:
            super().__init__()
            self.network, self.last = network(), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.last(self.network(x))
            return self.last(x) if self.training else x

    with pytest.raises(Refused, match=r"cannot train Again: a step on a copy failed \(.*\); use a network"):
        fit(Again, data, MemoryReorder(slab=64, at_once=0), epochs=1, progress=False)


@pytest.mark.parametrize("network", [Plain, Twice])
def test_a_preflight_counts_relus_that_are_no_modules_and_copes_with_frozen_layers(network):
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.frozen = network(), nn.Linear(10, 10).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(torch.relu(self.network(x)))

    found = MemoryReorder().preflight(Called(), torch.randn(2, 3, 16, 16))
    assert found.left_out["frozen"] == "frozen before the fit"
    assert "frozen" not in found.covered
    assert "ReLUs called as functions (1) keep their results" in found.notes[0]
    assert "images with SGD and momentum needs" in found.notes[-1]
