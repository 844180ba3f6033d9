"""Taking channels and layers out of networks: what must stay the same, and what must be gone."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import DenseNet, MobileNetV2, ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import VGG, make_layers

from layerlab import LayerlabError, Refused, build_model
from layerlab_adaptive_pruning import merge_thin_layers, rebuild, remove_channels, scales, structure, trace
from layerlab_adaptive_pruning.method.constants import Constants
from layerlab_adaptive_pruning.method.structure import Select


def vgg_bn() -> nn.Module:
    """torchvision's VGG with narrow layers: its own hidden layers of 4096 would take most of the tests' time."""
    with torch.device("meta"):
        network = VGG(nn.Sequential(), num_classes=10, init_weights=False)
    network.features = make_layers([16, "M", 32, 32, "M", 32], batch_norm=True)
    network.classifier = nn.Sequential(nn.Linear(32 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "preact-resnet": lambda: build_model("preact-resnet", depth=20),
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10),
    "resnet-bottleneck": lambda: ResNet(Bottleneck, [2, 1, 1, 1], num_classes=10),
    "vgg-bn": lambda: vgg_bn(),
    "densenet": lambda: DenseNet(8, (3, 3), 16, num_classes=10),
    "mobilenet-v2": lambda: MobileNetV2(num_classes=10, width_mult=0.35, inverted_residual_setting=[
        [1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 1], [6, 64, 2, 2]]),
    "resnet-cifar": lambda: build_model("resnet-cifar", depth=8),
}


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def built(name: str, share: float = 0.0, shift: Callable[[Tensor], Tensor] = torch.zeros_like) -> tuple:
    """A network with lively batch norms, a share of whose channels has γ = 0 and β = shift; and those channels."""
    torch.manual_seed(0)
    network, dead = NETWORKS[name](), {}
    for path, module in network.eval().named_modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for value in (module.weight, module.running_var):
                    value.copy_(torch.rand(module.num_features) + 0.5)
                for value in (module.bias, module.running_mean):
                    value.copy_(0.2 * torch.randn(module.num_features))
                gone = torch.rand(module.num_features) < share
                module.weight[gone] = 0
                module.bias[gone] = shift(module.bias[gone])
            dead[path] = gone.nonzero().flatten().tolist()
    return network, dead


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def layers(network: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in network.modules())


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max().clamp(min=1)))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_channels_with_scale_and_shift_zero_go_without_a_trace(name):
    network, dead = built(name, 0.45)
    before, size = network(images()), parameters(network)
    cut, _ = remove_channels(network, images(), dead)
    assert close(cut(images()), before)
    assert parameters(cut) < 0.75 * size
    # Where a channel can go alone, nothing that is dead is left; norm0 writes what several layers read.
    if name in ("preact-resnet", "vgg-bn", "densenet"):
        assert {path for path, scale in scales(cut).items() if (scale == 0).any()} <= {"features.norm0"}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_pruned_network_is_built_again_from_json_and_its_weights(name):
    network, dead = built(name, 0.45)
    cut, _ = remove_channels(network, images(), dead)
    described, weights = json.dumps(structure(cut)), io.BytesIO()
    torch.save(cut.state_dict(), weights)
    weights.seek(0)
    again = rebuild(built(name)[0], json.loads(described))
    again.load_state_dict(torch.load(weights, weights_only=True))
    assert torch.equal(again.eval()(images()), cut(images()))
    # Pruned once more, it is still told by one description.
    more = {path: [0] for path, scale in scales(cut).items() if len(scale) > 2}
    twice, _ = remove_channels(cut, images(), more)
    assert parameters(twice) < parameters(again)
    third = rebuild(built(name)[0], json.loads(json.dumps(structure(twice))))
    third.load_state_dict(twice.state_dict())
    assert torch.equal(third.eval()(images()), twice(images()))


@pytest.mark.parametrize("shift", [lambda beta: -beta.abs(), lambda beta: beta.abs()], ids=["negative", "positive"])
@torch.no_grad()
def test_the_shift_of_a_removed_channel_is_folded_into_what_follows(shift):
    torch.manual_seed(0)
    # No padding, so that a constant stays one at the borders; the readers have a bias, a norm behind them, neither.
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    ).eval()
    dead = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.copy_(torch.randn(8))
            module.weight[1:4] = 0
            module.bias[1:4] = shift(module.bias[1:4])
            dead[path] = [1, 2, 3]
    before = network(images())
    cut, _ = remove_channels(network, images(), dead)
    assert close(cut(images()), before)
    assert [module.out_channels for module in cut.modules() if isinstance(module, nn.Conv2d)] == [5, 5, 5, 8]


@torch.no_grad()
def test_at_padded_borders_alone_a_folded_shift_is_not_exact():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1),
                            nn.Conv2d(4, 4, 1)).eval()
    network[1].weight[:3], network[1].bias[:3] = 0, 1.0
    before = network(images())
    after = remove_channels(network, images(), {"1": [0, 1, 2]})[0](images())
    assert close(after[..., 1:-1, 1:-1], before[..., 1:-1, 1:-1])
    assert not close(after, before)


@torch.no_grad()
def test_one_channel_left_removes_the_residual_branch_as_weights_of_zero_would():
    network, _ = built("preact-resnet")
    branchless = copy.deepcopy(network)
    branchless.get_submodule("stage2.1.conv3").weight.zero_()  # 4.4.1: weights of zero
    cut, _ = remove_channels(network, images(), {"stage2.1.bn3": list(range(1, 32))})
    assert close(cut(images()), branchless(images()))
    assert layers(cut) == layers(branchless) - 3
    assert not any(name.startswith("stage2.1") for name, _ in cut.named_parameters())


@pytest.mark.parametrize("name", ["preact-resnet", "resnet", "densenet", "mobilenet-v2"])
@torch.no_grad()
def test_a_branch_whose_layer_lost_every_channel_is_removed_and_its_constant_kept(name):
    network, _ = built(name)
    path = {"preact-resnet": "stage3.1.bn3", "resnet": "layer1.0.bn2", "mobilenet-v2": "features.3.conv.3",
            "densenet": "features.denseblock2.denselayer2.norm2"}[name]
    norm = network.get_submodule(path)
    norm.weight.zero_()
    if name == "resnet":
        norm.bias.zero_()  # a constant in front of a ReLU would stay as a shift
    if name == "densenet":
        norm.bias.copy_(-norm.bias.abs())  # its 3 × 3 convolution pads
    before, size = network(images()), layers(network)
    cut, _ = remove_channels(network, images(), {path: list(range(norm.num_features))})
    assert close(cut(images()), before)
    assert layers(cut) < size


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bridge", ["zero", "merge"])
@torch.no_grad()
def test_everything_dead_is_no_error_and_leaves_a_network_that_reads_its_image(name, bridge):
    for left in (0, 1):
        network, _ = built(name)
        size = layers(network)
        dead = {path: list(range(left, len(scale))) for path, scale in scales(network).items()}
        cut, _ = remove_channels(network, images(), dead, bridge)
        assert layers(cut) < size
        assert Constants(cut, {}, images()).values["output"].isnan().any()


@torch.no_grad()
def test_a_layer_without_a_way_around_goes_alone():
    network, _ = built("vgg-bn")
    cut, _ = remove_channels(network, images(), {"features.1": list(range(16))})
    assert [module.out_channels for module in cut.modules() if isinstance(module, nn.Conv2d)] == [32, 32, 32]
    assert Constants(cut, {}, images()).values["output"].isnan().any()


@torch.no_grad()
def test_conv_norm_conv_with_one_channel_becomes_a_convolution_exact_where_the_activation_is_open():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 1, 1, stride=2), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 6, 1, bias=False), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16 * 16, 10),
    ).eval()
    network[1].bias.fill_(50.0)
    network[1].running_mean.fill_(0.3)
    opened, closed = copy.deepcopy(network), copy.deepcopy(network)
    before = network(images())
    merged, _ = merge_thin_layers(opened)
    assert layers(merged) == 1
    assert torch.allclose(merged(images()), before, atol=1e-4)
    closed[1].bias.fill_(0.0)
    before = closed(images())
    assert not torch.allclose(merge_thin_layers(closed)[0](images()), before, atol=1e-2)


@torch.no_grad()
def test_larger_kernels_are_summed_up_which_is_exact_where_the_image_is_flat():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 5, 5, padding=2), nn.ReLU(),
                            nn.Conv2d(5, 5, 1)).eval()  # without batch norms, too
    network[0].bias.fill_(20.0)
    flat = torch.tensor([0.3, -1.0, 0.5]).view(1, 3, 1, 1).expand(2, 3, 12, 12)
    before = network(flat)
    merged, _ = merge_thin_layers(network)
    assert [module.kernel_size for module in merged.modules() if isinstance(module, nn.Conv2d)] == [(1, 1), (1, 1)]
    assert torch.allclose(merged(flat)[..., 3:-3, 3:-3], before[..., 3:-3, 3:-3], atol=1e-4)


@torch.no_grad()
def test_merging_keeps_the_block_and_zero_removes_it():
    dead = {"stage2.1.bn2": list(range(1, 32))}
    sizes = {}
    for bridge in ("zero", "merge"):
        network, _ = built("preact-resnet")
        cut, _ = remove_channels(network, images(), dead, bridge)
        sizes[bridge] = layers(network) if cut is network else layers(cut)
        if bridge == "merge":
            conv = cut.get_submodule("stage2.1.conv2")
            assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (128, 32, (1, 1))
    whole = layers(built("preact-resnet")[0])
    assert sizes == {"zero": whole - 3, "merge": whole - 1}


@torch.no_grad()
def test_onnx_and_export_give_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    network, dead = built("preact-resnet", 0.45)
    dead["stage2.1.bn3"] = list(range(32))
    cut, _ = remove_channels(network, images(), dead)
    exported = torch.export.export(cut, (images(),))
    assert torch.allclose(exported.module()(images()), cut(images()), atol=1e-5)
    torch.onnx.export(exported, f=str(tmp_path / "pruned.onnx"), verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "pruned.onnx"))
    (logits,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    assert torch.allclose(torch.from_numpy(logits), cut(images()), atol=1e-4)


def test_a_selection_keeps_the_memory_format_and_passes_gradients_to_what_it_selects():
    select = Select(6, [4, 1, 5])
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
        x.requires_grad_(True)
        chosen = select(x)
        assert torch.equal(chosen, x[:, [4, 1, 5]])
        assert chosen.is_contiguous(memory_format=layout)
        (chosen**2).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert gradients[0].flatten(2).any(2).any(0).tolist() == [False, True, False, False, True, True]


class Bypassed(nn.Module):
    """An activation works in place on a sum; without the branch, on what the network goes on reading."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.norm1(self.conv1(x))
        return self.relu(trunk + self.norm2(self.conv2(trunk))).mean((2, 3)) + 3 * trunk.mean((2, 3))


