"""A network folded for inference: the same outputs with fewer layers, and the network itself left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import DenseNet, MobileNetV2, ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from layerlab import LayerlabError, Refused, build_model
from layerlab_adaptive_pruning import fold, remove_channels, scales, structure
from layerlab_adaptive_pruning.method.structure import Select

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "preact-resnet": lambda: build_model("preact-resnet", depth=20),
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10),
    "resnet-bottleneck": lambda: ResNet(Bottleneck, [2, 1, 1, 1], num_classes=10),
    "densenet": lambda: DenseNet(8, (3, 3), 16, num_classes=10),
    "mobilenet-v2": lambda: MobileNetV2(num_classes=10, width_mult=0.35, inverted_residual_setting=[
        [1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 1]]),
    "vgg": lambda: build_model("vgg-cifar", depth=11),
}


def images(count: int = 3, size: int = 32, seed: int = 5) -> Tensor:
    """Of larger numbers than a network was probed with."""
    return 2 * torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) + 0.5


def lively(network: nn.Module) -> nn.Module:
    """Statistics, scales of both signs and shifts as a training could leave them."""
    torch.manual_seed(0)
    for module in network.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_var.copy_(torch.rand(module.num_features) + 0.5)
                module.running_mean.copy_(0.3 * torch.randn(module.num_features))
                module.weight.copy_(torch.randn(module.num_features))
                module.bias.copy_(0.3 * torch.randn(module.num_features))
    return network


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max().clamp(min=1)))


def kinds(network: nn.Module) -> list[str]:
    return [type(module).__name__ for module in network.modules()]


@pytest.mark.parametrize("share", [0.0, 0.04, 0.4], ids=["whole", "little", "much"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_folded_network_gives_the_same_and_the_network_and_its_images_stay_as_they_were(name, share):
    network = lively(NETWORKS[name]())
    dead = {path: (torch.rand(len(scale)) < share).nonzero().flatten().tolist()
            for path, scale in scales(network).items()}
    network, _ = remove_channels(network, images(2), dead, check=False)
    state = {part: value.clone() for part, value in network.state_dict().items()}
    folded = fold(network)
    for count, size in ((1, 32), (5, 32), (2, 64)):
        x = images(count, size)
        wanted = network(x)
        given = x.clone()
        assert close(folded(x), wanted)
        assert torch.equal(x, given)
    assert all(torch.equal(value, state[part]) for part, value in network.state_dict().items())
    assert kinds(folded).count("BatchNorm2d") < 0.5 * kinds(network).count("BatchNorm2d")
    assert not any(each.requires_grad for each in folded.parameters())


@torch.no_grad()
def test_a_norm_and_its_relu_become_one_pass_and_a_selection_of_nearly_everything_goes():
    network = lively(build_model("preact-resnet", depth=20))
    dead = {"stage1.0.bn1": list(range(8)), "stage2.1.bn1": [3, 77], "stage3.1.bn1": list(range(0, 256, 2))}
    cut, _ = remove_channels(network, images(2), dead, check=False)
    assert kinds(cut).count("Select") == 3
    folded = fold(cut)
    assert close(folded(images()), cut(images()))
    found = [module for module in folded.modules() if isinstance(module, Select)]
    assert [(module.channels, len(module.index)) for module in found] == [(16, 8), (256, 128)]
    # Of the trunk's norms only the last, in front of the pooling, is left; each sum is written over a branch.
    assert [kinds(folded).count(kind) for kind in ("BatchNorm2d", "Clip", "Sum")] == [1, 6, 6]
    assert folded.get_submodule("stage2.1.conv1").in_channels == 128


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-20, -1e-12, -0.7], ids=str)
@pytest.mark.parametrize("shift", [-0.4, 0.0, 0.4])
@torch.no_grad()
def test_a_scale_of_any_size_and_sign_is_folded(value, shift):
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.conv = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1, stride=2)
            self.other = nn.Conv2d(6, 6, 2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            trunk = self.stem(x)
            y = torch.relu(self.norm(trunk))
            return self.conv(y) + self.other(y) + trunk[:, :, ::2, ::2]

    network = lively(Trunk())
    network.norm.weight[2:4] = value
    network.norm.bias[2:4] = shift
    folded = fold(network)
    assert "BatchNorm2d" not in kinds(folded)
    assert close(folded(images()), network(images()))


class Rooted(nn.Conv2d):
    """A convolution that does more than its class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sqrt())


class Unusual(nn.Module):
    """Norms that must stay: what reads them pads, is in groups or does more; or they have no statistics."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 1), nn.ReLU()
        self.norm = nn.BatchNorm2d(8, track_running_stats=case != "no statistics")
        kind = Rooted if case == "subclass" else nn.Conv2d
        self.conv = kind(8, 8, 3, padding=int(case == "padded"), groups=2 if case == "groups" else 1)
        self.relu = nn.Sigmoid() if case == "another activation" else nn.ReLU()
        self.case = case
        if case == "hook":
            self.conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,))

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.act(self.stem(x))
        y = self.relu(self.norm(trunk))
        out = self.conv(y).mean((2, 3)) + trunk.mean((2, 3))
        return out + y.mean((2, 3)) if self.case == "another reader" else out


@pytest.mark.parametrize("case", ["padded", "groups", "hook", "subclass", "no statistics",
                                  "another activation", "another reader"])
@torch.no_grad()
def test_what_cannot_be_folded_stays(case):
    torch.manual_seed(0)
    network = Unusual(case).eval()
    nn.init.normal_(network.norm.weight)
    nn.init.normal_(network.norm.bias)
    folded = fold(network)
    assert "BatchNorm2d" in kinds(folded)
    assert close(folded(images()), network(images()))


@torch.no_grad()
def test_a_sum_of_what_is_broadcast_or_read_twice_is_not_written_over():
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.pool = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)
            self.deep, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 1)
            self.three = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.one(x), self.two(x)
            both = one + two  # both are read again
            small = self.deep(self.pool(one))
            return (small + two) + both * one + torch.add(self.three(x), one, alpha=2) + (1 + self.last(x))

    network = Sums().eval()
    assert close(fold(network)(images()), network(images()))


@torch.no_grad()
def test_a_folded_network_keeps_the_format_is_exported_and_folded_again():
    network = lively(build_model("preact-resnet", depth=11))
    cut, _ = remove_channels(network, images(2), {"stage2.0.bn1": list(range(40))}, check=False)
    folded = fold(cut.to(memory_format=torch.channels_last))
    x = images().contiguous(memory_format=torch.channels_last)
    assert close(folded(x), cut(x))
    exported = torch.export.export(folded, (x,))
    assert close(exported.module()(x), cut(x))
    assert close(fold(folded)(x), cut(x))
    assert close(copy.deepcopy(folded)(x), cut(x))


def test_a_folded_network_has_no_structure_and_what_cannot_be_traced_is_refused():
    folded = fold(build_model("preact-resnet", depth=11))
    with pytest.raises(LayerlabError, match=r"has no structure to keep.*fold that after `rebuild`"):
        structure(folded)

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(Refused, match="Branching cannot be pruned: its forward pass cannot be traced"):
        fold(Branching())
