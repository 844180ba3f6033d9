"""Dead channels of convolutions in groups: as many go in every group, and what is left computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from helpers import slow
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import Bottleneck

from layerlab import fit, load_dataset
from layerlab_adaptive_pruning import AdaptivePruning, rebuild, remove_channels, structure
from layerlab_adaptive_pruning.method.groups import in_groups


def block(inputs: int, outputs: int, kernel: int, activation: nn.Module, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
                         nn.BatchNorm2d(outputs), activation)


class Joined(nn.Module):
    """Two branches whose concatenation a convolution in groups reads, and another one with a bias reads that."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = block(3, 12, 3, nn.ReLU()), block(3, 20, 5, nn.Hardswish())
        self.mix = nn.Conv2d(32, 48, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(48)
        self.last = block(48, 24, 1, nn.ReLU(), groups=2)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.fc(self.last(torch.relu(self.norm(self.mix(x)))).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnext": lambda: ResNet(Bottleneck, [1, 2, 1, 1], num_classes=10, groups=4, width_per_group=8),
    "regnet": lambda: RegNet(BlockParams.from_init_params(
        depth=4, w_0=24, w_a=24.0, w_m=2.5, group_width=8, se_ratio=0.25), num_classes=10),
    "joined": Joined,
}


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def built(name: str, share: float, shift: float = 0.0) -> tuple[nn.Module, dict[str, list[int]]]:
    """A network with lively batch norms, in which a share of the channels has γ = 0 and β = shift; and those."""
    torch.manual_seed(0)
    network, dead = NETWORKS[name]().eval(), {}
    for path, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.copy_(torch.rand(module.num_features) + 0.5)
            module.running_var.copy_(torch.rand(module.num_features) + 0.5)
            module.bias.copy_(0.2 * torch.randn(module.num_features))
            gone = torch.rand(module.num_features) < share
            module.weight[gone], module.bias[gone] = 0, shift
            dead[path] = gone.nonzero().flatten().tolist()
    return network, dead


def grouped(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {path: module for path, module in network.named_modules() if in_groups(module)}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0.5, 0.8])
@torch.no_grad()
def test_dead_channels_of_groups_go_without_a_trace(name, share):
    network, dead = built(name, share)
    before = network(images())
    sizes = {path: (module.in_channels, module.out_channels) for path, module in grouped(network).items()}
    weights = {path: module.weight.clone() for path, module in grouped(network).items()}
    cut, replaced = remove_channels(network, images(), dead)
    assert torch.allclose(cut(images()), before, rtol=0, atol=1e-5 * float(before.abs().max().clamp(min=1)))
    left = grouped(cut)
    assert any((module.in_channels, module.out_channels) < sizes[path] for path, module in left.items())
    for path, module in left.items():
        assert module.weight.shape == (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        assert type(module) is nn.Conv2d
        # Each row of a cut weight stands for one of the same group, less some of its inputs.
        rows = weights[path].unflatten(0, (module.groups, -1)).flatten(2)
        for group, kept in enumerate(module.weight.unflatten(0, (module.groups, -1)).flatten(2)):
            assert all(torch.isin(row, rows[group]).all() for row in kept)
    assert all(torch.equal(carry(old), new) for old, new, carry in replaced if carry is not None and old.dim() == 4)


@pytest.mark.parametrize("name", ["resnext", "joined"])
@torch.no_grad()
def test_constants_are_folded_group_by_group(name):
    network, dead = built(name, 0.7, shift=0.5)
    # Kernels of 1 × 1 have no border, where a constant other than zero would end.
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.mean((2, 3), keepdim=True))
            module.kernel_size, module.padding = (1, 1), (0, 0)
    whole = sum(parameter.numel() for parameter in network.parameters())
    before = network(images())
    cut, _ = remove_channels(network, images(), dead)
    assert sum(parameter.numel() for parameter in cut.parameters()) < 0.8 * whole
    assert torch.allclose(cut(images()), before, rtol=0, atol=1e-4 * float(before.abs().max().clamp(min=1)))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_with_fewer_channels_in_its_groups_is_built_again(name):
    network, dead = built(name, 0.8)
    cut, _ = remove_channels(network, images(), dead)
    again = rebuild(built(name, 0.0)[0], json.loads(json.dumps(structure(cut))))
    again.load_state_dict(cut.state_dict())
    assert torch.equal(again.eval()(images()), cut(images()))


@torch.no_grad()
def test_where_one_group_has_nothing_dead_all_groups_keep_theirs_and_the_weakest_go_first():
    network, _ = built("joined", 0.0)
    network.norm.weight[:] = torch.linspace(0.1, 1, 48)
    # 4 groups of 12 outputs: 2, 3, 2 and 0 are dead.
    few = {"norm": [0, 5, 12, 13, 20, 24, 30]}
    for channel in few["norm"]:
        network.norm.weight[channel] = network.norm.bias[channel] = 0
    kept, _ = remove_channels(network, images(), few)
    assert kept.get_submodule("mix").out_channels == 48
    network, _ = built("joined", 0.0)
    network.norm.weight[:] = torch.linspace(0.1, 1, 48)
    marked = {"norm": [0, 5, 12, 13, 20, 24, 30, 36, 47]}
    cut, _ = remove_channels(network, images(), marked, check=False)
    left = cut.get_submodule("norm").weight
    # One more group has two, so two go everywhere: of 12, 13 and 20 the first two.
    assert cut.get_submodule("mix").out_channels == 40
    kept_channels = [channel for channel in range(48) if channel not in (0, 5, 12, 13, 24, 30, 36, 47)]
    assert torch.equal(left, torch.linspace(0.1, 1, 48)[kept_channels])


@pytest.mark.parametrize("name", [pytest.param("resnext", marks=slow), "joined"])
def test_groups_are_pruned_in_a_training(name):
    data = load_dataset("digits", image_size=32, channels=3, limit=96, test_limit=32, device="cpu")
    strategy = AdaptivePruning(targets=[{"parameters": 0.6}], every=1, sparsity=1e-3)
    result = fit(NETWORKS[name], data, strategy, epochs=2, batch_size=32, lr=0.02, progress=False, measure=False)
    first, last = (sum(parameter.numel() for parameter in each.parameters())
                   for each in (NETWORKS[name](), result.model))
    assert last <= 0.6 * first
    held = {parameter.shape for parameter in result.model.parameters()}
    assert all(module.weight.shape in held for module in grouped(result.model).values())