@torch.no_grad()
def test_activations_work_in_place_where_their_author_had_it_and_nothing_else_reads_their_input():
    network, _ = built("preact-resnet")
    cut, _ = remove_channels(network, images(), {"stage2.1.bn2": list(range(32)), "stage1.1.bn1": [3]})
    activations = [module for module in cut.modules() if isinstance(module, nn.ReLU)]
    assert len(activations) == 16
    assert all(module.inplace for module in activations)
    torch.manual_seed(0)
    network = Bypassed().eval()
    network.norm2.weight.zero_()
    before = network(images())
    cut, _ = remove_channels(network, images(), {"norm2": [0, 1, 2, 3]})
    assert layers(cut) == 1
    assert close(cut(images()), before)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x))).mean((2, 3))


class Branching(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3)) if x.sum() > 0 else x.mean((2, 3))


class Dropping(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.norm(self.conv(x)), 0.5, self.training).mean((2, 3))


@pytest.mark.parametrize(("kind", "reason"), [
    (Twice, "its layer conv is called twice"), (Branching, "forward pass cannot be traced"), (Dropping, "nn.Dropout"),
])
def test_what_cannot_be_traced_is_refused_with_the_reason(kind, reason):
    with pytest.raises(LayerlabError, match=f"{kind.__name__} cannot be pruned: .*{reason}"):
        trace(kind())


