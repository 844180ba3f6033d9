"""Networks by name, and the order of their layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerlab import LayerlabError, build_model, forward_order, prefixes
from layerlab.measure import layer_costs


def test_vgg_f_is_the_published_network():
    table = layer_costs(build_model("vgg-f"), (3, 224, 224)).set_index("layer")
    macs = table["forward_macs"].tolist()
    assert macs[:5] == [67_744_512, 298_598_400, 99_680_256, 99_680_256, 99_680_256]
    assert sum(macs[5:]) == pytest.approx(58.6e6, rel=1e-3)


@pytest.mark.parametrize(("name", "options", "parameters", "macs"), [
    # Caffe's LeNet; Table 6 of He et al., CVPR 2016 (0.27 M, 0.85 M); NOTES.md of adaptive-layer-pruning.
    ("lenet", {}, 431_080, 2_293_000),
    ("resnet-cifar", {"depth": 20}, 269_722, 40_551_040),
    ("resnet-cifar", {"depth": 56}, 853_018, 125_485_696),
    ("preact-resnet", {"depth": 164}, 1_703_258, 247_646_720),
    ("vgg-cifar", {"depth": 11, "batch_norm": False}, 9_225_610, 152_769_536),
    ("airnet", {}, 498_104, 33_066_272),
])
def test_networks_for_small_images_are_the_published_ones(name, options, parameters, macs):
    model = build_model(name, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    shape = (1, 28, 28) if name == "lenet" else (3, 32, 32)
    assert layer_costs(model, shape)["forward_macs"].sum() == macs
    assert model.eval()(torch.randn(2, *shape)).shape == (2, 10)


def test_layers_come_in_forward_order_not_as_declared(residual):
    model = residual()
    names = [name for name, _ in forward_order(model, torch.randn(2, 1, 8, 8))]
    assert names == ["conv1", "bn1", "conv2", "bn2", "classifier"]
    assert next(name for name, _ in model.named_modules() if name in names) == "classifier"


def test_a_layer_with_a_parametrized_weight_is_one_layer_with_or_without_a_bias():
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(
        norm(nn.Conv2d(1, 4, 3, bias=False)), nn.BatchNorm2d(4), norm(nn.Conv2d(4, 4, 3)), nn.Flatten(),
        nn.Linear(64, 2),
    )
    example = torch.randn(2, 1, 8, 8)
    assert [name for name, _ in forward_order(model, example)] == ["0", "1", "2", "4"]
    assert [prefix for _, prefix in prefixes(model, example)] == [[model[0], model[1]], [model[0], model[1], model[2]]]


def test_tracing_leaves_no_trace(residual):
    model = residual().train()
    before = model.bn1.running_mean.clone()
    forward_order(model, torch.randn(2, 1, 8, 8))
    assert model.training
    assert model.bn1.training
    assert torch.equal(model.bn1.running_mean, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_network_is_traced_without_compiling_it_anew(residual):
    model, compiled = residual(), []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model.compile(backend=backend)
    names = [name for name, _ in forward_order(model, torch.randn(2, 1, 8, 8))]
    assert names == ["conv1", "bn1", "conv2", "bn2", "classifier"]
    assert not compiled


def test_a_prefix_takes_its_normalisation_along(residual):
    model = residual()
    found = prefixes(model, torch.randn(2, 1, 8, 8))
    assert [name for name, _ in found] == ["conv1", "conv2"]
    assert found[0][1] == [model.conv1, model.bn1]
    assert found[1][1] == [model.conv1, model.bn1, model.conv2, model.bn2]


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "densenet121", "mobilenet_v2", "vit_b_16"])
def test_backward_ends_at_the_edge_of_a_frozen_prefix_of_any_network(name):
    model = build_model(name, num_classes=3, **({"image_size": 32} if name.startswith("vit") else {}))
    x = torch.randn(2, 3, 32, 32)
    layers = prefixes(model, x)
    assert len(layers) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    _, frozen = layers[len(layers) // 2]
    for module in frozen:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    model(x).sum().backward()
    names = {module: n for n, module in model.named_modules()}
    assert all(p.grad is None for module in frozen for p in module.parameters(recurse=False))
    learning = [names[m] for _, m in forward_order(model, x) if m not in set(frozen)]
    assert learning
    assert all(p.grad is not None for n in learning for p in model.get_submodule(n).parameters(recurse=False))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet8", {}, r"Unknown model 'resnet8'. Did you mean 'resnet\d+'\?"),
        ("vgg-f", {"image_size": 32}, "at least 48 pixels"),
        ("lenet", {"image_size": 8}, "at least 16 pixels"),
        ("resnet-cifar", {"depth": 18}, r"6n \+ 2 layers.*depth=18"),
        ("preact-resnet", {"depth": 18}, r"9n \+ 2 layers.*depth=18"),
        ("vgg-cifar", {"depth": 13}, "11 or 16 layers"),
        ("mlp", {"size": 3}, r"'mlp' cannot be built.*it takes num_classes, image_size"),
        ("resnet18", {"size": 3}, "'resnet18' cannot be built"),
        ("resnet18", {"channels": 1}, "takes 3-channel images"),
    ],
)
def test_bad_input(name, options, message):
    with pytest.raises(LayerlabError, match=message):
        build_model(name, **options)
