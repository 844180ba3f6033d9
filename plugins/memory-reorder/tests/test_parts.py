"""Convolutions and batch norms some channels at a time: the same bits, from less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import same_weights, take_step
from torch import Tensor, nn

from layerlab import measure
from layerlab_memory_reorder.method import parts
from layerlab_memory_reorder.method.executor import Takeover
from layerlab_memory_reorder.method.parts import channel_parts
from layerlab_memory_reorder.method.program import Program
from layerlab_memory_reorder.method.replay import Group, Schedule

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("channels", "size"), [
    (64, 2**20), (64, 2**23), (48, 2**22), (96, 2**23 + 1), (1024, 2**22), (16, 2**30), (100, 2**30), (3, 1)])
def test_parts_hold_each_channel_once_in_whole_blocks_of_no_more_bytes_than_asked(channels, size):
    found = channel_parts(channels, size)
    assert [channel for part in found for channel in range(channels)[part]] == list(range(channels))
    lengths = [part.stop - part.start for part in found]
    assert len(found) == 1 or all(length % parts.BLOCK == 0 for length in lengths)
    # Channels that do not come in whole blocks stay together, and a part has one block at least.
    if channels % parts.BLOCK == 0:
        assert max(lengths) * size / channels <= max(parts.PART + parts.BLOCK * size / channels,
                                                     parts.BLOCK * size / channels)


def schedule_of(model: nn.Module, by_channels: bool) -> Schedule:
    """Everything kept, in one stretch."""
    names = tuple(node.name for node in Program(model).nodes)
    return Schedule(names, ((0, len(names)),), (Group(0, 0),), by_channels)


def trained(
    model: nn.Module, x: Tensor, by_channels: bool | None, hold: Callable[[nn.Module], object] = lambda _: None
) -> tuple[nn.Module, int]:
    """The network after two steps, and the real heap's peak; None is plain PyTorch, its optimizer at the end."""
    model = copy.deepcopy(model).train()
    hold(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    y = torch.arange(len(x)) % 10
    takeover = None
    if by_channels is not None:
        takeover = Takeover(model, optimizer, x[:2], schedule=schedule_of(model, by_channels))
        takeover.attach()

    def step() -> None:
        take_step(model, optimizer, x, y, None if takeover is None else takeover.finish)

    peak = measure.peak_allocated(step, step, [x, y, *model.parameters(), *model.buffers()])
    if takeover is not None:
        takeover.detach()
    return model, peak


def assert_as_plain_pytorch(model: nn.Module, x: Tensor) -> None:
    """The weights are plain PyTorch's to the bit where channels are computed in parts."""
    plain, _ = trained(model, x, None)
    ours, _ = trained(model, x, True)
    assert same_weights(plain, ours)


def network(*layers: nn.Module, channels: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Sum(nn.Module):
    """A residual sum made in place, and a ReLU whose result two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64))
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += x
        y = self.relu(y)
        return self.second(y) + y


# Small maps with many channels, large maps with few, strides, paddings; each has a gradient or an operand above
# `parts.PART` bytes.
CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1x1 wide": (network(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
                         nn.Conv2d(256, 64, 1, bias=False), nn.BatchNorm2d(64), channels=64), (16, 64, 32, 32)),
    "1x1 with a stride": (network(nn.Conv2d(96, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU(inplace=True),
                                  nn.Conv2d(256, 96, 1, stride=2, bias=False), channels=96), (16, 96, 16, 16)),
    "3x3": (network(nn.Conv2d(80, 112, 3, padding=1), nn.BatchNorm2d(112), nn.ReLU(inplace=True),
                    nn.Conv2d(112, 48, 3, stride=2, padding=1, bias=False), channels=48), (16, 80, 24, 24)),
    "large weights": (network(nn.Conv2d(512, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512), nn.ReLU(),
                              nn.Conv2d(512, 1024, 1, stride=2, bias=False), nn.BatchNorm2d(1024), channels=1024),
                      (8, 512, 4, 4)),
    "depthwise": (network(nn.Conv2d(96, 96, 3, padding=1, groups=96, bias=False), nn.BatchNorm2d(96), nn.ReLU6(),
                          nn.Conv2d(96, 96, 3, stride=2, padding=1, groups=96, bias=False), nn.BatchNorm2d(96),
                          channels=96), (16, 96, 32, 32)),
    "sums": (network(nn.Conv2d(64, 64, 1), Sum(), channels=64), (16, 64, 32, 32)),
    "odd": (network(nn.Conv2d(70, 90, 3, padding=1, bias=False), nn.BatchNorm2d(90), nn.Tanh(),
                    nn.Conv2d(90, 90, 3, padding=1, groups=2, bias=False), channels=90), (16, 70, 33, 31)),
}


@pytest.mark.parametrize("case", CASES)
def test_by_channels_the_weights_are_plain_pytorchs_from_less_memory(case):
    model, shape = CASES[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    plain, _ = trained(model, x, None)
    _, whole = trained(model, x, False)
    ours, peak = trained(model, x, True)
    assert same_weights(plain, ours)
    # Channels that are no whole blocks, and groups, are left as they are; the sums' peak is the forward pass'.
    assert peak == whole if case in ("odd", "sums") else peak < whole


@pytest.mark.parametrize(("case", "layer"), [("1x1 wide", "0"), ("1x1 wide", "2"), ("sums", "1.first.1"),
                                             ("sums", "1.relu")])
def test_what_somebody_else_holds_is_not_written_over(case, layer):
    held: list[tuple[Tensor, Tensor]] = []

    def hold(model: nn.Module) -> None:
        def keep(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
            if module.training:
                held.append((result, result.detach().clone()))

        model.get_submodule(layer).register_forward_hook(keep)

    model, shape = CASES[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    plain, _ = trained(model, x, None)
    ours, _ = trained(model, x, True, hold)
    assert len(held) > 1
    for kept, before in held:
        assert torch.equal(kept, before)
    assert same_weights(plain, ours)


class Added(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        self.layer, self.again = nn.Conv2d(8, 8, 1), again

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        total = y + x
        return total * y if self.again else total


@pytest.mark.parametrize(("again", "most"), [(False, 1), (True, 3)])
def test_a_sum_takes_over_its_first_operands_memory_where_nothing_reads_that_any_more(again, most):
    model = Added(again)
    program = Program(model)
    x = torch.ones(4, 8, 16, 16)
    with torch.no_grad(), measure.LiveBytes([x, *model.parameters()]) as live:
        before = live.now
        values = {program.input: x}
        program.run(0, len(program.nodes), values)
        assert live.peak - before == most * x.nbytes
        result = program.output(values)
    with torch.no_grad():
        assert torch.equal(result, model(x))


def test_a_relus_input_gradient_takes_over_its_results_memory():
    forward = parts.relu_forward(nn.ReLU(inplace=True))
    start, other = torch.ones(2**20, requires_grad=True), torch.ones(2**20)
    with measure.LiveBytes([start, other]) as live:
        result = (forward(torch.relu_, start * 1) * other).sum()
        before = live.now
        result.backward()
    # The gradient of the product, beside the result; and later one of the parameter in its place.
    assert live.peak - before <= other.nbytes + 100
    assert torch.equal(start.grad, other)


class Turned(nn.Module):
    """A batch norm and a ReLU whose results' gradients come in another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(8, 64, 1), nn.BatchNorm2d(64)
        self.relu, self.last = nn.ReLU(), nn.Conv2d(64, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.layer(x))
        z = self.relu(y * 2)
        turned = z.transpose(2, 3) + z.sigmoid()
        return (self.last(turned) + y.transpose(2, 3)[:, :10]).sum((2, 3))


class Saving(nn.Module):
    """A sum whose first operand its layer needs for its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.tanh, self.last = nn.Conv2d(8, 8, 1), nn.Tanh(), nn.Conv2d(8, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.tanh(self.layer(x)) + x).sum((2, 3))


@pytest.mark.parametrize("kind", [Turned, Saving])
def test_other_layouts_and_operands_that_are_needed_are_left_alone(kind):
    torch.manual_seed(1)
    assert_as_plain_pytorch(kind(), torch.randn(16, 8, 32, 32, generator=torch.Generator().manual_seed(2)))


def test_statistics_that_are_off_or_frozen_batch_norms_come_out_as_plain_pytorchs():
    model, shape = CASES["3x3"]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    model = copy.deepcopy(model)
    model[1] = nn.BatchNorm2d(112, track_running_stats=False)
    model[1].weight.requires_grad_(False)
    assert_as_plain_pytorch(model, x)


def test_a_choice_is_restored_with_its_parts():
    model, _ = CASES["3x3"]
    for by_channels in (False, True):
        schedule = schedule_of(model, by_channels)
        assert Schedule.of_state(schedule.state()) == schedule