def test_a_structure_of_another_network_is_refused():
    network, dead = built("preact-resnet", 0.45)
    described = structure(remove_channels(network, images(), dead)[0])
    with pytest.raises(LayerlabError, match="does not belong to ResNet"):
        rebuild(built("resnet")[0], described)
    with pytest.raises(LayerlabError, match="its format is None"):
        rebuild(built("resnet")[0], {})


# ------------------------------------------------------------------------------- what takes NaN for a number


class Straight(torch.autograd.Function):
    """The sign forward, the identity backward."""

    @staticmethod
    def forward(ctx, x):
        return torch.sign(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Activation(nn.Module):
    """One of the operations that make a number of NaN, as a module without children."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return {
            "sign": lambda: Straight.apply(x),
            "above": lambda: (x > 3.0).to(x.dtype),
            "quantised": lambda: torch.fake_quantize_per_tensor_affine(x, 0.25, 0, -8, 7),
            "finite": lambda: torch.where(torch.isfinite(x), x, torch.zeros_like(x)),
        }[self.kind]()


class Quantised(nn.Module):
    """A chain, or with a residual branch, whose activations are all of one kind, as modules or as functions."""

    def __init__(self, kind: str, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.stem, self.norm0 = nn.Conv2d(3, 12, 3, 2, bias=False), nn.BatchNorm2d(12)
        self.conv1, self.norm1 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.norm2 = nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12)
        self.act, self.fc = Activation(kind), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x))
        # As a function, where fx sees each operation, and as a module, where it sees one.
        x = (x > 3.0).to(x.dtype) + x if self.act.kind == "above" else self.act(x)
        branch = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        x = x + branch if self.residual else branch
        return self.fc(self.act(x).mean((2, 3)))


@pytest.mark.parametrize("kind", ["sign", "above", "quantised", "finite"])
@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_an_operation_that_makes_a_number_of_nan_hides_no_living_channel(kind, residual):
    torch.manual_seed(0)
    network = Quantised(kind, residual).eval()
    for norm in (network.norm0, network.norm1, network.norm2):
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    size, before = parameters(network), network(images())
    whole, _ = remove_channels(copy.deepcopy(network), images(), {})
    assert parameters(whole) == size
    assert close(whole(images()), before)
    network.norm1.weight[:5] = network.norm1.bias[:5] = 0
    before = network(images())
    cut, _ = remove_channels(network, images(), {"norm1": [0, 1, 2, 3, 4]})
    assert close(cut(images()), before)
    # A comparison has no gradient, along which torch-pruning would follow the channels: they stay.
    assert cut.get_submodule("conv1").out_channels == (12 if kind == "above" else 7)
    assert (cut.get_submodule("stem").out_channels, cut.get_submodule("fc").in_features) == (12, 12)


class Excited(nn.Module):
    """Squeeze-and-excitation between two convolutions, the first of them in groups of one or not."""

    def __init__(self, depthwise: bool) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.depthwise = depthwise
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Conv2d(4, 12, 1),
                                     nn.Sigmoid())
        self.out, self.norm, self.fc = nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.wide(x)) if self.depthwise else self.wide(x)
        return self.fc(torch.relu(self.norm(self.out(self.squeeze(x) * x))).mean((2, 3)))


@pytest.mark.parametrize("depthwise", [False, True])
@torch.no_grad()
def test_dead_channels_go_through_squeeze_and_excitation(depthwise):
    torch.manual_seed(0)
    network = Excited(depthwise).eval()
    dead = [1, 4, 5]
    for part in (network.wide, network.deep):
        part[1].weight[dead], part[1].bias[dead] = 0, -0.3
    before = network(images())
    cut, _ = remove_channels(network, images(), {"wide.1": dead, **({"deep.1": dead} if depthwise else {})})
    assert close(cut(images()), before)
    assert [cut.get_submodule(name).out_channels for name in ("wide.0", "squeeze.3")] == [9, 9]
    assert [cut.get_submodule(name).in_channels for name in ("squeeze.1", "out")] == [9, 9]


@pytest.mark.parametrize(("name", "path"), [("preact-resnet", "stage2.1.conv2"), ("resnet", "layer1.0.conv1"),
                                            ("vgg-bn", "features.3"), ("mobilenet-v2", "features.3.conv.3")])
@torch.no_grad()
def test_a_layer_that_the_user_froze_keeps_its_shape_and_its_weights_and_stays(name, path):
    network, dead = built(name, 0.45)
    frozen = network.get_submodule(path).requires_grad_(False)
    for norm in dead:
        if norm.startswith(path.rpartition(".")[0]) and "resnet" in name:
            network.get_submodule(norm).weight.zero_()  # its whole branch is dead
            network.get_submodule(norm).bias.zero_()
            dead[norm] = list(range(network.get_submodule(norm).num_features))
    kept = {part: value.clone() for part, value in frozen.state_dict().items()}
    size = parameters(network)
    cut, _ = remove_channels(network, images(), dead)
    now = cut.get_submodule(path).state_dict()
    assert kept.keys() == now.keys()
    assert all(torch.equal(now[part], value) for part, value in kept.items())
    assert parameters(cut) < 0.9 * size


class ByWidth(nn.Module):
    """An activation that divides by the number of its channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) / x.shape[1]


@pytest.mark.parametrize("build", [
    lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), ByWidth(), nn.Conv2d(8, 4, 1)),
    lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), ByWidth(),
                          nn.Linear(8, 4)),
], ids=["convolution", "linear"])
@torch.no_grad()
def test_a_cut_that_changes_the_outputs_is_an_error(build):
    torch.manual_seed(0)
    network = build().eval()
    network[1].weight[2:5] = network[1].bias[2:5] = 0
    with pytest.raises(LayerlabError, match=r"Removing dead channels changed the outputs of Sequential by \d+"):
        remove_channels(network, images(), {"1": [2, 3, 4]})


# ------------------------------------------------------------------------------- network slimming, and the bridges


@pytest.mark.parametrize(("name", "trunk"), [("preact-resnet", "stage2.0.conv3"), ("resnet", "layer2.0.conv2"),
                                             ("densenet", "features.denseblock1.denselayer1.conv2")])
@torch.no_grad()
def test_inside_only_keeps_every_layer_and_the_width_of_every_sum(name, trunk):
    network, dead = built(name, 0.45)
    for path in dead:  # one branch of every network is dead altogether, but for one channel
        if path.endswith(("stage2.1.bn2", "layer2.0.bn1", "denselayer2.norm2")):
            norm = network.get_submodule(path)
            norm.weight[1:] = norm.bias[1:] = 0
            dead[path] = list(range(1, norm.num_features))
    before, size, width = network(images()), layers(network), network.get_submodule(trunk).out_channels
    whole = parameters(network)
    cut, _ = remove_channels(network, images(), dead, inside_only=True)
    assert close(cut(images()), before)
    assert layers(cut) == size
    assert cut.get_submodule(trunk).out_channels == width
    assert parameters(cut) < 0.9 * whole


def thin(kernel: int) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 1, kernel, padding=kernel // 2), nn.BatchNorm2d(1), nn.ReLU(),
                            nn.Conv2d(1, 6, kernel, padding=kernel // 2), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    network[1].running_mean.fill_(0.1)
    network[1].running_var.fill_(4.0)
    nn.init.constant_(network[1].weight, 1.5)
    nn.init.constant_(network[1].bias, -0.2)
    return network


@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_the_bridge_to_the_letter_applies_norm_and_relu_to_the_weights_and_a_random_one_knows_nothing(kernel):
    network = thin(kernel)
    conv1, norm, conv2 = network[0], network[1], network[3]
    # 4.4.2 word by word: weight = conv1.weight; BN(weight); ReLU(weight); conv2(weight).
    as_image = conv1.weight.sum((2, 3)).view(3, 1, 1, 1)  # (inputs, one channel, 1, 1)
    wanted = torch.relu(norm(as_image)).view(1, 3) * conv2.weight.sum((2, 3))
    found = {}
    for bridge in ("relu", "random", "merge"):
        merged, _ = merge_thin_layers(thin(kernel), bridge)
        conv = next(module for module in merged.modules() if isinstance(module, nn.Conv2d))
        assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (3, 6, (1, 1))
        found[bridge] = conv
    torch.testing.assert_close(found["relu"].weight.flatten(1), wanted)
    torch.testing.assert_close(found["relu"].bias, conv2.bias)
    torch.testing.assert_close(found["random"].bias, conv2.bias)
    again, _ = merge_thin_layers(thin(kernel), "random")
    assert torch.equal(next(again.parameters()), found["random"].weight)
    assert not torch.allclose(found["random"].weight, found["merge"].weight, atol=0.05)


# ------------------------------------------------------------------------------- refused


class TiedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 10, 1), nn.BatchNorm2d(10)
        self.one, self.two = nn.Linear(10, 10), nn.Linear(10, 10)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(self.norm(self.conv(x)).mean((2, 3)))))


class TiedNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 10, 1), nn.BatchNorm2d(10)
        self.conv2, self.norm2 = nn.Conv2d(10, 10, 1), nn.BatchNorm2d(10)
        self.norm2.bias = self.norm1.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))).mean((2, 3))


@pytest.mark.parametrize(("kind", "pair"), [(TiedLinear, "one and two"), (TiedNorms, "norm1 and norm2")])
def test_tied_weights_are_refused_before_they_are_parted(kind, pair):
    with pytest.raises(Refused, match=f"{kind.__name__} cannot be pruned: its layers {pair} share a parameter"):
        trace(kind())
